# SPDX-License-Identifier: Apache-2.0
"""What requests of the base pay for the plugin.

    python benchmarks/benchmark_overhead.py BASE DELTA [--compiled] [--output FILE]
    python benchmarks/benchmark_overhead.py mixture|llama [--compiled] [--output FILE]

Two engines in one process, vLLM alone and vLLM with the plugin and a resident delta,
decode the same eight prompts of the base, a step of one and a step of the other by
turns. The engine that was started first is faster by some percent, whichever it is, so
there are two such processes, one for each order. In both the ratio is that of the
medians; what is written is their geometric mean, and as a range, which says how much of
it is noise, that of the mean for each of ten parts of the runs. Instead of a folder
there are two bases of random weights, with a delta of their norms: a small mixture of
experts, which the plugin computes by itself, and a Llama of 1.1 billion parameters.
"""

import argparse
import itertools
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
from machine import machine
from table import Table
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from vllm import LLM, SamplingParams

from dqrelo_tools.convert import convert
from dqrelo_tools.footprint import base_bytes
from vllm_dqrelo import load_delta

REQUESTS, PARTS = 8, 10

RANDOM: dict[str, PretrainedConfig] = {
    "mixture": Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=512,
        moe_intermediate_size=256,
        num_experts=60,
        num_experts_per_tok=4,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
    ),
    "llama": LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1024,
    ),
}


def random_base(config: PretrainedConfig, folder: Path) -> tuple[str, str]:
    """A base of random weights and a delta of its norms."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base, tuned, delta = (folder / name for name in ("base", "tuned", "delta"))
    model.save_pretrained(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tuned)
    convert(str(base), str(tuned), delta, 1 / 8)
    return str(base), str(delta)


def engine(base: str, **options: Any) -> Any:
    """An engine that decodes eight prompts and does not stop."""
    return LLM(
        base,
        dtype="bfloat16",
        max_model_len=1024,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options,
    )


def start(llm: Any) -> None:
    """Eight requests of the base, past their prompts."""
    sampling = SamplingParams(
        temperature=0, max_tokens=900, ignore_eos=True, detokenize=False
    )
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


def measure(
    base: str, delta: str, compiled: bool, steps: int, plugin_first: bool
) -> list[tuple[float, float]]:
    """Seconds of every step, without the plugin and with it."""
    options: dict[bool, dict[str, str]] = {False: {}, True: {"quantization": "dqrelo"}}
    llms = {
        plugin: engine(base, enforce_eager=not compiled, **options[plugin])
        for plugin in sorted(options, reverse=plugin_first)
    }
    one = SamplingParams(max_tokens=1, detokenize=False)
    request = load_delta(llms[True], "delta", delta)
    llms[True].generate(
        {"prompt_token_ids": [1]}, one, lora_request=request, use_tqdm=False
    )
    for llm in llms.values():
        start(llm)
    return [(seconds(llms[False]), seconds(llms[True])) for _ in tqdm(range(steps))]


def main() -> None:
    """Measure, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help=f"a folder, or one of {', '.join(RANDOM)}")
    parser.add_argument("delta", nargs="?", help="a folder, where the base is one")
    parser.add_argument("--steps", type=int, default=600, help="in each process")
    parser.add_argument("--compiled", action="store_true", help="no --enforce-eager")
    parser.add_argument("--output", type=Path, help="a CSV file to add the row to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base, delta = arguments.base, arguments.delta
        if base in RANDOM:
            base, delta = random_base(RANDOM[base], Path(folder))
        size_mb = base_bytes(base) / 1e6
        runs = []
        for plugin_first in (False, True):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                call = (base, delta, arguments.compiled, arguments.steps, plugin_first)
                runs.append(process.submit(measure, *call).result())
    size = arguments.steps // PARTS
    parts = [
        ratio(*(run[i : i + size] for run in runs))
        for i in range(0, size * PARTS, size)
    ]
    alone_ms, plugin_ms = (
        1000 * statistics.median(times)
        for times in zip(*itertools.chain(*runs), strict=True)
    )
    row = {
        "base_mb": f"{size_mb:.0f}",
        "mode": "compiled" if arguments.compiled else "eager",
        "base_ms": f"{alone_ms:.2f}",
        "plugin_ms": f"{plugin_ms:.2f}",
        "ratio": f"{ratio(*runs):.4f}",
        "lowest": f"{min(parts):.4f}",
        "highest": f"{max(parts):.4f}",
        "plugin_second": f"{ratio(runs[0]):.4f}",
        "plugin_first": f"{ratio(runs[1]):.4f}",
        **{key: str(value) for key, value in machine().items()},
    }
    print(*(f"{key} {value}" for key, value in row.items()), sep="\n")
    if arguments.output:
        Table(arguments.output, ("base_mb", "mode", "commit")).add(row)


def ratio(*runs: list[tuple[float, float]]) -> float:
    """Geometric mean over the runs of the ratio of the medians, plugin to base."""
    return statistics.geometric_mean(
        statistics.median(with_plugin) / statistics.median(alone)
        for alone, with_plugin in (zip(*run, strict=True) for run in runs)
    )


if __name__ == "__main__":
    main()
