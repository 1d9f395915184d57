# SPDX-License-Identifier: Apache-2.0
"""Requests that a worker serves without an engine: a prompt, and a token after it.

As vLLM warms its kernels up: ``run_mixed_prefill_decode_warmup``,
v1/worker/gpu/warmup.py:82.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from vllm import SamplingParams
from vllm.distributed import get_pp_group
from vllm.lora.request import LoRARequest
from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import (
    CachedRequestData,
    NewRequestData,
    SchedulerOutput,
)
from vllm.v1.kv_cache_interface import AttentionSpec, UniformTypeKVCacheSpecs

from vllm_dqrelo.compat import find

FIRST_BLOCK = 1  # block 0 is vLLM's null block
NEXT = 1  # the token that is sampled, so that all models go on with the same one


class Logits(NamedTuple):
    """Of one request.

    Attributes:
        prompt: [V], after the last token of the prompt.
        decode: [V], after the token that follows.
    """

    prompt: torch.Tensor
    decode: torch.Tensor


def why_none(runner: Any, length: int) -> str | None:
    """Why a runner cannot be given requests of ``length`` tokens; None if it can."""
    config = runner.vllm_config
    for group in runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if not isinstance(spec, AttentionSpec | UniformTypeKVCacheSpecs):
            return f"its cache is a {type(spec).__name__}"
    if config.model_config.max_model_len < length + 2:
        return f"--max-model-len is less than {length + 2}"
    if config.scheduler_config.max_num_batched_tokens < length:
        return f"--max-num-batched-tokens is less than {length}"
    if runner.kv_cache_config.num_blocks <= FIRST_BLOCK + _blocks(runner, length):
        return "there is too little KV cache"
    return None


def most_requests(runner: Any, length: int) -> int:
    """How many requests of ``length`` tokens one step takes."""
    scheduler = runner.vllm_config.scheduler_config
    free = runner.kv_cache_config.num_blocks - FIRST_BLOCK
    return min(
        scheduler.max_num_seqs,
        scheduler.max_num_batched_tokens // length,
        free // max(1, _blocks(runner, length)),
    )


@torch.inference_mode()
def serve(
    worker: Any, requests: list[LoRARequest | None], prompt: list[int]
) -> list[Logits | None]:
    """Give one prompt to several models, in one batch.

    Args:
        worker: has no requests. Mutated: its KV cache.
        requests: each of another delta, or None for the base.
        prompt: tokens, after which each model goes on with the token NEXT.

    Returns:
        The logits of each; None where another worker has them.
    """
    runner = worker.model_runner
    names = [f"self-check {i}" for i in range(len(requests))]
    groups = runner.kv_cache_config.kv_cache_groups
    # A stage learns what was sampled only between steps of an engine: there the token
    # is a second part of the prompt.
    in_stages = get_pp_group().world_size > 1
    tokens = [*prompt, NEXT] if in_stages else prompt
    blocks = _numbers(runner, len(requests), len(prompt))
    sampling = SamplingParams(temperature=0.0, max_tokens=2, allowed_token_ids=[NEXT])
    first = SchedulerOutput.make_empty()
    first.scheduled_new_reqs = [
        NewRequestData(
            req_id=name,
            prompt_token_ids=tokens,
            mm_features=[],
            sampling_params=sampling,
            pooling_params=None,
            block_ids=next(blocks),
            num_computed_tokens=0,
            lora_request=request,
            prefill_token_ids=tokens,
        )
        for name, request in zip(names, requests, strict=True)
    ]
    cached = CachedRequestData.make_empty()
    cached.req_ids = names
    cached.num_computed_tokens = [len(prompt)] * len(names)
    cached.num_output_tokens = [int(not in_stages)] * len(names)
    cached.new_block_ids = [None] * len(names)
    second = SchedulerOutput.make_empty()
    second.scheduled_cached_reqs = cached
    last = SchedulerOutput.make_empty()
    last.finished_req_ids = set(names)
    for output in (first, second, last):
        output.num_common_prefix_blocks = [0] * len(groups)
    with _without_connector(runner):
        try:
            after_prompt = _step(worker, first, names, len(prompt))
            after_token = _step(worker, second, names, 1)
        finally:
            worker.execute_model(last)
    if after_prompt is None or after_token is None:
        return [None] * len(names)
    return [Logits(after_prompt[name], after_token[name]) for name in names]


def _step(
    worker: Any, output: SchedulerOutput, names: list[str], tokens: int
) -> dict[str, torch.Tensor] | None:
    """Run one step; the logits [V] of each request, float32."""
    output.num_scheduled_tokens = dict.fromkeys(names, tokens)
    output.total_num_scheduled_tokens = tokens * len(names)
    with _recorded(worker.model_runner) as logits:
        worker.execute_model(output)
        sampled = worker.sample_tokens(None)
    if hasattr(sampled, "get_output"):  # of asynchronous scheduling
        sampled = sampled.get_output()
    if not logits or logits[-1] is None:
        return None
    rows = logits[-1].float()
    return dict(zip(sampled.req_ids, rows, strict=True))


@contextmanager
def _recorded(runner: Any) -> Iterator[list[torch.Tensor | None]]:
    """What the model's ``compute_logits`` returns."""
    found: list[torch.Tensor | None] = []
    compute = runner.model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = compute(*args, **kwargs)
        found.append(None if logits is None else logits.clone())
        return logits

    with patch.object(runner.model, "compute_logits", compute_logits):
        yield found


@contextmanager
def _without_connector(runner: Any) -> Iterator[None]:
    """Keep the KV cache of these requests in this worker."""
    connector = getattr(runner, "kv_connector", None)
    switch = find(connector, "set_disabled") if connector else lambda _: None
    switch(True)
    try:
        yield
    finally:
        switch(False)


def _blocks(runner: Any, length: int) -> int:
    """Of the KV cache, for one request and the token after it."""
    return sum(
        _blocks_of(runner, group, length)
        for group in runner.kv_cache_config.kv_cache_groups
    )


def _blocks_of(runner: Any, group: Any, length: int) -> int:
    ahead = getattr(runner.vllm_config, "num_lookahead_tokens", 0)
    return cdiv(length + 1 + ahead, group.kv_cache_spec.block_size)


def _numbers(
    runner: Any, requests: int, length: int
) -> Iterator[tuple[list[int], ...]]:
    """The numbers of the blocks of each request, by group."""
    first = FIRST_BLOCK
    for _ in range(requests):
        of_groups = []
        for group in runner.kv_cache_config.kv_cache_groups:
            count = _blocks_of(runner, group, length)
            of_groups.append(list(range(first, first := first + count)))
        yield tuple(of_groups)
