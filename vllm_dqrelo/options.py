# SPDX-License-Identifier: Apache-2.0
"""The plugin's options, and the engine configurations that it refuses."""

import math
from dataclasses import dataclass, fields

import torch
from vllm.config import VllmConfig

from dqrelo_kernels.table import ALIGNMENT
from vllm_dqrelo.arena import aligned
from vllm_dqrelo.sites import Sites

# Without an option, the arena has room for --max-loras deltas of this ratio.
DEFAULT_RATIO = 1 / 8
TENSORS = 6  # of a matrix at most: signs, scale, factors, their scale, bias


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"dqrelo": {...}}'``.

    Attributes:
        delta_memory_gib: device memory for resident deltas; by default what
            ``--max-loras`` deltas of ratio 1/8 take.
        added_tokens: the most tokens that a delta may add to the base's vocabulary.
        version: of the plugin, put there by it.
    """

    delta_memory_gib: float | None = None
    added_tokens: int = 0
    version: str = ""

    @classmethod
    def from_config(cls, vllm_config: VllmConfig) -> "Options":
        """Read and check the options of an engine."""
        given = vllm_config.additional_config.get("dqrelo", {})
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"additional_config has unknown dqrelo options {unknown}; known: "
                f"{sorted(known - {'version'})}"
            )
        return cls(**given)

    def arena_bytes(self, sites: Sites, slots: int) -> int:
        """Size of the arena for a model with these sites."""
        if self.delta_memory_gib is not None:
            return int(self.delta_memory_gib * 2**30)
        total = 0
        for site in sites.by_name.values():
            for n in site.sizes:
                total += aligned(4 * n)  # a bias or a norm in float32
                if k := site.columns:
                    # What rounding a rank up and scales for each row may add.
                    total += int(2 * DEFAULT_RATIO * n * k) + 2 * (n + k) + 4 * n
                    total += TENSORS * ALIGNMENT
        return slots * total

    def scratch_ranks(self, sites: Sites) -> int:
        """The largest sum of ranks in one site that is served.

        What factors of 4 bits have in two bits a weight, twice the default.
        """
        return max(
            sum(min(n, k, math.ceil(n * k / 2 / (n + k))) for n in site.of_a_row)
            for site in sites.by_name.values()
            if (k := site.columns)
        )


def refuse_unsupported(vllm_config: VllmConfig, device: torch.device) -> None:
    """Refuse, at start, what would not be right with deltas."""
    parallel = vllm_config.parallel_config
    problems = {
        f"runs on the CPU only so far, not on {device.type}": device.type != "cpu",
        "cannot split a model over several workers yet: use --tensor-parallel-size 1 "
        "and --pipeline-parallel-size 1": parallel.world_size > 1,
        "cannot be used with speculative decoding": vllm_config.speculative_config
        is not None,
        "has mixtures of experts on the CPU only": vllm_config.model_config.is_moe
        and device.type != "cpu",
    }
    if found := [problem for problem, present in problems.items() if present]:
        raise ValueError("--quantization dqrelo " + "; it ".join(found))
