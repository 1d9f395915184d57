# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M and any number of fine-tunes of it: as deltas, merged, as adapters.

What is not in .cache is made. ``make demo`` and the benchmarks share the base, three
fine-tunes and their deltas. Each further fine-tune is one of the three whose matrices
are at another strength, ``base + c * change`` with c < 1: other values, another digest,
as many bytes.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import ENVIRONMENT
from benchmarks.models.bases import fetch_base
from benchmarks.models.tasks import TASKS
from benchmarks.paths import CACHE, DQRELO
from dqrelo_tools.export import export
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import weight_files, write_delta
from vllm_dqrelo.format.folder import file_bytes, new_folder
from vllm_dqrelo.format.tensors import LORA_SCALE, SCALE

DEMO, MORE = CACHE / "demo", CACHE / "serving"
RATIO, HALF_RATIO = "0.125", "0.0625"
WEAKER = 1 / 64  # by which each further strength is lower
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def base() -> Path:
    """The folder of the base."""
    return fetch_base(DEMO / "base")


def fine_tune(task: str) -> Path:
    """The folder of the fine-tune of a task."""
    command = ["-m", "benchmarks.models.finetune", "--base", base(), "--task", task]
    return make(DEMO / "finetunes" / task, *command)


def converted(task: str, ratio: str = RATIO) -> Path:
    """The folder of the delta of that fine-tune, in ``ratio`` of its bytes."""
    name = task if ratio == RATIO else f"{task}-{ratio}"
    command = [*DQRELO, "convert", "--base", base(), "--model", fine_tune(task)]
    return make(DEMO / "deltas" / name, *command, "--ratio", ratio)


def make(folder: Path, *command: str | Path) -> Path:
    """Run the Python program that writes ``folder``, unless it is there already."""
    if not folder.exists():
        argv = (sys.executable, *command, "--output", folder)
        environment = {**os.environ, **ENVIRONMENT}
        if subprocess.run(argv, stdout=sys.stderr, env=environment).returncode:
            raise SystemExit(f"{folder} could not be made; the reason is above.")
    return folder


def delta(number: int, ratio: str = RATIO) -> Path:
    """The folder of the delta of model ``number`` = 0, 1, ..."""
    times, task = divmod(number, len(TASKS))
    whole = converted([*TASKS][task], ratio)
    if not times:
        return whole
    name = f"delta-{number}" if ratio == RATIO else f"delta-{number}-{ratio}"
    return weaker(whole, 1 - times * WEAKER, MORE / name)


def weaker(source: Path, strength: float, folder: Path) -> Path:
    """A delta with all matrices multiplied by ``strength``."""
    if not folder.exists():
        (file,) = weight_files(source)
        tensors = load_file(file)
        for name in tensors:
            if name.endswith((SCALE, LORA_SCALE)):
                tensors[name] *= strength
        config = DeltaConfig.read(source)
        with new_folder(folder) as made:
            write_delta(
                made, replace(config, method=f"{config.method} x{strength}"), tensors
            )
    return folder


def merged(number: int) -> Path:
    """The folder of model ``number`` as a whole."""
    folder = MORE / f"merged-{number}"
    if not folder.exists():
        export(str(base()), delta(number), folder)
    return folder


def adapter(number: int) -> tuple[Path, int]:
    """A LoRA adapter of random values in as many bytes as a delta, and its rank.

    One rank for all linear layers; it has no embedding and no norms.
    """
    checkpoint = Checkpoint(base())
    shapes = {
        name.removesuffix(".weight"): checkpoint.spec(name)[1]
        for name in checkpoint
        if name.split(".")[-2] in LINEARS
    }
    size = file_bytes(weight_files(delta(number)))
    rank = size // sum(2 * sum(shape) for shape in shapes.values())
    folder = MORE / f"adapter-{number}"
    if not folder.exists():
        torch.manual_seed(number)
        tensors = {}
        for name, (n, k) in shapes.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = 1e-3 * torch.randn(rank, k).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = 1e-3 * torch.randn(n, rank).bfloat16()
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        config |= {"target_modules": LINEARS, "base_model_name_or_path": str(base())}
        with new_folder(folder) as made:
            save_file(tensors, made / "adapter_model.safetensors")
            (made / "adapter_config.json").write_text(json.dumps(config))
    return folder, rank
