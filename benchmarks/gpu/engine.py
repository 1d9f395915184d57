# SPDX-License-Identifier: Apache-2.0
"""vLLM's engine in this process, with tokens in and tokens out."""

from pathlib import Path
from typing import Any

from benchmarks.gpu.part import DTYPE, HAS_GPU, Sizes, in_this_process

in_this_process()

from vllm import LLM  # noqa: E402

CAPTURED = [1, 2, 4, 8, 16, 32]  # rows of the steps that replay a graph
# Graphs without torch.compile, which takes longer to start.
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def engine(folder: Path, sizes: Sizes, **options: Any) -> LLM:
    """An engine for the base; with ``quantization="dqrelo"`` also for its deltas."""
    if HAS_GPU:
        chosen = options.get("compilation_config", GRAPHS)
        chosen = {**chosen, "cudagraph_capture_sizes": CAPTURED}
        options["compilation_config"] = chosen
        options.setdefault("gpu_memory_utilization", 0.7)
    else:
        options |= {"enforce_eager": True, "num_gpu_blocks_override": 256}
    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype=str(DTYPE).removeprefix("torch."),
        max_model_len=min(sizes.config["max_position_embeddings"], 4096),
        max_num_batched_tokens=4096,
        max_num_seqs=64,
        enable_prefix_caching=False,
        **options,
    )


def tokens(count: int, seed: int, sizes: Sizes) -> dict[str, list[int]]:
    """A prompt of ``count`` tokens."""
    words = sizes.config["vocab_size"]
    return {"prompt_token_ids": [(seed * 31 + 7 * i + 1) % words for i in range(count)]}
