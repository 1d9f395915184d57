# SPDX-License-Identifier: Apache-2.0
"""What n models take and how long a step over them is: the paper's Table 4, on a CPU.

    python benchmarks/benchmark_memory.py

SmolLM2-135M in bfloat16. One sequence for each of n models decodes; a step gives each
one more token. Three ways: deltas on one base; vLLM's own LoRA, adapters of as many
bytes; full copies, whose steps come one after another, so that one model is timed and
counted n times. Each way has a process of its own, and memory is what that process grew
by (anonymous pages: no file mapping), beside what ``dqrelo plan`` counts for the same
files. A last table is ``dqrelo plan``'s alone: models on one card of 80 GB.
"""

import argparse
import ctypes
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from machine import machine
from server import ENVIRONMENT
from table import Table

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (2, 4, 8, 16)
SYSTEMS = ("deltas", "vLLM LoRA", "full copies")
PROMPT, STEPS = 8, 12  # tokens of a prompt, and steps that are timed


def anonymous() -> int:
    """Bytes of this process that are no file's, now; what is free is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    text = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    if found is None:
        raise SystemExit("/proc/self/status has no RssAnon: this needs Linux")
    return 1024 * int(found[1])


def grown(work: Callable[..., Any], sizes: list[int]) -> Callable[..., Any]:
    """``work``, which notes how many bytes it added to this process."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = anonymous()
        result = work(*args, **kwargs)
        sizes.append(anonymous() - before)
        return result

    return run


def engine(model: Path, **options: Any) -> tuple[Any, int]:
    """A model in this process, and the bytes that its weights added to it."""
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    sizes: list[int] = []
    BaseModelLoader.load_model = grown(BaseModelLoader.load_model, sizes)
    llm = LLM(
        str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=max(MODELS),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options,
    )
    return llm, sizes[0]


def step_ms(llm: Any, requests: Sequence[Any]) -> float:
    """The shortest decode step in which every request has one row."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=STEPS + 2, ignore_eos=True, detokenize=False)
    core, times = llm.llm_engine, []
    for i, request in enumerate(requests):
        prompt = {"prompt_token_ids": [(7 * i + j) % 1000 for j in range(PROMPT)]}
        core.add_request(
            f"{time.monotonic_ns()}-{i}", prompt, sampling, lora_request=request
        )
    while core.has_unfinished_requests():
        start = time.perf_counter()
        outputs = core.step()
        seconds = time.perf_counter() - start
        lengths = [len(out.outputs[0].token_ids) for out in outputs]
        if len(outputs) == len(requests) and min(lengths) > 1:
            times.append(seconds)
    return 1000 * min(times)


def deltas() -> list[dict[str, Any]]:
    """One base and a delta for each model."""
    from models import base, delta

    from dqrelo_tools.footprint import base_bytes, delta_bytes
    from vllm_dqrelo import load_delta
    from vllm_dqrelo.format.delta import weight_files

    folders = [delta(i) for i in range(max(MODELS))]
    size = delta_bytes(str(folders[0]))
    room = {"delta_memory_gib": max(MODELS) * size / 2**30, "host_memory_gib": 8}
    llm, weights = engine(
        base(), quantization="dqrelo", max_loras=max(MODELS),
        additional_config={"dqrelo": room},
    )  # fmt: skip
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    manager = worker.model_runner.lora_manager
    host: list[int] = []
    load = grown(load_delta, host)
    rows, requests, expected = [], [], base_bytes(str(base()))
    for count in MODELS:
        requests += [
            load(llm, f"m{i}", str(folders[i])) for i in range(len(requests), count)
        ]
        step_ms(llm, requests)  # the deltas become resident, their code is warm
        resident = manager.residency.resident.values()
        files = [f for folder in folders[:count] for f in weight_files(folder)]
        rows.append(
            {
                "models": count,
                "weights_mb": weights + sum(one.size for one in resident),
                "predicted_mb": expected
                + sum(delta_bytes(str(f)) for f in folders[:count]),
                "disk_mb": sum(f.stat().st_size for f in files),
                "host_mb": sum(host),
                "step_ms": step_ms(llm, requests),
            }
        )
    return rows


def lora() -> list[dict[str, Any]]:
    """One base and an adapter of a delta's size for each model."""
    from models import adapter, base
    from vllm.lora.request import LoRARequest

    from dqrelo_tools.footprint import base_bytes

    made = [adapter(i) for i in range(max(MODELS))]
    llm, weights = engine(
        base(), enable_lora=True, max_loras=max(MODELS), max_lora_rank=64
    )
    requests = [LoRARequest(f"m{i}", i + 1, str(made[i][0])) for i in range(len(made))]
    rows = []
    for count in MODELS:
        files = [folder / "adapter_model.safetensors" for folder, _ in made[:count]]
        disk = sum(f.stat().st_size for f in files)
        step_ms(llm, requests[:count])
        rows.append(
            {
                "models": count,
                "predicted_mb": base_bytes(str(base())) + disk,
                "disk_mb": disk,
                "step_ms": step_ms(llm, requests[:count]),
            }
        )
    return rows


def copies() -> list[dict[str, Any]]:
    """A whole model for each."""
    from models import merged

    from dqrelo_tools.footprint import base_bytes

    folder = merged(0)
    llm, weights = engine(folder)
    step_ms(llm, [None])
    alone = step_ms(llm, [None])
    disk = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return [
        {
            "models": count,
            "weights_mb": count * weights,
            "predicted_mb": count * base_bytes(str(folder)),
            "disk_mb": count * disk,
            "step_ms": count * alone,
        }
        for count in MODELS
    ]


def main() -> None:
    """Measure the systems that the results lack, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--system", choices=SYSTEMS, help="measure this one, here")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    table = Table(arguments.output_dir / "memory.csv", ("system", "models"))
    if arguments.system is None:
        for system in SYSTEMS:
            if (system, str(MODELS[-1])) not in table:
                again = [sys.executable, *sys.argv, f"--system={system}"]
                plugins = "dqrelo" if system == "deltas" else ""
                variables = {**ENVIRONMENT, "VLLM_PLUGINS": plugins}
                variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
                subprocess.run(again, env={**os.environ, **variables}, check=True)
        return
    measure = dict(zip(SYSTEMS, (deltas, lora, copies), strict=True))
    for row in measure[arguments.system]():
        shown = {
            k: round(v / 1e6, 2) if k.endswith("_mb") else v for k, v in row.items()
        }
        shown["step_ms"] = round(row["step_ms"], 2)
        table.add({"system": arguments.system, **shown, **machine()})
        print(arguments.system, *(f"{k}={v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
