# SPDX-License-Identifier: Apache-2.0
"""Every op against float64, for each distinct shape of the served model."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from dqrelo_kernels.table import INT4
from vllm_dqrelo.worker.packed import pack
from vllm_dqrelo.worker.self_check.cases import Case, Embedding, Linear, Norm
from vllm_dqrelo.worker.self_check.report import Report
from vllm_dqrelo.worker.self_check.synthetic import Kind, Named, Synthetic, by_site
from vllm_dqrelo.worker.sites import Site

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

# Two deltas share each step. Every factor dtype, zero to two planes.
KINDS = (
    (Kind(1, 40, INT4), Kind(0, 18, torch.bfloat16)),
    (Kind(2, 34, torch.int8), Kind(1, 16, torch.float16)),
    (Kind(0, 66, INT4), Kind(1, 24, torch.float32)),
)
# Kernels choose by the number of rows: tiles of 16 and of 256, merged from 768 on.
ROWS = {
    "cuda": (1, 15, 17, 256, 257, 768),
    "cpu": (1, 5, 40),
}
MOST_OUTPUTS = 2**27  # of a step, for want of memory beside the KV cache
COMPILES = (1, 17, 768)  # rows that take each variant of the kernels


def check_ops(manager: "DeltaManager", report: Report, *, brief: bool = False) -> None:
    """Call the ops of one site of each shape, with the worker's own buffers.

    Args:
        manager: without deltas. Mutated: deltas come and go.
        report: takes the errors. Mutated.
        brief: only what compiles each variant of the kernels.
    """
    parameters = by_site(manager)
    for site in _distinct(manager):
        for kinds in KINDS:
            _check_site(manager, site, parameters[site.name], kinds, brief, report)


def _distinct(manager: "DeltaManager") -> Iterator[Site]:
    """One site of each shape and kind."""
    seen = set()
    for site in manager.sites.by_name.values():
        method = getattr(site.module, "quant_method", None)
        key = (
            type(site.module),
            site.experts,
            (site.sizes, site.columns, site.whole_sizes, site.whole_columns),
            (site.fully_sharded, getattr(method, "merges", None)),
        )
        if key not in seen:
            seen.add(key)
            yield site


def _check_site(
    manager: "DeltaManager",
    site: Site,
    parameters: list[Named],
    kinds: tuple[Kind, ...],
    brief: bool,
    report: Report,
) -> None:
    most = manager.memory.rank // len(site.of_a_row) // 2 * 2
    names = sorted({name for name, _ in parameters})
    deltas = [
        Synthetic(f"self-check {i}", manager.base, names, kind.limited(most))
        for i, kind in enumerate(kinds[: manager.max_loras])
    ]
    packed = [
        pack(delta, manager.sites, manager.device, manager.unlike) for delta in deltas
    ]
    if sum(one.size for one in packed) > manager.memory.arena:
        report.left_out.append(f"{site.name} does not fit delta_memory_gib")
        return
    for one in packed:
        manager.host.put(one)
    digests = [one.digest for one in packed]
    slots = manager.residency.use(digests)
    case = _case_of(site)(
        manager, site, parameters, deltas, [slots[digest] for digest in digests], report
    )
    most = min(manager.max_tokens, MOST_OUTPUTS // (sum(site.of_a_row) or 1))
    rows = {*(COMPILES if brief else ROWS[manager.device.type])}
    if manager.device.type == "cuda":
        rows.add(most)
    for m in sorted(rows):
        if m <= most:
            case.check(m)
    if has_graphs(manager.device) and not brief and kinds is KINDS[0]:
        case.check_graph(min(16, most))
    for digest in digests:
        manager.forget(digest)


def has_graphs(device: torch.device) -> bool:
    """Whether vLLM captures graphs there."""
    return device.type == "cuda"


def _case_of(site: Site) -> type[Case]:
    if site.is_norm:
        return Norm
    looks_up = site.is_vocabulary and not isinstance(site.module, ParallelLMHead)
    if looks_up or not hasattr(site.module, "quant_method"):
        return Embedding
    return Linear
