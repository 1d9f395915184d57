# SPDX-License-Identifier: Apache-2.0
"""What deltas are right with: engine configurations, dtypes and architectures."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_dqrelo.format.tensor_file import text_of
from vllm_dqrelo.options import Options

logger = init_logger(f"vllm.{__name__}")

# Drafts from a request's own tokens, of a model of its own, and of heads that share the
# embedding and the LM head of the base (worker/drafter.py).
HEADS = ("eagle", "eagle3")
DRAFTS = ("ngram", "draft_model", *HEADS)

# Architectures whose deltas tests/test_architectures.py and tests/test_images.py
# compare with checkpoints.
TESTED_ARCHITECTURES = {
    "GPTNeoXForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
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


def refuse_unsupported(vllm_config: VllmConfig, device: torch.device) -> None:
    """Refuse, at start, what would not be right with deltas."""
    if problems := list(_problems(vllm_config, device)):
        raise ValueError("--quantization dqrelo " + "; it ".join(problems))


def device_problem(kind: str) -> str | None:
    """Why a kind of device, "cpu" or "cuda", cannot serve; None if it can."""
    if kind not in ("cpu", "cuda"):
        return f"runs on CPUs and on NVIDIA GPUs, not on {kind}"
    if kind == "cuda" and torch.version.hip:  # torch's name of AMD's, too
        return "does not run on AMD GPUs: its kernels have instructions of NVIDIA's"
    return None


def _problems(vllm_config: VllmConfig, device: torch.device) -> Iterator[str]:
    """Each reason, a sentence without its subject."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    if problem := device_problem(device.type):
        yield problem
    split = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.world_size > split or parallel.decode_context_parallel_size > 1:
        yield (
            "splits a model by --tensor-parallel-size and --pipeline-parallel-size "
            "only, not by context parallelism"
        )
    if model.is_moe and (
        parallel.enable_expert_parallel or parallel.data_parallel_size > 1
    ):
        yield (
            "does not serve mixtures of experts with --enable-expert-parallel or with "
            "--data-parallel-size: a worker's experts would get rows of others"
        )
    if parallel.use_ubatching:
        yield (
            "cannot be used with dual-batch overlap (--enable-dbo, --ubatch-size), "
            "which splits a step's rows"
        )
    if parallel.enable_batch_sharded_sampling:
        yield (
            "cannot be used with --enable-batch-sharded-sampling, which gives the LM "
            "head rows in another order"
        )
    drafts = vllm_config.speculative_config
    if drafts and drafts.method not in DRAFTS:
        yield (
            f"has speculative decoding with the methods {', '.join(DRAFTS)} only, not "
            f"{drafts.method}, which was not tested with deltas"
        )
    added = Options.of(vllm_config.additional_config).added_tokens
    if drafts and drafts.method != "ngram" and added:
        yield (
            f"cannot draft with method {drafts.method} for deltas with added tokens "
            f"(added_tokens is {added}), which the draft model does not know: use "
            "method ngram, or leave these deltas to another server"
        )
    if drafts and drafts.method in HEADS and model.is_multimodal_model:
        yield (
            f"drafts with method {drafts.method} for text models only: use method "
            "ngram or draft_model"
        )
    if drafts and drafts.method in HEADS and parallel.pipeline_parallel_size > 1:
        yield (
            f"cannot draft with method {drafts.method} and --pipeline-parallel-size: "
            "use method ngram or draft_model"
        )
    if (
        model.is_moe
        and device.type == "cuda"
        and not model.enforce_eager
        and not (
            model.dtype == torch.bfloat16 and current_platform.has_device_capability(90)
        )
    ):
        yield (
            "captures graphs of mixtures of experts in bfloat16 only, and from compute "
            "capability 9.0 on, where torch multiplies all experts in one launch: use "
            "--enforce-eager"
        )
    if model.is_encoder_decoder:
        yield "does not serve encoder-decoder models"
    if model.is_diffusion:
        yield "does not serve diffusion language models"
    if model.enable_sleep_mode:
        yield "cannot be used with --enable-sleep-mode, which discards the deltas"
    if vllm_config.weight_transfer_config is not None:
        yield (
            "cannot be used with --weight-transfer-config: deltas belong to one base"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield (
            "cannot be used with --kv-sharing-fast-prefill, which gives some layers "
            "only some of a step's rows"
        )
    offload = vllm_config.offload_config
    if offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0:
        yield (
            "cannot offload weights (--cpu-offload-gb, --offload-group-size): it calls "
            "layers while their weights are elsewhere"
        )
    if getattr(drafts, "enable_adaptive_verification", False):
        yield (
            "cannot be used with enable_adaptive_verification, which moves drafts from "
            "one request to another on the device"
        )
    if model.runner_type == "pooling":
        yield "serves models that generate text, not --runner pooling"
    elif model.head_dtype != model.dtype:
        yield f"computes the LM head in --dtype, not in head_dtype {model.head_dtype}"


def refuse_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Refuse a base whose kernels on the CPU do not take activations of ``dtype``.

    They would fail in the first step, or end the process (float16 by integers of 8
    bits, on a CPU with AMX). vLLM itself refuses what is wrong with other formats.

    Args:
        config: quantization_config of the checkpoint.
    """
    amx = torch.cpu.get_capabilities().get("amx_tile", False)
    known = {torch.bfloat16, torch.float16, torch.float32}
    for group in config.get("config_groups", {}).values():
        inputs = group.get("input_activations")
        if group["weights"]["type"] != "int":
            continue
        if inputs is None:
            known -= {torch.float32}
        elif (inputs["type"], inputs["symmetric"], amx) == ("int", True, True):
            known = {torch.bfloat16}
    if dtype not in known:
        names = sorted(map(text_of, known))
        raise ValueError(
            f"vLLM's CPU kernels for {config['quant_method']} bases of format "
            f"{config.get('format')} do not compute in {dtype}: give --dtype "
            + " or ".join(names)
        )


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
