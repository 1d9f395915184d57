# SPDX-License-Identifier: Apache-2.0
"""What base + delta answers, in transformers and float32."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from vllm_dqrelo.format.checkpoint import HEAD
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta

TOKENS = 10  # of an answer
TOLERANCE = 2e-3  # of a logprob: float32, 30 layers, another order of sums


@dataclass(frozen=True)
class Reference:
    """A greedy answer: its tokens, their logprobs, and the lead over the second."""

    tokens: list[int]
    logprobs: list[float]
    leads: list[float]

    def difference(self, tokens: list[int], logprobs: list[float]) -> float:
        """The largest difference of logprobs; infinite for another answer.

        Where the two best tokens are within the tolerance either is right, and what
        follows is not compared.
        """
        worst = 0.0
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if token != self.tokens[i]:
                return worst if self.leads[i] <= TOLERANCE else float("inf")
            worst = max(worst, abs(logprob - self.logprobs[i]))
        return worst


def references(
    base: Path, folders: list[Path | None], prompts: list[list[int]], cache: Path
) -> list[list[Reference]]:
    """The answers of base + delta in transformers, float32; None is the base.

    What ``cache`` has already is not computed again.
    """
    known = json.loads(cache.read_text()) if cache.exists() else {}
    found = []
    for folder in tqdm(folders, "references", disable=None):
        digest = DeltaConfig.read(folder).digest if folder else "base"
        key = json.dumps([digest, TOKENS, prompts])
        if key not in known:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            if folder:
                merge(model, Delta(folder))
            known[key] = [asdict(reference(model, prompt)) for prompt in prompts]
            cache.write_text(json.dumps(known))
        found.append([Reference(**one) for one in known[key]])
    return found


def merge(model: Any, delta: Delta) -> None:
    """Add a delta to a model, in place."""
    parameters = dict(model.named_parameters())
    if HEAD in delta.matrices and HEAD not in parameters:
        raise SystemExit(f"{delta.folder} unties the LM head of a base that ties it")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(delta.merged(name, parameter))


def reference(model: Any, prompt: list[int]) -> Reference:
    """The greedy answer of a model."""
    model.generation_config.eos_token_id = None  # to the last of the tokens
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        pad_token_id=0,
        max_new_tokens=TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    logprobs = torch.cat(output.logits).log_softmax(-1)
    best = logprobs.topk(2).values
    return Reference(
        output.sequences[0, len(prompt) :].tolist(),
        best[:, 0].tolist(),
        (best[:, 0] - best[:, 1]).tolist(),
    )
