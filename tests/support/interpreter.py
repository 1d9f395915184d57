# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, where there is no CUDA device: import this before a kernel.

It is wrong in bf16 (triton-lang/triton#11584): float32 and float16 run there.
"""

import importlib
import os

import pytest
from support.deltas import HAS_DEVICE

if not HAS_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
if not HAS_DEVICE and isinstance(tl.sum, triton.JITFunction):
    # Something imported Triton before this file could ask for the interpreter.
    for name, value in vars(importlib.reload(tl.standard)).items():
        if callable(value):
            setattr(tl, name, value)
