# SPDX-License-Identifier: Apache-2.0
"""What requests of the base pay for the plugin.

    python -m benchmarks.serving.overhead BASE DELTA [--compiled] [--output FILE]
    python -m benchmarks.serving.overhead mixture|llama [--compiled] [--output FILE]

Two engines in one process, vLLM alone and vLLM with the plugin and a resident delta,
decode the same eight prompts of the base, a step of one and a step of the other by
turns. The ratio is the median over these pairs, so that a slow phase of the machine
is in both. It differs between processes, by where the two engines' weights happen to
lie and by which was started first, so that there are several processes, which start
either by turns; what is written is the geometric mean of their ratios, its standard
error, and the lowest and the highest. glibc is asked for huge pages, where the weights'
place matters less: eight processes of the mixture differed by up to 0.03 with them and
by 0.09 without (AMD EPYC). Instead of a folder there are two bases of random weights,
with a delta of their norms: a small mixture of experts and a Llama of 1.1 billion
parameters.
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
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # for new processes

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)
from vllm import LLM, SamplingParams

from benchmarks.machine import MACHINE, machine
from benchmarks.table import Table
from dqrelo_tools.convert import convert
from dqrelo_tools.footprint import base_bytes
from vllm_dqrelo import load_delta

REQUESTS = 8
COLUMNS = ("base_mb", "mode", "base_ms", "plugin_ms", "ratio", "error")
COLUMNS += ("lowest", "highest", "processes", *MACHINE)

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
    pairs = []
    for step in tqdm(range(steps), f"{'plugin' if plugin_first else 'base'} first"):
        order = sorted(llms, reverse=bool(step % 2))
        taken = {plugin: seconds(llms[plugin]) for plugin in order}
        pairs.append((taken[False], taken[True]))
    return pairs


def main() -> None:
    """Measure, and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help=f"a folder, or one of {', '.join(RANDOM)}")
    parser.add_argument("delta", nargs="?", help="a folder, where the base is one")
    parser.add_argument("--steps", type=int, default=200, help="in each process")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--compiled", action="store_true", help="no --enforce-eager")
    parser.add_argument("--output", type=Path, help="a CSV file to add the row to")
    arguments = parser.parse_args()
    if arguments.processes < 2:
        parser.error("--processes is at least 2: one that starts either engine first")
    with tempfile.TemporaryDirectory() as folder:
        base, delta = arguments.base, arguments.delta
        if base in RANDOM:
            base, delta = random_base(RANDOM[base], Path(folder))
        size_mb = base_bytes(base) / 1e6
        runs = []
        for i in range(arguments.processes):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                call = base, delta, arguments.compiled, arguments.steps, bool(i % 2)
                runs.append(process.submit(measure, *call).result())
    mean, error, ratios = summary(runs)
    alone_ms, plugin_ms = (
        1000 * statistics.median(times)
        for times in zip(*itertools.chain(*runs), strict=True)
    )
    row = {
        "base_mb": f"{size_mb:.0f}",
        "mode": "compiled" if arguments.compiled else "eager",
        "base_ms": f"{alone_ms:.2f}",
        "plugin_ms": f"{plugin_ms:.2f}",
        "ratio": f"{mean:.4f}",
        "error": f"{error:.4f}",
        "lowest": f"{min(ratios):.4f}",
        "highest": f"{max(ratios):.4f}",
        "processes": str(len(runs)),
        **{key: str(value) for key, value in machine().items()},
    }
    print(*(f"{key} {value}" for key, value in row.items()), sep="\n")
    if arguments.output:
        Table(arguments.output, ("base_mb", "mode", "commit"), COLUMNS).add(row)


def summary(
    runs: list[list[tuple[float, float]]],
) -> tuple[float, float, list[float]]:
    """Plugin to base: geometric mean of the runs, its standard error, and each run."""
    ratios = [statistics.median(one / alone for alone, one in run) for run in runs]
    error = statistics.stdev(ratios) / len(ratios) ** 0.5
    return statistics.geometric_mean(ratios), error, ratios


if __name__ == "__main__":
    main()
