# SPDX-License-Identifier: Apache-2.0
"""What requests of the base pay for the plugin.

    python benchmarks/benchmark_overhead.py BASE DELTA [--compiled] [--output FILE]

Two engines in one process, vLLM alone and vLLM with the plugin and a resident delta,
decode the same eight prompts of the base, a step of one and a step of the other by
turns. The ratio is that of the medians; its range is that of ten parts of the run,
which says how much of it is noise.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from machine import machine
from table import Table
from tqdm import tqdm
from vllm import LLM, SamplingParams

from vllm_dqrelo import load_delta

REQUESTS, STEPS, PARTS = 8, 600, 10


def engine(base: str, **options: Any) -> Any:
    """An engine that decodes eight prompts and does not stop."""
    return LLM(
        base,
        dtype="bfloat16",
        max_model_len=1024,
        enable_prefix_caching=False,
        **options,
    )


def start(llm: Any) -> None:
    """Eight requests of the base, past their prompts."""
    sampling = SamplingParams(temperature=0, max_tokens=STEPS + 50, ignore_eos=True)
    for i in range(REQUESTS):
        prompt = {"prompt_token_ids": list(range(100 * i + 5, 100 * i + 69))}
        llm.llm_engine.add_request(str(i), prompt, sampling)
    for _ in range(20):
        llm.llm_engine.step()


def seconds(llm: Any) -> float:
    """How long a step takes."""
    begin = time.perf_counter()
    llm.llm_engine.step()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("delta")
    parser.add_argument("--compiled", action="store_true", help="no --enforce-eager")
    parser.add_argument("--output", type=Path, help="a CSV file to add the row to")
    arguments = parser.parse_args()
    options = {"enforce_eager": not arguments.compiled}
    alone = engine(arguments.base, **options)
    plugin = engine(arguments.base, quantization="dqrelo", **options)
    delta = load_delta(plugin, "delta", arguments.delta)
    one = SamplingParams(max_tokens=1)
    plugin.generate({"prompt_token_ids": [1]}, one, lora_request=delta, use_tqdm=False)
    start(alone)
    start(plugin)
    pairs = [(seconds(alone), seconds(plugin)) for _ in tqdm(range(STEPS))]
    size = STEPS // PARTS
    parts = [ratio(pairs[i : i + size]) for i in range(0, STEPS, size)]
    alone_ms, plugin_ms = (
        1000 * statistics.median(times) for times in zip(*pairs, strict=True)
    )
    row = {
        "mode": "compiled" if arguments.compiled else "eager",
        "base_ms": f"{alone_ms:.2f}",
        "plugin_ms": f"{plugin_ms:.2f}",
        "ratio": f"{ratio(pairs):.4f}",
        "lowest": f"{min(parts):.4f}",
        "highest": f"{max(parts):.4f}",
        **{key: str(value) for key, value in machine().items()},
    }
    print(*(f"{key} {value}" for key, value in row.items()), sep="\n")
    if arguments.output:
        Table(arguments.output, ("mode", "commit")).add(row)


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Of the medians: the plugin's to the base's."""
    alone, plugin = zip(*pairs, strict=True)
    return statistics.median(plugin) / statistics.median(alone)


if __name__ == "__main__":
    main()
