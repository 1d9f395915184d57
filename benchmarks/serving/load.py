# SPDX-License-Identifier: Apache-2.0
"""Requests to a server, by vLLM's own benchmark client, and what they saw."""

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

ARRIVALS = ("poisson", "gamma", "closed")
GAMMA_CV = 4  # standard deviation of the intervals over their mean; Poisson's is 1


@dataclass(frozen=True)
class Load:
    """What is asked of a server, but for the models.

    Attributes:
        arrivals: poisson or gamma at ``request_rate``; closed: a request begins when
            another of ``max_concurrency`` ends.
        lengths: tokens of each prompt and of each answer, such as "64:32".
        num_prompts: requests.
        request_rate: requests per second.
        max_concurrency: requests in flight.
        seed: of prompts and arrivals.
    """

    arrivals: str
    lengths: str
    num_prompts: int
    request_rate: float
    max_concurrency: int
    seed: int

    def options(self) -> list[str]:
        """As options of ``vllm bench serve``."""
        prompt, answer = self.lengths.split(":")
        options = ["--dataset-name=random", f"--random-input-len={prompt}"]
        options += [
            f"--random-output-len={answer}",
            f"--num-prompts={self.num_prompts}",
        ]
        options += [f"--seed={self.seed}", "--ignore-eos", "--temperature=0"]
        if self.arrivals == "closed":
            return [*options, f"--max-concurrency={self.max_concurrency}"]
        # Of a gamma distribution with shape k, cv = k ** -0.5.
        shape = 1.0 if self.arrivals == "poisson" else GAMMA_CV**-2
        return [
            *options,
            f"--request-rate={self.request_rate}",
            f"--burstiness={shape}",
        ]


def drive(
    address: str, tokenizer: Path, models: Sequence[str], load: Load
) -> dict[str, Any]:
    """Send the requests, the i-th to ``models[i]``; vLLM's result with all details.

    Raises:
        SystemExit: a request failed.
    """
    argv = ["--backend=openai", f"--base-url={address}", f"--model={models[0]}"]
    argv += [f"--tokenizer={tokenizer}", "--save-detailed", "--disable-tqdm"]
    argv += load.options()
    # "round-robin" over as many names as requests: each has its own.
    argv += ["--lora-assignment=round-robin", "--lora-modules", *models]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with redirect_stdout(io.StringIO()):
        result = main(parser.parse_args(argv))
    if errors := [error for error in result["errors"] if error]:
        raise SystemExit(f"{len(errors)} requests to {address} failed: {errors[0]}")
    return result


@dataclass(frozen=True)
class Goal:
    """What a good answer is: limits in milliseconds."""

    good_ttft_ms: float
    good_tpot_ms: float


QUANTILES = tuple(product(("ttft", "tpot", "itl"), (50, 99)))
SUMMARY = ("seconds", "output_tokens_per_s", "goodput_per_s")
SUMMARY += tuple(f"{name}_p{percent}_ms" for name, percent in QUANTILES)


def summary(
    results: Iterable[dict[str, Any]], seconds: float, goal: Goal
) -> dict[str, float]:
    """The columns ``SUMMARY`` for the results of one or several clients.

    Args:
        results: of ``drive``.
        seconds: that all of them took together.
        goal: of goodput: answers within both limits, per second.
    """
    results = list(results)
    ttft, latency, tokens, itls = (
        [value for result in results for value in result[key]]
        for key in ("ttfts", "latencies", "output_lens", "itls")
    )
    first = 1000 * np.array(ttft)
    rest = (1000 * np.array(latency) - first) / np.maximum(np.array(tokens) - 1, 1)
    between = 1000 * np.array(list(chain.from_iterable(itls)))
    good = (first <= goal.good_ttft_ms) & (rest <= goal.good_tpot_ms)
    found = {
        "seconds": seconds,
        "output_tokens_per_s": sum(tokens) / seconds,
        "goodput_per_s": good.sum() / seconds,
    }
    values = {"ttft": first, "tpot": rest, "itl": between}
    for name, percent in QUANTILES:
        found[f"{name}_p{percent}_ms"] = np.percentile(values[name], percent)
    return {key: round(float(value), 3) for key, value in found.items()}
