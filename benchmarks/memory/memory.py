# SPDX-License-Identifier: Apache-2.0
"""What n models take and how long a step over them is: the paper's Table 4, on a CPU.

    python -m benchmarks.memory.memory

SmolLM2-135M in bfloat16. One sequence for each of n models decodes; a step gives each
one more token. Ways: deltas of ratio 1/8 and 1/16 on one base; vLLM's own LoRA,
adapters of as many bytes as the first; full copies, whose steps come one after another,
so that one model is timed and counted n times. Each way has a process of its own, and
memory is what that process grew by (anonymous pages: no file mapping), beside what
``dqrelo plan --device cpu`` counts for the same files. What is measured was done before
in the same process, so that modules are imported. A last table is ``dqrelo plan``'s
alone: models on one card of 80 GB.
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
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import ENVIRONMENT, MACHINE, machine
from benchmarks.paths import RESULTS
from benchmarks.table import Table
from vllm_dqrelo.format.folder import file_bytes

MODELS = (2, 4, 8, 16)
SYSTEMS = ("deltas", "deltas of 1/16", "vLLM LoRA", "full copies")
COLUMNS = ("system", "models", "base_mb", "predicted_base_mb", "predicted_mb")
COLUMNS += ("device_mb", "host_mb", "disk_mb", "step_ms", "memory_mb", *MACHINE)
CARD_COLUMNS = ("stored_as", "model_gb", "models")
Row = dict[str, Any]
PROMPT, STEPS = 8, 12  # tokens of a prompt, and steps that are timed
# Of a process that is measured. malloc_trim leaves what is free at the end of any arena
# but the first: in that of the thread that loads deltas 1 to 8 MB, now more, now less.
ALONE = {
    **ENVIRONMENT,
    "MALLOC_ARENA_MAX": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


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
    """A model in this process, and the bytes that its weights added to it.

    It is made twice, as the first adds 3 to 7 MB of imported modules and the like.
    """
    from vllm import LLM
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    sizes: list[int] = []
    BaseModelLoader.load_model = grown(BaseModelLoader.load_model, sizes)
    llm = None
    for _ in range(2):
        del llm
        # Now, as the end of the first ends what the second would share with it.
        gc.unfreeze()  # an engine has frozen all that there was at its start
        gc.collect()
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
    return llm, sizes[1]


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


def worker_of(llm: Any) -> Any:
    """vLLM's model runner, in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def deltas(half: bool = False) -> list[Row]:
    """One base and a delta for each model, of ratio 1/8 or of half of that."""
    from benchmarks.models.smollm import HALF_RATIO, RATIO, base, delta
    from dqrelo_tools.footprint import base_bytes, delta_bytes
    from vllm_dqrelo import load_delta
    from vllm_dqrelo.format.delta import weight_files

    most = max(MODELS)
    ratio = HALF_RATIO if half else RATIO
    folders = [delta(i, ratio) for i in range(most)]
    bytes_of = [delta_bytes(str(folder)) for folder in folders]
    room = {"delta_memory_gib": sum(bytes_of) / 2**30, "host_memory_gib": 8}
    llm, weights = engine(
        base(),
        quantization="dqrelo",
        max_loras=most,
        additional_config={"dqrelo": room},
    )
    host: list[int] = []
    device: list[int] = []
    for _ in range(2):
        first = load_delta(llm, "m0", str(folders[0]))
        llm.llm_engine.remove_lora(first.lora_int_id)
    load, residency = grown(load_delta, host), worker_of(llm).lora_manager.residency
    use = residency.use
    rows: list[Row] = []
    requests: list[Any] = []
    for count in MODELS:
        for i in range(len(requests), count):
            requests.append(load(llm, f"m{i}", str(folders[i])))
        residency.use = grown(use, device)
        step_ms(llm, requests)  # they become resident
        residency.use = use
        files = [f for folder in folders[:count] for f in weight_files(folder)]
        rows.append(
            {
                "models": count,
                "base_mb": weights,
                "predicted_base_mb": base_bytes(str(base()), "cpu"),
                "predicted_mb": sum(bytes_of[:count]),
                "device_mb": sum(device),
                "host_mb": sum(host),
                "disk_mb": file_bytes(files),
                "step_ms": step_ms(llm, requests),
            }
        )
    return rows


