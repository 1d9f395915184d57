# SPDX-License-Identifier: Apache-2.0
"""What each worker holds of a base and of its deltas, which it shares with another.

    python -m benchmarks.memory.workers

A Llama of random weights in bfloat16 and four deltas of ratio 1/8, of every matrix: in
one worker; in two (``--tensor-parallel-size 2``); in two that share both factors of a
matrix (``--fully-sharded-loras``). Memory is what the first worker's process grew by
(anonymous pages), for the base's weights and for the deltas in the arena.
"""

import argparse
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.machine import ENVIRONMENT, MACHINE, machine

os.environ.update(ENVIRONMENT)
os.environ["VLLM_PLUGINS"] = "dqrelo"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm import LLM
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.v1.worker.cpu_worker import CPUWorker

from benchmarks.memory.memory import grown, step_ms
from benchmarks.models.smollm import weaker
from benchmarks.paths import RESULTS
from benchmarks.table import Table
from dqrelo_tools.convert import convert
from vllm_dqrelo import load_delta

DELTAS = 4
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=256,
)
WAYS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"tensor_parallel_size": 2},
    "two, fully sharded": {"tensor_parallel_size": 2, "fully_sharded_loras": True},
}
COLUMNS = ("workers", "base_mb", "delta_mb", "base_of_one", "delta_of_one", *MACHINE)


def made(folder: Path) -> list[Path]:
    """A base, and deltas of it."""
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
    convert(str(folder / "base"), str(folder / "tuned"), folder / "delta-0", 1 / 8)
    more = [
        weaker(folder / "delta-0", 1 - i / 64, folder / f"delta-{i}")
        for i in range(1, DELTAS)
    ]
    return [folder / "base", folder / "delta-0", *more]


class Watched(CPUWorker):
    """A worker that notes what its process grows by."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the base; and see what it takes, and what deltas will."""
        self.base: list[int] = []
        self.resident: list[int] = []
        loader: Any = BaseModelLoader
        loader.load_model = grown(loader.load_model, self.base)
        super().load_model(*args, **kwargs)
        residency = self.model_runner.lora_manager.residency
        residency.use = grown(residency.use, self.resident)

    def held(self) -> tuple[int, int]:
        """Bytes of the base and of all resident deltas."""
        return self.base[0], sum(self.resident)


def measure(way: str, base: Path, deltas: list[Path]) -> dict[str, float]:
    """One engine, in this process and those of its workers."""
    llm = LLM(
        str(base),
        quantization="dqrelo",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=DELTAS,
        max_loras=DELTAS,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        worker_cls="benchmarks.memory.workers.Watched",
        **WAYS[way],
    )
    requests = [load_delta(llm, delta.name, str(delta)) for delta in deltas]
    step_ms(llm, requests)  # they become resident
    weights, resident = llm.collective_rpc("held")[0]
    return {
        "base": weights / 1e6,
        "delta": resident / DELTAS / 1e6,
    }


def main() -> None:
    """Each way in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output_dir / "workers.csv"
    path.unlink(missing_ok=True)
    table, alone = Table(path, ("workers",), COLUMNS), None
    with tempfile.TemporaryDirectory() as folder:
        base, *deltas = made(Path(folder))
        for way in WAYS:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(measure, way, base, deltas).result()
            alone = alone or found
            shown = {f"{what}_mb": round(found[what], 2) for what in found}
            for what in found:
                shown[f"{what}_of_one"] = round(found[what] / alone[what], 3)
            table.add({"workers": way, **shown, **machine()})
            print(way, *(f"{key}={value}" for key, value in shown.items()))


if __name__ == "__main__":
    main()
