# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("vllm_dqrelo", "kernels", "tools", "tests", "benchmarks", "examples", ".ci")


def imported_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after ``statement``."""
    code = f"{statement}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return {line.split(".")[0] for line in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import vllm_dqrelo", {"vllm", "torch", "triton"}),
        ("import dqrelo_tools.cli", {"vllm", "triton"}),
        ("import dqrelo_tools.convert, dqrelo_tools.verify", {"vllm", "transformers"}),
        ("import dqrelo_kernels.ops", {"vllm", "vllm_dqrelo", "dqrelo_tools"}),
        ("import vllm_dqrelo.format.delta", {"vllm", "dqrelo_tools"}),
    ],
)
def test_imports_are_light_and_point_one_way(statement, forbidden):
    assert not imported_by(statement) & forbidden


def test_no_name_that_belongs_to_others():
    """A top-level ``kernels`` package breaks transformers and vLLM."""
    for folder in ("kernels", "tools"):
        assert not (ROOT / folder / "__init__.py").exists()
    for folder in ("tests", "benchmarks"):
        assert not list((ROOT / folder).glob("**/kernels"))


def test_entry_points():
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="dqrelo")
    assert plugin.value == "vllm_dqrelo:register" and callable(plugin.load())
    group = "vllm.endpoint_plugins"
    (endpoints,) = metadata.entry_points(group=group, name="dqrelo_endpoints")
    assert endpoints.value == "vllm_dqrelo.frontend.endpoints:DeltaEndpoints"
    (command,) = metadata.entry_points(group="console_scripts", name="dqrelo")
    assert command.value == "dqrelo_tools.cli:main"


def test_the_wheel_holds_the_three_packages(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"vllm_dqrelo", "dqrelo_kernels", "dqrelo_tools"}
    sources = {
        str(path.relative_to(ROOT / root))
        for root, package in [
            (".", "vllm_dqrelo"),
            ("kernels", "dqrelo_kernels"),
            ("tools", "dqrelo_tools"),
        ]
        for path in (ROOT / root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= set(names)


def test_every_source_has_its_licence_line():
    for pattern in ("**/*.py", "**/*.cpp", "**/*.h"):
        for folder in FOLDERS:
            for path in (ROOT / folder).glob(pattern):
                head = path.read_text()[:60]
                assert "SPDX-License-Identifier: Apache-2.0" in head, path
