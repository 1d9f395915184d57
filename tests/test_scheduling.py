# SPDX-License-Identifier: Apache-2.0
"""Prompts in chunks, from the prefix cache and after a preemption: each is itself."""

import numpy as np
import pytest
import torch
from support.engines import free

vllm = pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.v2]

TOLERANCE = 1e-4  # as in test_serving.py
ORDER = [(p, m) for p in range(4) for m in range(4)]  # prompts and models


@pytest.fixture(scope="module")
def llm(family, start_engine):
    """An engine with room for 33 tokens in a step, one less than a prompt needs."""
    llm = start_engine(
        family("llama").base,
        quantization="dqrelo",
        max_loras=2,
        max_num_batched_tokens=33,
        disable_log_stats=False,
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()
    free()


@pytest.fixture(scope="module")
def requests(llm, family):
    """For the base and three deltas."""
    from vllm_dqrelo import load_delta

    deltas = family("llama").deltas
    return [None, *(load_delta(llm, d.name, str(d)) for d in deltas)]


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_prompts_in_chunks(
    llm, requests, alone, answers, difference, prompts, prompt_logprobs
):
    assert len(prompts[3]) > 33
    whose = [requests[m] for _, m in ORDER]
    found = answers(llm, [prompts[p] for p, _ in ORDER], whose, prompt_logprobs)
    for (p, m), answer in zip(ORDER, found, strict=True):
        assert difference(answer, alone("llama")[m][p]) <= TOLERANCE, (p, m)
        assert len(answer[2]) == (len(prompts[p]) - 1 if prompt_logprobs else 0)


def test_scored_tokens(llm, requests, alone, prompts):
    """``prompt_logprob_token_ids``, which has an entry point of its own."""
    if not llm.llm_engine.vllm_config.use_v2_model_runner:
        pytest.skip("V1 has no prompt_logprob_token_ids")
    params = [
        vllm.SamplingParams(
            max_tokens=1,
            temperature=0,
            detokenize=False,
            prompt_logprob_token_ids=np.array(prompts[p][1:])[:, None],
        )
        for p, _ in ORDER
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompts[p]} for p, _ in ORDER],
        params,
        lora_request=[requests[m] for _, m in ORDER],
        use_tqdm=False,
    )
    for (p, m), output in zip(ORDER, outputs, strict=True):
        found = torch.as_tensor(output.prompt_token_id_logprobs).flatten()
        expected = torch.tensor(alone("llama")[m][p][2])
        assert (found - expected).abs().max() <= TOLERANCE, (p, m)


def hits(llm) -> int:
    """How many tokens were found in the prefix cache so far."""
    counters = {metric.name: metric for metric in llm.get_metrics()}
    return counters["vllm:prefix_cache_hits"].value


def test_prompts_from_the_prefix_cache(
    llm, requests, alone, answers, difference, prompts
):
    """A prefix that other models have computed is not found; its own is."""
    llm.reset_prefix_cache()
    for m, request in enumerate(requests):
        for tokens in (0, 32):  # a block, of a prompt of 42
            before = hits(llm)
            (answer,) = answers(llm, [prompts[3]], [request])
            assert difference(answer, alone("llama")[m][3]) <= TOLERANCE
            assert hits(llm) - before == tokens


def test_a_dummy_step_between_others(
    llm, requests, alone, answers, difference, prompts, manager_of
):
    """As data-parallel ranks without requests have; its dummies leave nothing."""
    for m in (1, 0, 2):
        llm.collective_rpc("execute_dummy_batch")
        (answer,) = answers(llm, prompts[:1], [requests[m]])
        assert difference(answer, alone("llama")[m][0]) <= TOLERANCE
    names = {digest[:7] for digest in manager_of(llm).residency.resident}
    assert names == {"sha256:"}


def test_the_base_keeps_its_weights(llm, requests, alone, answers, difference, prompts):
    with pytest.raises(Exception, match="cannot change the weights of a base"):
        llm.collective_rpc("reload_weights")
    (answer,) = answers(llm, prompts[:1], requests[1:2])
    assert difference(answer, alone("llama")[1][0]) <= TOLERANCE


def test_requests_that_are_preempted(
    llm, requests, alone, sampling, answer_of, difference, prompts
):
    for p, m in ORDER:
        llm.llm_engine.add_request(
            f"{p} {m}",
            {"prompt_token_ids": prompts[p]},
            sampling(prompt_logprobs=1),
            lora_request=requests[m],
        )
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    steps, preempted, found = 0, 0, {}
    while llm.llm_engine.has_unfinished_requests():
        steps += 1
        if steps in (4, 9):
            preempted += len(scheduler.running)
            scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            if output.finished:
                found[output.request_id] = answer_of(output)
    assert preempted and len(found) == len(ORDER)
    for p, m in ORDER:
        assert difference(found[f"{p} {m}"], alone("llama")[m][p]) <= TOLERANCE, (p, m)
