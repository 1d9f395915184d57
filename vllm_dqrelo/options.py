# SPDX-License-Identifier: Apache-2.0
"""The plugin's options, and the engine configurations that it refuses."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import psutil
import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from dqrelo_kernels.table import ALIGNMENT, aligned
from vllm_dqrelo.worker.sites import Sites

logger = init_logger(f"vllm.{__name__}")

# vLLM's default for --max-loras is 1, which would serve the deltas one by one.
DEFAULT_MAX_DELTAS = 8
# Without an option, the arena has room for --max-loras deltas of this ratio, and
# the host tier takes this part of the memory that is free once the base is loaded.
DEFAULT_RATIO = 1 / 8
DEFAULT_HOST_PART = 1 / 4
# A slot for each delta of this ratio that the arena can hold. A step looks at all
# slots, of each expert, and at the added tokens of all slots, which sets other limits:
# so many, and so many tokens as a part of the vocabulary.
SMALLEST_RATIO = 1 / 64
MOST_SLOTS = 256
ADDED_PART = 1 / 8
TENSORS = 6  # of a matrix at most: signs, scale, factors, their scale, bias

# Rows from which merging a delta into the base should cost less than a product of its
# own: predicted for an 8B model on an H100 (docs/kernels.md), not measured.
MERGE_ROWS = 768

NGRAM = "ngram"  # drafts from a request's own tokens, for vLLM to check

# Architectures whose deltas tests/test_architectures.py compares with checkpoints.
TESTED_ARCHITECTURES = {
    "GPTNeoXForCausalLM",
    "Gemma3ForCausalLM",
    "Idefics3ForConditionalGeneration",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OPTForCausalLM",
    "Phi3ForCausalLM",
    "PhiForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"dqrelo": {...}}'``.

    Attributes:
        delta_memory_gib: device memory for resident deltas; by default what
            ``--max-loras`` deltas of ratio 1/8 take.
        added_tokens: the most tokens that a delta may add to the base's vocabulary.
        max_rank: the largest sum of a delta's ranks in one layer; q, k and v are one
            layer, and so are gate and up (of one expert). By default what 4-bit
            factors of two bits a weight have. A worker takes 4 bytes for each rank and
            token of a step.
        host_memory_gib: host memory for deltas that are not read from disk again;
            by default a quarter of what is free once the base is loaded. This and the
            memory above are of each worker, which has its part of a delta.
        version: of the plugin, put there by it.
    """

    delta_memory_gib: float | None = None
    added_tokens: int = 0
    max_rank: int | None = None
    host_memory_gib: float | None = None
    version: str = ""

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> "Options":
        """Read and check the options of an engine."""
        given = additional_config.get("dqrelo", {})
        if not isinstance(given, Mapping):
            raise ValueError(f"additional_config's dqrelo is {given!r}, no JSON object")
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"additional_config has unknown dqrelo options {unknown}; known: "
                f"{sorted(known - {'version'})}"
            )
        for name in ("delta_memory_gib", "host_memory_gib"):
            value = given.get(name, 0)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"dqrelo option {name} is {value!r}, expected a number of GiB"
                )
        for name, least in (("added_tokens", 0), ("max_rank", 1)):
            value = given.get(name, least)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"dqrelo option {name} is {value!r}, expected a whole number of "
                    f"{least} or more"
                )
        return cls(**given)

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not the defaults, without the version."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
            and field.name != "version"
        }

    def arena_bytes(self, typical: int, deltas: int) -> int:
        """Size of the arena where a delta of the default ratio takes ``typical``."""
        if self.delta_memory_gib is not None:
            return int(self.delta_memory_gib * 2**30)
        return deltas * typical

    def host_bytes(self, workers: int) -> int:
        """Size of a worker's host tier on this machine, now."""
        if self.host_memory_gib is not None:
            return int(self.host_memory_gib * 2**30)
        return int(psutil.virtual_memory().available * DEFAULT_HOST_PART / workers)

    def typical_bytes(self, sites: Sites) -> int:
        """What a delta of the default ratio takes in the arena."""
        return _delta_bytes(sites, DEFAULT_RATIO)

    def slots(self, sites: Sites, arena: int, max_loras: int) -> int:
        """How many deltas can be resident in an arena of so many bytes."""
        most = [arena // _delta_bytes(sites, SMALLEST_RATIO)]
        most += [MOST_SLOTS // site.experts for site in sites.by_name.values()]
        if self.added_tokens:
            # The LM head computes the added tokens of all slots.
            most += [
                int(site.sizes[0] * ADDED_PART) // self.added_tokens
                for site in sites.by_name.values()
                if site.is_vocabulary
            ]
        return max(max_loras, min(most))

    def ranks(self, sites: Sites) -> int:
        """The largest sum of ranks in one site that is served."""
        if self.max_rank is not None:
            return self.max_rank
        return max(
            typical_rank(site.whole_of_a_row, site.whole_columns)
            for site in sites.by_name.values()
            if site.whole_columns
        )


def typical_rank(sizes: Iterable[int], columns: int) -> int:
    """The sum of the ranks of one layer's matrices, all of ``columns``.

    What factors of 4 bits have in two bits a weight, the default ratio.
    """
    k = columns
    return sum(min(n, k, math.ceil(n * k / 2 / (n + k))) for n in sizes)


def _delta_bytes(sites: Sites, ratio: float) -> int:
    """What a delta of every matrix takes in the arena, at most."""
    total = 0
    for site in sites.by_name.values():
        whole_k = site.whole_columns
        for n, whole_n in zip(site.sizes, site.whole_sizes, strict=True):
            if site.is_vocabulary:  # of which the last worker may have fewer rows
                n = min(site.module.num_embeddings_per_partition, whole_n)
            whole = whole_n, whole_k
            total += slice_bytes(ratio, n, site.columns, whole, site.fully_sharded)
    return total


def slice_bytes(
    ratio: float, n: int, k: int, whole: tuple[int, int], fully_sharded: bool = False
) -> int:
    """What a delta of one matrix and its bias takes in the arena, at most.

    Args:
        ratio: of the delta.
        n, k: rows and columns that a worker has; k is 0 for a norm of n weights.
        whole: rows and columns of the checkpoint's matrix.
        fully_sharded: whether workers share both factors.
    """
    whole_n, whole_k = whole
    total = aligned(4 * n)  # a bias or a norm in float32
    if not k:
        return total
    size, signs = 2 * ratio * whole_n * whole_k, whole_n * whole_k / 8
    factors = size - signs if size > signs else size
    split = n * k / (whole_n * whole_k)
    held = split if fully_sharded else (n + k) / (whole_n + whole_k)
    total += int((size - factors) * split + factors * held)
    # What rounding a rank up and scales for each row may add.
    return total + 2 * (n + k) + 4 * n + TENSORS * ALIGNMENT


def merge_rows(vllm_config: VllmConfig, device: torch.device) -> int | None:
    """From how many rows in a step on a delta's matrices are made whole; None: never.

    Not on the CPU, where vLLM keeps weights in a form that nobody else can read, and
    not in a step that may replay a graph, which cannot tell the one from the other.
    """
    if device.type == "cpu" or envs.VLLM_BATCH_INVARIANT:
        return None
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(MERGE_ROWS, graphs + 1)


def refuse_unsupported(vllm_config: VllmConfig, device: torch.device) -> None:
    """Refuse, at start, what would not be right with deltas."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    drafts = vllm_config.speculative_config
    method = drafts.method if drafts else NGRAM
    problems = {
        f"runs on the CPU only so far, not on {device.type}": device.type != "cpu",
        "splits a model by --tensor-parallel-size and --pipeline-parallel-size only, "
        "not by context parallelism": parallel.world_size
        > parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        or parallel.decode_context_parallel_size > 1,
        "has no mixtures of experts with --enable-expert-parallel or with "
        "--data-parallel-size: a worker's experts would get rows of others": (
            model.is_moe
            and (parallel.enable_expert_parallel or parallel.data_parallel_size > 1)
        ),
        "cannot be used with dual-batch overlap (--enable-dbo, --ubatch-size), which "
        "splits a step's rows": parallel.use_ubatching,
        "cannot be used with --enable-batch-sharded-sampling, which gives the LM head "
        "rows in another order": bool(parallel.enable_batch_sharded_sampling),
        f"has speculative decoding with method {NGRAM} only, not {method}: a draft "
        "model may call layers of the base with rows that are not the step's": (
            method != NGRAM
        ),
        "captures graphs of mixtures of experts in bfloat16 only, and from compute "
        "capability 9.0 on, where torch multiplies all experts in one launch: use "
        "--enforce-eager": model.is_moe
        and device.type == "cuda"
        and not model.enforce_eager
        and not (
            model.dtype == torch.bfloat16 and current_platform.has_device_capability(90)
        ),
        "has no deltas for images or sound: use --limit-mm-per-prompt with 0 for each "
        "kind of input": model.supports_multimodal_inputs,
        "has no deltas for encoder-decoder models": model.is_encoder_decoder,
        "has no deltas for diffusion language models": model.is_diffusion,
        "cannot be used with --enable-prompt-embeds, which passes some rows by the "
        "embedding": model.enable_prompt_embeds,
        "cannot be used with --enable-sleep-mode, which discards the deltas": (
            model.enable_sleep_mode
        ),
        "cannot be used with --weight-transfer-config: deltas belong to one base": (
            vllm_config.weight_transfer_config is not None
        ),
    }
    if found := [problem for problem, present in problems.items() if present]:
        raise ValueError("--quantization dqrelo " + "; it ".join(found))


def warn_untested(vllm_config: VllmConfig) -> None:
    """Say so when nobody has compared deltas of this architecture with fine-tunes."""
    architectures = vllm_config.model_config.architectures
    if TESTED_ARCHITECTURES.isdisjoint(architectures):
        logger.warning(
            "dqrelo: %s is not among the architectures that are tested (%s). Compare "
            "some answers with those of a fine-tune served alone.",
            ", ".join(architectures),
            ", ".join(sorted(TESTED_ARCHITECTURES)),
        )
