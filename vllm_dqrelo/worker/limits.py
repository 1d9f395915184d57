# SPDX-License-Identifier: Apache-2.0
"""What a worker has for deltas: bytes, slots and ranks, from options and sites."""

import torch
from vllm import envs
from vllm.config import VllmConfig

from dqrelo_kernels import ops
from vllm_dqrelo.format.config import DEFAULT_RATIO
from vllm_dqrelo.host_memory import available
from vllm_dqrelo.options import Options
from vllm_dqrelo.room import slice_bytes, typical_rank
from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.sites import ExpertSite, Site, Sites

# Without an option the host tier takes this part of the memory that is free once the
# base is loaded.
DEFAULT_HOST_PART = 1 / 4
# A slot for each delta of this ratio that the arena can hold. A step looks at all
# slots, of each expert, and at the added tokens of all slots, which sets other limits:
# so many, and so many tokens as a part of the vocabulary.
SMALLEST_RATIO = 1 / 64
MOST_SLOTS = 256
ADDED_PART = 1 / 8

# Rows from which merging a delta into the base should cost less than a product of its
# own: predicted for an 8B model on an H100 (docs/kernels.md), not measured.
MERGE_ROWS = 768


def typical_bytes(sites: Sites) -> int:
    """Bytes in the arena of a delta of the default ratio."""
    return _delta_bytes(sites, DEFAULT_RATIO)


def arena_bytes(options: Options, typical: int, deltas: int) -> int:
    """Size of the arena where a delta of the default ratio takes ``typical``."""
    if options.delta_memory_gib is not None:
        return int(options.delta_memory_gib * 2**30)
    return deltas * typical


def host_bytes(options: Options, workers: int) -> int:
    """Size of a worker's host tier on this machine, now."""
    if options.host_memory_gib is not None:
        return int(options.host_memory_gib * 2**30)
    return int(available() * DEFAULT_HOST_PART / workers)


def most_resident(options: Options, sites: Sites, arena: int, max_loras: int) -> int:
    """How many deltas can be resident in an arena of so many bytes."""
    most = [arena // _delta_bytes(sites, SMALLEST_RATIO)]
    most += [MOST_SLOTS // site.experts for site in sites.by_name.values()]
    if options.added_tokens:
        # The LM head computes the added tokens of all slots.
        most += [
            int(site.sizes[0] * ADDED_PART) // options.added_tokens
            for site in sites.by_name.values()
            if site.is_vocabulary
        ]
    return max(max_loras, min(most))


def most_ranks(options: Options, sites: Sites) -> int:
    """The largest sum of ranks in one site that is served."""
    if options.max_rank is not None:
        return options.max_rank
    return max(
        typical_rank(site.whole_of_a_row, site.whole_columns)
        for site in sites.by_name.values()
        if site.whole_columns
    )


def is_linear(site: Site) -> bool:
    """Whether a site is a linear layer that sees the rows of all tokens."""
    if site.is_vocabulary or isinstance(site, ExpertSite):
        return False
    return hasattr(site.module, "quant_method")


def merge_rows(
    vllm_config: VllmConfig, device: torch.device, sites: Sites
) -> int | None:
    """From how many rows in a step on a delta's matrices are made whole; None: never.

    Not on the CPU, where vLLM keeps weights in a form that nobody else can read, and
    not in a step that may replay a graph, which cannot tell the one from the other. All
    linear layers of a model are merged or none is, because all see the same rows:
    none in a base with a quantised layer, nor where workers share both factors.
    """
    if device.type == "cpu" or envs.VLLM_BATCH_INVARIANT:
        return None
    for site in filter(is_linear, sites.by_name.values()):
        plain = compat.multiplies_by_weight(site.module.quant_method)
        if site.fully_sharded or not plain:
            return None
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(MERGE_ROWS, graphs + 1)


def whole_bytes(sites: Sites, rows: int | None) -> int:
    """Bytes for the largest matrix that is made whole.

    Args:
        rows: what ``merge_rows`` returned.
    """
    linears = filter(is_linear, sites.by_name.values()) if rows else ()
    return max((ops.whole_bytes(site.module.weight) for site in linears), default=0)


def _delta_bytes(sites: Sites, ratio: float) -> int:
    """Bytes in the arena of a delta of every matrix, at most."""
    total = 0
    for site in sites.by_name.values():
        whole_k = site.whole_columns
        for n, whole_n in zip(site.sizes, site.whole_sizes, strict=True):
            if site.is_vocabulary:  # of which the last worker may have fewer rows
                n = min(site.module.num_embeddings_per_partition, whole_n)
            whole = whole_n, whole_k
            total += slice_bytes(ratio, n, site.columns, whole, site.fully_sharded)
    return total
