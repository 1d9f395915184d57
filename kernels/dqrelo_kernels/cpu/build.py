# SPDX-License-Identifier: Apache-2.0
"""The ops on the CPU, in native code that is built at first use.

``ops.cpp`` is compiled for this machine with the C++ compiler that vLLM's CPU build
needs anyway, once, into a cache folder; without a compiler the ops are computed in
plain torch, 5 to 200 times slower (benchmarks/results/cpu.csv), which one warning says.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCES = (FOLDER / "ops.cpp", *sorted(FOLDER.glob("*.h")))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
TORCH = Path(torch.__file__).parent


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native code, built if need be; None when torch must do.

    From then on torch calls the ops of ops.cpp by itself.

    Environment: ``DQRELO_NATIVE=0`` asks for torch; ``CXX`` names the compiler.
    """
    if os.environ.get("DQRELO_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "dqrelo: deltas are computed in plain torch, many times slower, "
            "because native code is missing: %s",
            getattr(error, "stderr", None) or error,
        )
        return None
    if not loaded.dqrelo_prepare():
        logger.warning(
            "dqrelo: deltas are computed in plain torch, many times slower: the "
            "system does not let this process use the CPU's matrix unit (AMX)"
        )
        return None
    if not loaded.dqrelo_register():
        raise RuntimeError("torch does not take the native ops of dqrelo")
    return loaded


def reset() -> None:
    """Back to the ops in Python, until ``library`` is asked for again."""
    if library.cache_info().currsize and (loaded := library()):
        loaded.dqrelo_unregister()
    library.cache_clear()


def build() -> Path:
    """Compile ops.cpp for this machine, unless that was done before; the library.

    Raises:
        RuntimeError: a compiler is missing. subprocess.CalledProcessError: it failed.
    """
    command, built = plan()
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        scratch = built.with_suffix(f".{os.getpid()}")
        command[1:1] = [str(SOURCES[0]), "-o", str(scratch)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        scratch.rename(built)
    return built


def plan() -> tuple[list[str], Path]:
    """The compiler with its options, and the library that it builds.

    The name of the library is a digest of the sources, the compiler and the CPU: a
    cache folder that several machines share never holds the wrong instructions.

    Raises:
        RuntimeError: a compiler is missing. subprocess.CalledProcessError: it failed.
    """
    candidates = (os.environ.get("CXX"), "g++", "c++", "clang++")
    compiler = next((c for c in candidates if c and shutil.which(c)), None)
    if compiler is None:
        raise RuntimeError("a C++ compiler is missing; install g++ or set CXX")
    command = [compiler, *FLAGS, f"-I{TORCH / 'include'}", *libraries_of_torch()]
    key = hashlib.sha256("\n".join([*command, torch.__version__]).encode())
    key.update(macros(compiler))
    for source in SOURCES:
        key.update(source.read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return command, cache / "vllm-dqrelo" / f"cpu-{key.hexdigest()[:16]}.so"


@functools.cache
def macros(compiler: str) -> bytes:
    """The macros by which a compiler describes this CPU; asked for once a process."""
    command = [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull]
    return subprocess.run(command, check=True, capture_output=True).stdout


def libraries_of_torch() -> list[str]:
    """For the linker: torch, and its own OpenMP (two would fight for the cores)."""
    folder = TORCH / "lib"
    found = [folder / "libtorch_cpu.so", *sorted(folder.glob("libgomp*.so*"))[:1]]
    return [str(path) for path in found]
