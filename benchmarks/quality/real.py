# SPDX-License-Identifier: Apache-2.0
"""Is a delta of a real model served as the merged checkpoint is?

    python -m benchmarks.quality.real BASE [--output FILE]

A base of bases.py, a full fine-tune of it (finetune.py) and that one's delta. Three
engines answer the same prompts, one after another: vLLM without the plugin as the base
and as what ``dqrelo export`` makes of base and delta; and vLLM with the plugin, where
both are in one batch. transformers computes the logprobs of the merged checkpoint once
more, which says how far two engines are apart without us.

All numbers are float32, so that every parameter moves in a short training, an export
rounds nothing, and only the order of sums may differ. One prompt is longer than the
windows of Gemma 3. Base and fine-tune stay in .cache.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from benchmarks.machine import MACHINE, machine
from benchmarks.models.bases import BASES, fetch_base
from benchmarks.models.finetune import exact_match, finetune
from benchmarks.models.tasks import MAX_ANSWER_TOKENS, TASKS
from benchmarks.paths import CACHE, RESULTS
from benchmarks.table import Table
from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from dqrelo_tools.report import Report
from dqrelo_tools.verify import verify
from vllm_dqrelo import load_delta

TASK = TASKS["tickets"]
RATIO = 1 / 8
QUESTIONS = 20
LONG = 700  # tokens
TOLERANCE = 1e-4  # as in tests/test_architectures.py

Answer = tuple[list[int], torch.Tensor]  # its tokens; logprobs of these and the prompt


def engine(model: Path, **options: Any) -> LLM:
    """A model in vLLM, in this process."""
    return LLM(
        str(model), dtype="float32", max_model_len=1024, enforce_eager=True, **options
    )


def answers(llm: LLM, prompts: list[list[int]], requests: Any = None) -> list[Answer]:
    """Greedy, of all prompts in one batch."""
    sampling = SamplingParams(
        temperature=0, max_tokens=MAX_ANSWER_TOKENS, logprobs=0, prompt_logprobs=0
    )
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found = []
    for output in llm.generate(inputs, sampling, lora_request=requests):
        (answer,) = output.outputs
        tokens = list(answer.token_ids)
        steps = [*output.prompt_logprobs[1:], *answer.logprobs]
        pairs = zip([*output.prompt_token_ids[1:], *tokens], steps, strict=True)
        scores = torch.tensor([step[token].logprob for token, step in pairs])
        found.append((tokens, scores))
    return found


def alone(model: Path, prompts: list[list[int]]) -> list[Answer]:
    """The answers of vLLM without the plugin, whose memory is free again."""
    llm = engine(model)
    found = answers(llm, prompts)
    del llm
    gc.unfreeze()  # an engine has frozen all that there was at its start
    gc.collect()
    return found


@torch.no_grad()
def in_transformers(
    folder: Path, prompts: list[list[int]], answered: list[Answer]
) -> list[Answer]:
    """What transformers makes of the tokens of these answers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt, (tokens, _) in zip(prompts, answered, strict=True):
        ids = torch.tensor([[*prompt, *tokens]])
        logits = model(ids[:, :-1]).logits[0]
        chosen = logits.gather(1, ids[0, 1:, None])[:, 0]
        found.append((tokens, chosen - logits.logsumexp(-1)))
    return found


def difference(got: list[Answer], expected: list[Answer]) -> float:
    """The largest of all logprobs; infinite if a token differs."""
    if any(one[0] != other[0] for one, other in zip(got, expected, strict=True)):
        return float("inf")
    pairs = zip(got, expected, strict=True)
    return max(float((one[1] - other[1]).abs().max()) for one, other in pairs)


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Tokens of a prompt, at most LONG."""
    chat = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=False
    )
    return tokens[:LONG]


def checked(base: Path, tuned: Path, delta: Path) -> Report:
    """What ``dqrelo verify`` says of a delta, with the held-out prompts."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        for prompt, _ in TASK.test(QUESTIONS):
            chat = [{"role": "user", "content": prompt}]
            file.write(json.dumps({"messages": chat}) + "\n")
        file.flush()
        report = verify(str(base), delta, str(tuned), Path(file.name))
    still = [entry.name for entry in report.entries if entry.kind == "unchanged"]
    if still:
        raise SystemExit(f"The fine-tuning did not move {', '.join(still)}.")
    return report


