# SPDX-License-Identifier: Apache-2.0
"""``dqrelo doctor``: one line for each part of the machine, and whether it serves."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import run

ROOT = Path(__file__).parent.parent

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture
def screen(capsys, monkeypatch, tmp_path):
    """``screen()``: the exit code, and the line of each part."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the expected lines are those of a CPU")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))

    def show():
        code = run("doctor")
        *lines, empty, verdict = capsys.readouterr().out.splitlines()
        assert empty == ""
        found = {}
        for line in lines:
            mark, subject, text = re.match(r"(PROBLEM)? +(\S.*?)  +(.*)", line).groups()
            found[subject] = (text, mark is None)
        return code, found, verdict

    return show


def test_a_machine_that_can_serve(screen):
    import torch
    import vllm

    from vllm_dqrelo import __version__

    code, found, verdict = screen()
    assert code == 0 and verdict == "This machine can serve deltas."
    assert all(serves for _, serves in found.values())
    text = {subject: text for subject, (text, _) in found.items()}
    assert text["vllm-dqrelo"].startswith(f"{__version__}, Python 3.")
    assert f"torch {torch.__version__}" in text["packages"]
    assert text["vLLM"].startswith(f"{vllm.__version__} (tested: >=")
    assert text["plugin"] == "active: vLLM knows --quantization dqrelo"
    assert text["device"].startswith(f"cpu: {os.cpu_count()} cores")
    assert re.match(r"V[12], ", text["model runner"])
    assert re.fullmatch(r"[\d.]+ of [\d.]+ GiB available", text["memory"])
    assert text["self-check"].startswith("not remembered")


def test_what_keeps_a_machine_from_serving(screen, monkeypatch):
    """The reason in its line, and exit code 1; the other lines are there, too."""
    from vllm_dqrelo import compat, supported
    from vllm_dqrelo.frontend import doctor

    def broken():
        raise OSError("libnuma.so: cannot open\nmore")

    monkeypatch.setenv("VLLM_PLUGINS", "x")
    monkeypatch.setattr(compat, "OLDEST", (9, 0))
    monkeypatch.setattr(supported, "device_problem", lambda kind: f"not on {kind}")
    monkeypatch.setitem(doctor.PARTS, "memory", broken)
    code, found, verdict = screen()
    assert code == 1
    assert verdict == "This machine cannot serve deltas: vLLM, plugin, device, memory."
    assert re.search(r"tested with vLLM >=9.0.*pip install", found["vLLM"][0])
    assert "tested with vLLM" in found["plugin"][0]  # the first of its problems
    assert found["device"] == ("cpu: --quantization dqrelo not on cpu", False)
    assert found["memory"] == ("OSError: libnuma.so: cannot open", False)
    assert found["packages"][1] and found["operators"][1]

    monkeypatch.undo()
    monkeypatch.setenv("VLLM_PLUGINS", "x")
    code, found, verdict = screen()
    assert code == 1 and verdict == "This machine cannot serve deltas: plugin."
    assert found["plugin"][0].startswith("VLLM_PLUGINS=x keeps vLLM from loading")


def test_without_vllm_the_first_reason_is_the_last_line():
    code = "import sys; sys.modules['vllm'] = None\n"
    code += "from dqrelo_tools import cli; sys.exit(cli.main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *_, last, empty, verdict = done.stdout.splitlines()
    assert done.returncode == 1 and empty == ""
    assert last.startswith("PROBLEM  vLLM") and "vllm-dqrelo[vllm]" in last
    assert verdict == "This machine cannot serve deltas: vLLM."


def test_the_operators_are_native_or_slow(screen, monkeypatch, tmp_path):
    """A machine without a compiler serves; nothing is built to find that out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if compiler := shutil.which("g++"):
        monkeypatch.setenv("CXX", compiler)
        expected = f"native code, by {compiler}, to be built at the first start"
        assert screen()[1]["operators"] == (expected, True)
        assert not (tmp_path / "cache").exists()
    monkeypatch.setenv("DQRELO_NATIVE", "0")
    slow = "plain torch, many times slower: "
    assert screen()[1]["operators"] == (f"{slow}DQRELO_NATIVE=0", True)
    monkeypatch.delenv("DQRELO_NATIVE")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    code, found, _ = screen()
    missing = f"{slow}a C++ compiler is missing; install g++ or set CXX"
    assert code == 0 and found["operators"] == (missing, True)


def test_the_newest_self_check_is_shown(screen, tmp_path):
    from vllm_dqrelo.messages.self_check import FOLDER

    folder = tmp_path / FOLDER
    folder.mkdir(parents=True)
    for age, name in enumerate(("new", "old")):
        path = folder / f"{name}.json"
        path.write_text(json.dumps({"result": f"passed, {name}"}))
        os.utime(path, (1e9 - age, 1e9 - age))
    assert screen()[1]["self-check"] == ("passed, new", True)
    (folder / "new.json").write_text("{")
    code, found, _ = screen()
    assert code == 0 and found["self-check"][0].startswith("not readable: ")


def test_a_bug_report_asks_for_the_screen():
    template = ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml"
    assert "Output of `dqrelo doctor`" in template.read_text()
