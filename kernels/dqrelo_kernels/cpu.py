# SPDX-License-Identifier: Apache-2.0
"""The ops on the CPU, in native code that is built at first use.

``cpu.cpp`` is compiled for this machine with the C++ compiler that vLLM's CPU build
needs anyway, once, into a cache folder; without a compiler the ops are computed in
plain torch, several times slower, which one warning says.
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

SOURCES = (
    "cpu.cpp",
    *(f"cpu_{p}.h" for p in ("amx", "lanes", "linear", "table", "tiles")),
)
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_P, _I, _L, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
# fmt: off
SIGNATURES = {
    "dqrelo_linear": [_P, _L, _I, _P, _L, _I, _I, _P, _P, _I, _I, _P, _P, _P, _I],
    "dqrelo_embedding": [_P, _L, _I, _P, _I, _I, _I, _P, _P, _P, _P, _I, _I],
    "dqrelo_norm": [
        _P, _L, _L, _I, _P, _L, _L, _I, _I, _I, _P, _P, _P, _P, _I, _F, _I, _I,
    ],
}
# fmt: on


@functools.cache
def library() -> ctypes.CDLL | None:
    """The native code, built if need be; None when torch must do.

    Environment: ``DQRELO_NATIVE=0`` asks for torch; ``CXX`` names the compiler.
    """
    if os.environ.get("DQRELO_NATIVE", "1") == "0":
        return None
    try:
        loaded = ctypes.CDLL(str(build()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(
            "dqrelo: deltas are computed in plain torch, several times slower, for "
            "want of native code: %s",
            getattr(error, "stderr", None) or error,
        )
        return None
    if not loaded.dqrelo_prepare():
        logger.warning("dqrelo: this process may not use what its CPU has; using torch")
        return None
    for name, types in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = types, None
    return loaded


def build() -> Path:
    """Compile cpu.cpp for this machine, unless that was done before; the library.

    The name of the file tells the sources, the compiler and the CPU, so that a cache
    folder which several machines share never holds the wrong instructions.

    Raises:
        RuntimeError: no compiler. subprocess.CalledProcessError: it failed.
    """
    candidates = (os.environ.get("CXX"), "g++", "c++", "clang++")
    compiler = next((c for c in candidates if c and shutil.which(c)), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler; install g++ or set CXX")
    command = [compiler, *FLAGS, *openmp_of_torch()]
    key = hashlib.sha256("\n".join(command).encode())
    target = [compiler, "-march=native", "-E", "-dM", "-x", "c++", os.devnull]
    key.update(subprocess.run(target, check=True, capture_output=True).stdout)
    folder = Path(__file__).parent
    for source in SOURCES:
        key.update((folder / source).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = cache / "vllm-dqrelo"
    built = cache / f"cpu-{key.hexdigest()[:16]}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = built.with_suffix(f".{os.getpid()}")
        command[1:1] = [str(folder / SOURCES[0]), "-o", str(scratch)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        scratch.rename(built)
    return built


def openmp_of_torch() -> list[str]:
    """Torch's own OpenMP library, for the linker: two would fight for the cores."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(found[0])] if found else []


def delta_linear_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    slices: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
) -> None:
    """See ``ops.delta_linear_``."""
    native(y, x).dqrelo_linear(
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
        x.data_ptr(),
        x.stride(0),
        DTYPES[x.dtype],
        x.shape[1],
        arena.data_ptr(),
        table.data_ptr(),
        table.shape[0],
        table.shape[1],
        slices.data_ptr(),
        rows.data_ptr(),
        starts.data_ptr(),
        torch.get_num_threads(),
    )


def delta_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    vocab: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
) -> None:
    """See ``ops.delta_embedding_``."""
    ids = ids.contiguous()
    native(y).dqrelo_embedding(
        y.data_ptr(),
        y.stride(0),
        DTYPES[y.dtype],
        ids.data_ptr(),
        ids.element_size(),
        y.shape[1],
        int(vocab[1]),
        arena.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        slots.data_ptr(),
        len(rows),
        torch.get_num_threads(),
    )


def delta_norm_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    slots: torch.Tensor,
    eps: float,
    centred: bool,
) -> None:
    """See ``ops.delta_norm_``."""
    inner = y.shape[1] if y.ndim == 3 else 1
    native(y, x).dqrelo_norm(
        y.data_ptr(),
        y.stride(0),
        y.stride(1) if y.ndim == 3 else 0,
        DTYPES[y.dtype],
        x.data_ptr(),
        x.stride(0),
        x.stride(1) if x.ndim == 3 else 0,
        DTYPES[x.dtype],
        inner,
        y.shape[-1],
        arena.data_ptr(),
        table.data_ptr(),
        rows.data_ptr(),
        slots.data_ptr(),
        len(rows),
        eps,
        centred,
        torch.get_num_threads(),
    )


def native(*tensors: torch.Tensor) -> ctypes.CDLL:
    """The library, once it is sure that it can read these activations."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES or tensor.stride(-1) != 1:
            raise TypeError(
                f"{tensor.dtype} with strides {tensor.stride()}: expected float32, "
                "bfloat16 or float16, the elements of a row side by side"
            )
    loaded = library()
    assert loaded is not None, "ask library() first"
    return loaded
