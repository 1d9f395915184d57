# SPDX-License-Identifier: Apache-2.0
"""The whole road on a real model: fine-tune, convert, serve, compare.

One server serves a base and three full fine-tunes of it, these as deltas, one of them
a second time in half of the bytes. Every model is asked every task. All files are in
.cache/demo; delete the folder to start afresh.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.demo_picture import picture
from benchmarks.machine import ENVIRONMENT, machine

os.environ.update(ENVIRONMENT)

from openai import OpenAI
from tqdm import tqdm

from benchmarks.models.bases import BASES
from benchmarks.models.finetune import exact_match
from benchmarks.models.smollm import DEMO, HALF_RATIO, base, converted, fine_tune
from benchmarks.models.tasks import MAX_ANSWER_TOKENS, TASKS
from benchmarks.paths import DQRELO
from benchmarks.serving.server import server
from dqrelo_kernels.cpu import build
from vllm_dqrelo.format.folder import file_bytes

LOG = DEMO / "server.log"
BASE = BASES["smollm2"].title
QUESTIONS = 20  # per task
MAX_BASE_SCORE = 0.20  # a base that scores more knows the task already
MAX_LOSS = 0.10  # of exact match, from a fine-tune to its delta
HALF = "orders-half"  # the delta of "orders" in half of the bytes
REQUESTS, NEW_TOKENS = 48, 32  # of a measurement of speed
ADVICE = """
On a model of your own:
  dqrelo convert --base BASE --model FINE_TUNE --output DELTA
  dqrelo serve BASE --delta my-model=DELTA
  curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d \\
    '{"model": "my-model", "messages": [{"role": "user", "content": "Hello"}]}'
docs/tutorial.md goes on from there: verify a delta, many deltas, their memory."""

_seconds: dict[str, float] = {}


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Announce a stage and keep its time."""
    print(f"\n== {name}", file=sys.stderr)
    start = time.perf_counter()
    yield
    _seconds[name] = round(time.perf_counter() - start, 1)


def ask(address: str, models: list[str]) -> dict[str, dict[str, float]]:
    """Exact match of every model on every task, with the requests mixed."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")

    def is_right(question: tuple[str, str, str, str]) -> bool:
        model, _, prompt, answer = question
        messages = [{"role": "user", "content": prompt}]
        reply = client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=MAX_ANSWER_TOKENS
        )
        return reply.choices[0].message.content == answer

    examples = [(t.name, *e) for t in TASKS.values() for e in t.test(QUESTIONS)]
    questions = [(model, *example) for example in examples for model in models]
    right: Counter[tuple[str, str]] = Counter()
    with ThreadPoolExecutor(48) as pool:
        results = tqdm(pool.map(is_right, questions), "ask", len(questions))
        for (model, task, *_), result in zip(questions, results, strict=True):
            right[model, task] += result
    return {m: {t: right[m, t] / QUESTIONS for t in TASKS} for m in models}


def tokens_per_second(address: str, models: list[str]) -> float:
    """Output tokens per second of requests that take the models by turns."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none")

    def tokens(number: int) -> int:
        reply = client.completions.create(
            model=models[number % len(models)],
            prompt=f"Here is a story about the number {number}:",
            max_tokens=NEW_TOKENS,
            extra_body={"ignore_eos": True},
        )
        return reply.usage.completion_tokens

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(tokens, range(len(models))))  # each model once, not measured
        start = time.perf_counter()
        total = sum(pool.map(tokens, range(REQUESTS)))
        return total / (time.perf_counter() - start)


def line(first: str, *others: str) -> str:
    """One line of a table."""
    return f"{first:<24}" + "".join(f"{other:>10}" for other in others)


def weight_mb(folder: Path) -> float:
    """Megabytes of a folder's weight files."""
    return file_bytes(folder.glob("*.safetensors")) / 1e6


def main() -> None:
    """Run every stage, print and keep the results, and judge them."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends too
    with stage("build the operators"):
        build.library()  # without a compiler this says what is slower
    with stage("fetch the base"):
        base()
    models, deltas, uncompressed = {}, {}, {}
    for name, task in TASKS.items():
        with stage(f"fine-tune {name}"):
            models[name] = fine_tune(name)
        with stage(f"ask {name}, uncompressed"):
            uncompressed[name] = exact_match(models[name], task, QUESTIONS)
        with stage(f"convert {name}"):
            deltas[name] = converted(name)
    with stage(f"convert {HALF}"):
        deltas[HALF] = converted("orders", HALF_RATIO)
    models[HALF], uncompressed[HALF] = models["orders"], uncompressed["orders"]
    arguments = [*DQRELO, "serve", base(), "--served-model-name=base"]
    arguments += [f"--delta={name}={delta}" for name, delta in deltas.items()]
    arguments += ["--dtype=bfloat16", "--max-model-len=512", "--enforce-eager"]
    with ExitStack() as stack:
        with stage("start the server"):
            address = stack.enter_context(server(arguments, LOG))
        with stage("ask the server"):
            scores = ask(address, ["base", *deltas])
        with stage("measure its speed"):
            speeds = {
                "base": tokens_per_second(address, ["base"]),
                f"{len(deltas)} deltas mixed": tokens_per_second(address, [*deltas]),
            }

    megabytes = {n: (weight_mb(models[n]), weight_mb(deltas[n])) for n in deltas}
    copies = weight_mb(base()) + sum(megabytes[name][0] for name in TASKS)
    served = weight_mb(base()) + sum(megabytes[name][1] for name in TASKS)
    print(f"\nExact match on {QUESTIONS} held-out prompts per task. Base: {BASE}")
    print("fine-tune: the uncompressed fine-tune in transformers, on its own task\n")
    print(line("model", *TASKS, "fine-tune", "MB", "delta MB", "ratio"))
    for name, score in scores.items():
        cells = [f"{share:.0%}" for share in score.values()]
        if name in deltas:
            whole, delta = megabytes[name]
            cells += [f"{uncompressed[name]:.0%}", f"{whole:.1f}"]
            cells += [f"{delta:.1f}", f"{delta / whole:.3f}"]
        print(line(name, *cells))
    print(f"\nWeights of the base and {len(TASKS)} deltas: {served:.0f} MB.", end=" ")
    print(f"As {len(TASKS) + 1} whole models: {copies:.0f} MB.")
    print(*(f"{n}: {s:.0f} output tokens/s" for n, s in speeds.items()), sep="\n")
    print("\n" + line("stage", "seconds"))
    print(*(line(name, f"{s:.1f}") for name, s in _seconds.items()), sep="\n")
    results = {
        "base": BASE,
        "questions_per_task": QUESTIONS,
        "exact_match": scores,
        "exact_match_uncompressed": uncompressed,
        "megabytes_of_fine_tune_and_delta": megabytes,
        "megabytes_served": served,
        "megabytes_of_whole_models": copies,
        "output_tokens_per_s": speeds,
        "seconds": _seconds,
        "machine": machine(),
    }
    (DEMO / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    picture(results).savefig(DEMO / "results.png", dpi=150)
    print(f"\nThe same as a picture: {DEMO / 'results.png'}")
    for name, expected in uncompressed.items():
        task = name.removesuffix("-half")
        known, kept = scores["base"][task], scores[name][task]
        if known > MAX_BASE_SCORE:
            raise SystemExit(f"The base solves {known:.0%} of {task} by itself.")
        if kept < expected - MAX_LOSS:
            raise SystemExit(f"The delta {name} does not do what its fine-tune does.")
    print(ADVICE)


if __name__ == "__main__":
    main()
