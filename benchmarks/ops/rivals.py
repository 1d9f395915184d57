# SPDX-License-Identifier: Apache-2.0
"""What else could compute the deltas of a linear layer, or take their place.

Each function takes a site and the arguments of a step and returns what is to be timed.
Others' raise ImportError where their package is not there; BitDelta's is used from
where PYTHONPATH finds it.
"""

import numpy as np
import torch

from benchmarks.ops.device import DEVICE, DTYPE, Launch
from benchmarks.ops.linear_site import Site
from dqrelo_kernels.ops import whole_bytes

Step = dict[str, torch.Tensor]


def base_gemm(site: Site, step: Step) -> Launch:
    """The base's own product of all rows: what a step costs without any delta."""
    weight = torch.randn(site.n, site.k, dtype=DTYPE, device=DEVICE)
    return lambda: torch.nn.functional.linear(step["x"], weight)


def dense(site: Site, step: Step) -> Launch:
    """A dense product for each delta: what N models that are kept whole would do."""
    count = len(site.table)
    weights = torch.randn(count, site.n, site.k, dtype=DTYPE, device=DEVICE)
    x = step["x"].view(-1, count, site.k).unbind(1)

    def run() -> None:
        for rows, weight in zip(x, weights, strict=True):
            torch.nn.functional.linear(rows, weight)

    return run


def loop(site: Site, step: Step) -> Launch:
    """Our own op, once for each delta."""
    slots = np.arange(len(step["x"]), dtype=np.int32) % len(site.table)
    calls = []
    for slot in range(len(site.table)):
        groups = site.groups(np.where(slots == slot, slot, -1), None)
        own = {name: getattr(groups, name) for name in ("rows", "slots", "starts")}
        calls.append({**step, **own, "num_active": groups.num_active})

    def run() -> None:
        for call in calls:
            torch.ops.dqrelo.delta_linear_(**call)

    return run


def merged(site: Site, step: Step) -> Launch:
    """The base's product and the deltas' in one, with matrices that are made for it."""
    weight = torch.randn(site.n, site.k, dtype=DTYPE, device=DEVICE)
    slots = np.arange(len(step["x"]), dtype=np.int32) % len(site.table)
    groups = site.groups(slots, 1)
    own = ("rows", "slots", "starts", "num_active", "unmerged", "merged")
    shared = ("x", "scratch", "arena", "table", "slices")
    call = {name: step[name] for name in shared}
    call |= {name: getattr(groups, name) for name in own}
    whole = torch.empty(whole_bytes(weight), dtype=torch.uint8, device=DEVICE)
    call |= {"weight": weight, "bias": None, "whole": whole}
    return lambda: torch.ops.dqrelo.linear(**call)


def lora(site: Site, step: Step) -> Launch:
    """vLLM's LoRA kernels at as many bytes, ranks in sixteens."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    m, count, slices = len(step["x"]), len(site.table), len(site.sizes)
    rank = site.bytes_per_delta / (2 * (site.n + slices * site.k))
    rank = 16 * max(1, round(rank / 16))

    def factors(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(count, 1, rows, columns, dtype=DTYPE, device=DEVICE)

    a = [factors(rank, site.k) for _ in site.sizes]
    b = [factors(size, rank) for size in site.sizes]
    meta = LoRAKernelMeta.make(count, m, device=DEVICE)
    meta.prepare_tensors(torch.arange(m, device=DEVICE) % count)
    arguments = meta.meta_args(m, False)
    buffer = torch.empty(slices, m, rank, device=DEVICE)

    def run() -> None:
        buffer.zero_()
        lora_shrink(step["x"], a, buffer, *arguments, 1.0)
        lora_expand(buffer, b, step["y"], *arguments, 0, True)

    return run


def bitdelta(site: Site, step: Step) -> Launch:
    """BitDelta's kernel: a plane of signs and nothing else, float16."""
    from bitdelta.binary_gemm_kernel import binary_bmm

    count = len(site.table)
    x = step["x"].view(-1, count, site.k).transpose(0, 1).half().contiguous()
    shape = (count, site.k // 32, site.n)
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, device=DEVICE)
    return lambda: binary_bmm(x, words)


RIVALS = (base_gemm, dense, loop, merged, lora, bitdelta)
