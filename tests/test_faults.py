# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, forbidden or cut short, workers that are killed: what users see.

docs/reliability.md has the table.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.engines import free

from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError

BIN = Path(sys.executable).parent
WEIGHTS = "delta_model.safetensors"


def limit(size):
    """For a new process: no file may be larger, as on a disk that is full."""

    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return apply


def refused_to_write(family, tmp_path, size) -> list[str]:
    """A conversion on such a disk; what is left of it."""
    made, output = family("llama"), tmp_path / "delta"
    command = [sys.executable, "-m", "dqrelo_tools.cli", "convert"]
    command += ["--base", made.base, "--model", made.models[0], "--output", output]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, preexec_fn=limit(size)
    )
    assert done.returncode == 1
    assert "delta is full; nothing was written" in done.stderr
    assert "Traceback" not in done.stderr
    left = [path.name for path in tmp_path.iterdir()]
    assert bool(left) == ("are kept in" in done.stderr)
    return left


@pytest.mark.slow
def test_the_disk_is_full(family, tmp_path):
    """While parameters are kept, and while the delta is put together."""
    whole = (family("llama").deltas[0] / WEIGHTS).stat().st_size
    assert refused_to_write(family, tmp_path, 300) == []
    assert refused_to_write(family, tmp_path, whole - 1) == [".delta.parts"]


def test_files_that_must_not_be_read(family, tmp_path, monkeypatch):
    """As for another user's; the tests may run as root, who may read everything."""
    folder = shutil.copytree(family("llama").deltas[0], tmp_path / "delta")
    opened = os.open

    def forbidden(path, *arguments, **options):
        if Path(path).name == forbidden.name:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", forbidden)
    for forbidden.name in (WEIGHTS, "delta_config.json"):
        with pytest.raises(DqreloError, match=r"cannot be read: Permission denied"):
            Delta(folder)


def test_a_file_that_is_cut_short_while_it_is_read(family, tmp_path):
    """A mapped file would end the process here."""
    folder = shutil.copytree(family("llama").deltas[0], tmp_path / "delta")
    delta = Delta(folder)
    delta.check_unchanged()
    half = (folder / WEIGHTS).stat().st_size // 2
    os.truncate(folder / WEIGHTS, half)
    with pytest.raises(DqreloError, match="was cut short while it was read"):
        [delta.matrix(name) for name in delta.matrices]
    with pytest.raises(DqreloError, match="was changed while it was read"):
        delta.check_unchanged()
    with pytest.raises(DqreloError, match=f"it should have .* bytes, but has {half}"):
        Delta(folder)


def test_a_file_that_is_replaced_while_it_is_read(family, tmp_path):
    """What was opened is read to its end: never half of each."""
    made = family("llama")
    folder = shutil.copytree(made.deltas[0], tmp_path / "delta")
    expected, delta = Delta(made.deltas[0]), Delta(folder)
    shutil.copy(made.deltas[1] / WEIGHTS, tmp_path / "other")
    (tmp_path / "other").replace(folder / WEIGHTS)
    for name in delta.matrices:
        assert (delta.matrix(name).dense() == expected.matrix(name).dense()).all()
    delta.check_unchanged()
    with pytest.raises(DqreloError, match="was changed after it was written"):
        Delta(folder)


@pytest.mark.vllm
def test_a_file_that_is_cut_short_after_it_was_registered(
    family, engine, load, sampling, alone, difference, answers, prompts, tmp_path
):
    """Its requests fail with the reason; the others are answered."""
    pytest.importorskip("vllm")
    made = family("llama")
    folders = [shutil.copytree(d, tmp_path / d.name) for d in made.deltas]
    llm = engine(made.base, quantization="dqrelo")
    for i, folder in enumerate(folders):
        load(llm, f"delta-{i}", folder)
    sizes = llm.llm_engine.engine_core.engine_core.scheduler.deltas.sizes.values()
    room = sum(sorted(sizes)[-2:]) + 128  # not for all three
    del llm
    options = {"delta_memory_gib": room / 2**30, "host_memory_gib": 0}
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=2,
        additional_config={"dqrelo": options},
    )
    requests = [load(llm, f"delta-{i}", folder) for i, folder in enumerate(folders)]
    for i in (0, 1, 2):  # the last makes the first disappear
        answers(llm, prompts[:1], [requests[i]])
    load(llm, "again", folders[1])  # the end of a load drops what has no room
    os.truncate(folders[0] / WEIGHTS, (folders[0] / WEIGHTS).stat().st_size - 1)
    output = llm.generate(
        [{"prompt_token_ids": prompts[0]}] * 2,
        sampling(),
        lora_request=[requests[0], requests[1]],
        use_tqdm=False,
    )
    assert output[0].outputs[0].finish_reason == "error"
    assert "it should have" in output[0].outputs[0].stop_reason
    got = answers(llm, prompts, [None, requests[1], requests[2], requests[1]])
    expected = alone("llama")
    for i, model in enumerate((0, 2, 3, 2)):
        assert difference(got[i][:2] + ([],), expected[model][i]) <= 1e-4
    del llm
    free()


@pytest.mark.vllm
@pytest.mark.slow
def test_a_worker_is_killed(family, server, tmp_path):
    """Requests in flight are answered with an error, and the server ends: no half life.

    Whoever runs the server starts it again, as for vLLM alone.
    """
    pytest.importorskip("vllm")
    made, seen = family("llama"), {}
    command = [BIN / "dqrelo", "serve", made.base, "--served-model-name", "base"]
    command += ["--delta", f"one={made.deltas[0]}"]
    with server(command, tmp_path / "log", dies=True) as url:
        body = b'{"model": "one", "prompt": [1], "max_tokens": 100, "stream": true}'
        request = urllib.request.Request(
            f"{url}/v1/completions", body, {"Content-Type": "application/json"}
        )
        processes = psutil.Process().children(recursive=True)
        (worker,) = [p for p in processes if p.name().startswith("VLLM::Worker")]
        worker.suspend()  # the request is in flight until it is killed
        with urllib.request.urlopen(request, timeout=600) as answer:
            worker.kill()
            seen["stream"] = answer.read().decode()
        with pytest.raises((urllib.error.URLError, OSError)) as error:
            while True:
                urllib.request.urlopen(f"{url}/health", timeout=600).close()
                time.sleep(0.1)
    assert (
        not isinstance(error.value, urllib.error.HTTPError) or error.value.code == 503
    )
    assert "error" in seen["stream"], seen
