# SPDX-License-Identifier: Apache-2.0
"""Prompts that are embeddings, beside prompts of tokens, for base and deltas."""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.v2]

TOLERANCE = 1e-4  # as in test_serving.py
LENGTHS = (5, 40)  # the second is more than a block of the prefix cache


def embeddings(width):
    """Random prompts, float32 [T, K]."""
    generator = torch.Generator().manual_seed(0)
    return [0.1 * torch.randn(t, width, generator=generator) for t in LENGTHS]


def expected(folder, prompt):
    """Greedy tokens of transformers for ``inputs_embeds``, and their logprobs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        output = model.generate(
            inputs_embeds=prompt[None],
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0].tolist()
    steps = [logits[0].log_softmax(-1) for logits in output.logits]
    logprobs = [float(step[t]) for step, t in zip(steps, tokens, strict=True)]
    return tokens, logprobs, []


def test_prompts_of_embeddings_and_of_tokens_in_one_batch(
    family, alone, engine, load, sampling, answer_of, difference, prompts
):
    """Twice: the second time, the prefix cache has the prompts."""
    made, of_tokens = family("llama-tied"), alone("llama-tied")
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=3,
        enable_prompt_embeds=True,
        additional_config={"dqrelo": {"delta_memory_gib": 0.001}},
    )
    models = [None, *(load(llm, d.name, d) for d in made.deltas)]
    given = embeddings(96)
    of_embeddings = [
        [expected(folder, prompt) for prompt in given]
        for folder in (made.base, *made.merged)
    ]
    # For each model: embeddings, tokens, embeddings, tokens.
    batch, wanted, requests = [], [], []
    for number, request in enumerate(models):
        for index, prompt in enumerate(given):
            batch += [
                {"prompt_embeds": prompt},
                {"prompt_token_ids": prompts[index + 1]},
            ]
            wanted += [of_embeddings[number][index], of_tokens[number][index + 1]]
            requests += [request, request]
    for _ in range(2):
        outputs = llm.generate(batch, sampling(), lora_request=requests, use_tqdm=False)
        for output, answer in zip(outputs, wanted, strict=True):
            got = answer_of(output)
            assert difference((*got[:2], []), answer) <= TOLERANCE
