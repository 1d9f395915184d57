# SPDX-License-Identifier: Apache-2.0
"""What a base takes on the CPU, and what ``dqrelo plan --device cpu`` counts for it.

    python -m benchmarks.memory.base

SmolLM2-135M and models of random weights in bfloat16, whose LM head is the embedding or
another matrix, each in a process of its own; memory is measured as in
memory.py.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen3Config,
)

from benchmarks.machine import MACHINE, machine
from benchmarks.memory.memory import ALONE, engine
from benchmarks.models.smollm import base
from benchmarks.paths import RESULTS
from benchmarks.table import Table
from dqrelo_tools.footprint import base_bytes

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "max_position_embeddings": 256,
}
WIDE, GROUPED = {"intermediate_size": 2048}, {"num_key_value_heads": 4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
CONFIGS: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**SIZES, **WIDE, **GROUPED, **UNTIED),
    "Llama, tied": LlamaConfig(**SIZES, **WIDE, **GROUPED, **TIED),
    "Qwen3, tied": Qwen3Config(**SIZES, **WIDE, **GROUPED, **TIED),
    "OPT, tied": OPTConfig(**SIZES, ffn_dim=2048, word_embed_proj_dim=768, **TIED),
    "GPT-NeoX": GPTNeoXConfig(**SIZES, **WIDE, **UNTIED),
    "Mixtral": MixtralConfig(**SIZES, **WIDE, **GROUPED, **UNTIED, num_local_experts=4),
}


def bases(scratch: Path) -> Iterator[tuple[str, Path]]:
    """Names and folders."""
    yield "SmolLM2-135M, tied", base()
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(scratch / name)
        yield name, scratch / name


COLUMNS = ("base", "weights_mb", "predicted_mb", "measured_mb", *MACHINE)


def measure(folder: Path) -> dict[str, float]:
    """Megabytes of a base in this process, and what is counted."""
    _, weights = engine(folder, quantization="dqrelo", max_loras=1)
    sizes = {
        "weights": base_bytes(str(folder)),
        "predicted": base_bytes(str(folder), "cpu"),
        "measured": weights,
    }
    return {f"{what}_mb": round(size / 1e6, 2) for what, size in sizes.items()}


def main() -> None:
    """Each base in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    path = parser.parse_args().output_dir / "bases.csv"
    path.unlink(missing_ok=True)
    table = Table(path, ("base",), COLUMNS)
    os.environ.update(ALONE, VLLM_PLUGINS="dqrelo")
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder in bases(Path(scratch)):
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                found = pool.submit(measure, folder).result()
            table.add({"base": name, **found, **machine()})
            print(name, *(f"{key}={value}" for key, value in found.items()))


if __name__ == "__main__":
    main()
