# SPDX-License-Identifier: Apache-2.0
"""Steps of vLLM: 1 to 32 deltas, beside the base, LoRA at equal bytes, merged models.

A decode step has one row of each delta; a step of prompts has as many tokens in all,
whatever the number of deltas. Systems: ``deltas``, this plugin; ``base``, vLLM alone
with as many rows; ``lora``, vLLM's own adapters of about as many bytes; ``merged``,
as many merged checkpoints that vLLM alone serves one after another, each its rows:
the time of one, times their number.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from benchmarks.gpu.engine import engine, tokens
from benchmarks.gpu.models import base, deltas
from benchmarks.gpu.part import DTYPE, Options, Sizes, options
from benchmarks.machine import MACHINE, machine
from benchmarks.table import Table
from dqrelo_tools.footprint import delta_bytes
from vllm_dqrelo import load_delta
from vllm_dqrelo.format.checkpoint import Checkpoint

KEYS = ("system", "ratio", "phase", "deltas")
COLUMNS = (*KEYS, "rows_per_delta", "ms", "rank", "device", *MACHINE)
PROMPT_REPEATS = 5
WARM_UP = 4  # decode steps
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has kernels for
Row = dict[str, object]


def decode_ms(llm: LLM, requests: list[Any], sizes: Sizes) -> float:
    """Median time of a decode step with a row of each request."""
    sampling = SamplingParams(
        temperature=0,
        max_tokens=sizes.decode + 2 * WARM_UP,
        ignore_eos=True,
        detokenize=False,
    )
    for i, request in enumerate(requests):
        prompt = tokens(8, i, sizes)
        llm.llm_engine.add_request(str(i), prompt, sampling, lora_request=request)
    for _ in range(WARM_UP):
        llm.llm_engine.step()
    times = [timed(llm.llm_engine.step) for _ in range(sizes.decode)]
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return 1000 * statistics.median(times)


def prompt_ms(llm: LLM, requests: list[Any], sizes: Sizes, count: int) -> float:
    """Median time of a step with a prompt of ``count`` tokens for each request."""
    sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    prompts = [tokens(count, i, sizes) for i in range(len(requests))]

    def step() -> None:
        llm.generate(prompts, sampling, lora_request=requests, use_tqdm=False)

    step()
    return 1000 * statistics.median(timed(step) for _ in range(PROMPT_REPEATS))


def timed(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measured(
    llm: LLM, request: Callable[[int], LoRARequest | None], sizes: Sizes
) -> Iterator[Row]:
    """Both phases, for each number of deltas.

    Args:
        request: of the delta with a number; called when the delta is needed.
    """
    requests: list[LoRARequest | None] = []
    for count in sizes.steps:
        requests += [request(i) for i in range(len(requests), count)]
        each = sizes.step_tokens // count
        ms = decode_ms(llm, requests, sizes)
        yield {"phase": "decode", "deltas": count, "rows_per_delta": 1, "ms": ms}
        ms = prompt_ms(llm, requests, sizes, each)
        yield {"phase": "prompt", "deltas": count, "rows_per_delta": each, "ms": ms}


def of_deltas(found: Options, ratio: float) -> Iterator[Row]:
    """This plugin."""
    count = max(found.sizes.steps)
    made = deltas(found.models, count, ratio)
    llm = engine(
        base(found.models, found.sizes),
        found.sizes,
        quantization="dqrelo",
        max_loras=count,
    )

    def request(i: int) -> LoRARequest:
        return load_delta(llm, made[i].name, str(made[i]))

    for row in measured(llm, request, found.sizes):
        yield {"system": "deltas", "ratio": ratio, **row}


def of_base(found: Options, _: float) -> Iterator[Row]:
    """vLLM alone: as many rows in a step, and those of each model on their own."""
    sizes = found.sizes
    llm = engine(base(found.models, sizes), sizes)
    for row in measured(llm, lambda i: None, sizes):
        yield {"system": "base", **row}
    one = decode_ms(llm, [None], sizes)
    for count in sizes.steps:
        each = sizes.step_tokens // count
        prompt = prompt_ms(llm, [None], sizes, each)
        for phase, rows, ms in (("decode", 1, one), ("prompt", each, prompt)):
            row = {"phase": phase, "deltas": count, "rows_per_delta": rows}
            yield {"system": "merged", **row, "ms": count * ms}


def of_lora(found: Options, ratio: float) -> Iterator[Row]:
    """vLLM's own LoRA: one adapter, under as many names."""
    count, folder = max(found.sizes.steps), base(found.models, found.sizes)
    (made,) = deltas(found.models, 1, ratio)
    adapter = found.models / f"lora-1-{round(1 / ratio)}"
    rank = write_adapter(adapter, Checkpoint(folder), delta_bytes(str(made)))
    llm = engine(
        folder,
        found.sizes,
        enable_lora=True,
        max_loras=count,
        max_lora_rank=rank,
    )

    def request(i: int) -> LoRARequest:
        return LoRARequest(f"lora-{i}", i + 1, str(adapter))

    for row in measured(llm, request, found.sizes):
        yield {"system": "lora", "ratio": ratio, "rank": rank, **row}


def write_adapter(folder: Path, source: Checkpoint, size: int) -> int:
    """Write an adapter of the base's linear layers; its rank.

    Args:
        size: in bytes, that it should have; the nearest rank that vLLM takes.
    """
    shapes = {
        name.removesuffix(".weight"): source.spec(name)[1]
        for name in source
        if ".layers." in name and len(source.spec(name)[1]) == 2
    }
    wanted = size / (2 * sum(n + k for n, k in shapes.values()))
    rank = min(LORA_RANKS, key=lambda one: abs(one - wanted))
    tensors = {}
    for name, (n, k) in shapes.items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, k).to(DTYPE) / k**0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(n, rank).to(DTYPE) / 50
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(source.folder),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in shapes}),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return rank


def measure(
    system: Callable[[Options, float], Iterator[Row]], found: Options, ratio: float
) -> None:
    """Write the rows of one system, each as soon as it is known."""
    table = Table(found.output / "steps.csv", KEYS, COLUMNS)
    cuda = torch.cuda.is_available()
    about = {"device": torch.cuda.get_device_name() if cuda else "cpu", **machine()}
    for row in system(found, ratio):
        table.add({**row, "ms": f"{row['ms']:.3f}", **about})


def main() -> None:
    """Each system in a process of its own, which frees the GPU when it ends."""
    found = options()
    first, *others = found.sizes.ratios
    systems = [(of_deltas, first), (of_base, first), (of_lora, first)]
    for ratio in others:
        systems += [(of_deltas, ratio), (of_lora, ratio)]
    for system, ratio in systems:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(measure, system, found, ratio).result()


if __name__ == "__main__":
    main()