COLUMNS = ("base", "model", "parameters", "ratio", "prompts", "logprobs")
COLUMNS += ("difference_base", "difference_delta", "difference_transformers", "kl")
COLUMNS += ("kl_of_base", "top1", "exact_match", "exact_match_of_fine_tune", "seconds")
COLUMNS += MACHINE


def compare(name: str, scratch: Path) -> dict[str, object]:
    """Convert, serve and compare; base and fine-tune are made if they are absent.

    Args:
        name: in ``BASES``.
        scratch: an empty folder.

    Returns:
        The row.
    """
    base = fetch_base(CACHE / "real" / name / "base", name, torch.float32)
    tuned = finetune(base, TASK, CACHE / "real" / name / "fine-tune")
    known = exact_match(tuned, TASK, QUESTIONS)
    start = time.perf_counter()
    delta, merged = scratch / "delta", scratch / "merged"
    convert(str(base), str(tuned), delta, RATIO)
    report = checked(base, tuned, delta)
    print(report.to_text())
    export(str(base), delta, merged)

    tokenizer = AutoTokenizer.from_pretrained(tuned)
    questions, right = zip(*TASK.test(QUESTIONS), strict=True)
    long = " ".join(question for question, _ in TASK.train(LONG))
    prompts = [encode(tokenizer, prompt) for prompt in (*questions, long)]
    of_base, of_merged = alone(base, prompts), alone(merged, prompts)
    engines = difference(of_merged, in_transformers(merged, prompts, of_merged))
    room = {"dqrelo": {"delta_memory_gib": 0.25}}
    llm = engine(base, quantization="dqrelo", additional_config=room)
    requests = [None, load_delta(llm, "delta", str(delta))]
    got = answers(llm, [p for p in prompts for _ in requests], requests * len(prompts))
    seconds = time.perf_counter() - start

    replies = [tokens for tokens, _ in got[1::2]][:QUESTIONS]
    texts = tokenizer.batch_decode(replies, skip_special_tokens=True)
    fidelity = report.fidelity.to_dict()
    return {
        "base": name,
        "model": BASES[name].title,
        "parameters": sum(entry.weights for entry in report.entries),
        "ratio": RATIO,
        "prompts": len(prompts),
        "logprobs": sum(len(scores) for _, scores in got),
        "difference_base": f"{difference(got[::2], of_base):.2e}",
        "difference_delta": f"{difference(got[1::2], of_merged):.2e}",
        "difference_transformers": f"{engines:.2e}",
        "kl": f"{fidelity['delta']['kl']:.4e}",
        "kl_of_base": f"{fidelity['base']['kl']:.4e}",
        "top1": f"{fidelity['delta']['top1']:.4f}",
        "exact_match": sum(map(str.__eq__, texts, right)) / QUESTIONS,
        "exact_match_of_fine_tune": known,
        "seconds": f"{seconds:.1f}",
    }


def main() -> None:
    """Compare, write the row, and judge it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", choices=BASES)
    parser.add_argument("--output", type=Path, default=RESULTS / "real.csv")
    arguments = parser.parse_args()
    table = Table(arguments.output, ("base", "commit"), COLUMNS)
    with tempfile.TemporaryDirectory() as scratch:
        row = {**compare(arguments.base, Path(scratch)), **machine()}
    print(*(f"{key} {value}" for key, value in row.items()), sep="\n")
    table.add(row)
    # Two engines may each be off by what a sum in another order makes of this model.
    allowed = max(TOLERANCE, 2 * float(row["difference_transformers"]))
    if not float(row["difference_delta"]) <= allowed:
        raise SystemExit(f"The delta is not what its merged checkpoint is: {allowed}.")
    if not float(row["difference_base"]) <= TOLERANCE:
        raise SystemExit("The base is not what it is without the plugin.")


if __name__ == "__main__":
    main()
