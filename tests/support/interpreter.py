# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, where there is no CUDA device: import this before a kernel.

It is wrong in bf16 (triton-lang/triton#11584): float32 and float16 run there.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.deltas import HAS_DEVICE

from dqrelo_kernels import ops
from dqrelo_kernels.cpu import build as cpu

if not HAS_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not HAS_DEVICE and isinstance(tl.sum, triton.JITFunction):
    # Something imported Triton before this file could ask for the interpreter.
    for name, value in vars(importlib.reload(tl.standard)).items():
        if callable(value):
            setattr(tl, name, value)


SKIPPED = pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device")
BFLOAT16 = pytest.param(torch.bfloat16, marks=(pytest.mark.gpu, SKIPPED))
DTYPES = [torch.float32, torch.float16, BFLOAT16]


@contextmanager
def launchers() -> Iterator[None]:
    """Have Triton's launchers compute the ops on CPU tensors, as they do on a GPU.

    Deltas must lie row by row, as on a GPU: ``packed._Extent.side_by_side`` is False.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DQRELO_NATIVE", "0")
        cpu.reset()
        with torch.library._scoped_library("dqrelo", "IMPL") as library:
            ops.use_launchers("CPU", library)
            yield
    cpu.reset()