def lora() -> list[Row]:
    """One base and an adapter of a delta's size for each model."""
    from vllm.lora.request import LoRARequest

    from benchmarks.models.smollm import adapter, base
    from dqrelo_tools.footprint import base_bytes

    most = max(MODELS)
    made = [adapter(i)[0] / "adapter_model.safetensors" for i in range(most)]
    llm, weights = engine(base(), enable_lora=True, max_loras=most, max_lora_rank=64)
    slots = sum(
        tensor.nbytes
        for module in worker_of(llm).model.modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in getattr(module, name, ())
    )
    requests = [
        LoRARequest(f"m{i}", i + 1, str(file.parent)) for i, file in enumerate(made)
    ]
    rows = []
    for count in MODELS:
        rows.append(
            {
                "models": count,
                "base_mb": weights,
                "predicted_base_mb": base_bytes(str(base()), "cpu"),
                "device_mb": slots * count / most,
                "disk_mb": file_bytes(made[:count]),
                "step_ms": step_ms(llm, requests[:count]),
            }
        )
    return rows


def copies() -> list[Row]:
    """A whole model for each."""
    from benchmarks.models.smollm import merged
    from dqrelo_tools.footprint import base_bytes

    folder = merged(0)
    llm, weights = engine(folder)
    step_ms(llm, [None])
    alone = step_ms(llm, [None])
    disk = file_bytes(folder.glob("*.safetensors"))
    return [
        {
            "models": count,
            "base_mb": count * weights,
            "predicted_base_mb": count * base_bytes(str(folder), "cpu"),
            "device_mb": 0,
            "disk_mb": count * disk,
            "step_ms": count * alone,
        }
        for count in MODELS
    ]


def cards() -> list[Row]:
    """How many fine-tunes of Llama-3.1-8B one card holds, as ``dqrelo plan`` counts."""
    import torch

    from dqrelo_tools.method import METHODS
    from dqrelo_tools.simulate import Fleet

    h, kv, wide, vocab, layers = 4096, 1024, 14336, 128256, 32
    layer = [(h, h), (kv, h), (kv, h), (h, h), (wide, h), (wide, h), (h, wide)]
    shapes = layer * layers + [(vocab, h)] * 2
    norms = 4 * h * (2 * layers + 1)  # stored exactly, in float32
    base = 2 * sum(n * k for n, k in shapes) + norms // 2
    sizes = {"full copies": base}
    for ratio in (1 / 4, 1 / 8, 1 / 16):
        fits = partial(METHODS["dqrelo"].size, ratio=ratio, half=torch.bfloat16)
        matrices = sum(fits(n, k).bytes(n, k) for n, k in shapes)
        sizes[f"deltas of ratio 1/{1 / ratio:g}"] = matrices + norms
    rows = []
    for name, size in sizes.items():
        whole = name == "full copies"
        fleet = Fleet(
            base=0 if whole else base,
            delta=size,
            models=10**6,
            gpus=1,
            gpu_memory=80 * 10**9,
            gpu_memory_utilization=0.92,
            kv=20 * 10**9,
            host=0,
            disk=1,
            link=1,
            rate=1,
            hit_rate=1,
        )
        gb = round(size / 1e9, 3)
        rows.append({"stored_as": name, "model_gb": gb, "models": fleet.resident})
    return rows


def main() -> None:
    """Measure the systems that the results lack, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--system", choices=SYSTEMS, help="measure this one, here")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output_dir / "memory.csv"
    table = Table(path, ("system", "models"), COLUMNS)
    if arguments.system is None:
        fits = Table(path.with_name("cards.csv"), ("stored_as",), CARD_COLUMNS)
        for row in cards():
            if (row["stored_as"],) not in fits:
                fits.add(row)
        for system in SYSTEMS:
            if (system, str(MODELS[-1])) not in table:
                again = [sys.executable, "-m", "benchmarks.memory.memory"]
                again += [f"--system={system}", f"--output-dir={path.parent}"]
                plugins = "dqrelo" if system.startswith("deltas") else ""
                variables = {**ALONE, "VLLM_PLUGINS": plugins}
                subprocess.run(again, env={**os.environ, **variables}, check=True)
        return
    ways = (deltas, partial(deltas, half=True), lora, copies)
    measure = dict(zip(SYSTEMS, ways, strict=True))
    for row in measure[arguments.system]():
        row["memory_mb"] = row["base_mb"] + row["device_mb"]
        shown = {
            k: round(v / 1e6, 2) if k.endswith("_mb") else v for k, v in row.items()
        }
        shown["step_ms"] = round(row["step_ms"], 2)
        table.add({"system": arguments.system, **shown, **machine()})
        print(arguments.system, *(f"{k}={v}" for k, v in shown.items()))


if __name__ == "__main__":
    main()
