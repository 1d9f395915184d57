# SPDX-License-Identifier: Apache-2.0
"""What the kernels are timed on: a GPU; or a CPU, in Triton's interpreter.

The interpreter shows that a benchmark runs; its times show nothing. It is right in
float16 and wrong in bfloat16.
"""

import os
import statistics
import time
from collections.abc import Callable

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float16
NAME = torch.cuda.get_device_name() if HAS_GPU else "a CPU, interpreted"
Launch = Callable[[], object]
_library: list[torch.library.Library] = []  # it computes while it lives


def interpret() -> None:
    """Where there is no GPU, have the interpreted kernels compute the ops from now on.

    Call this before the import of a kernel.
    """
    if not HAS_GPU:
        os.environ |= {"TRITON_INTERPRET": "1", "DQRELO_NATIVE": "0"}
        from dqrelo_kernels import ops

        _library.append(torch.library.Library("dqrelo", "IMPL"))
        ops.use_launchers("CPU", _library[-1])


def median_us(launch: Launch, repeats: int) -> float:
    """Median time of ``launch``: with a cold L2, replayed from a CUDA graph."""
    launch()
    if not HAS_GPU:
        return 1e6 * statistics.median(seconds(launch) for _ in range(repeats))
    flush = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
    ]
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in events)


def seconds(launch: Launch) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


def copy_bytes_per_s(repeats: int) -> float:
    """Bytes that a copy of 1 GiB (on a CPU 1 MiB) reads and writes in a second."""
    size = 2**30 if HAS_GPU else 2**20
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    us = median_us(lambda: target.copy_(source), repeats)
    return 2 * source.nbytes / us * 1e6
