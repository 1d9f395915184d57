# SPDX-License-Identifier: Apache-2.0
"""What a conversion takes: seconds, and the most memory that was resident.

    python -m benchmarks.quality.convert [--output results.csv]

SmolLM2-135M and a fine-tune of it, from folders and, by ``delta_of``, from a model in
memory; and a random pair with the seven matrices of one layer of Llama-3.1-8B: a model
of 32 such layers takes 32 times as long.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.machine import machine
from benchmarks.models import smollm
from benchmarks.table import write

SMOLLM, LAYER_OF_8B = "SmolLM2-135M", "one layer of an 8B model"
CONVERT, DELTA_OF = "convert", "delta_of"
CASES = (
    (SMOLLM, CONVERT, "dqrelo", 1 / 8),
    (SMOLLM, CONVERT, "dqrelo", 1 / 16),
    (SMOLLM, CONVERT, "dqrelo-paper", 1 / 8),
    (SMOLLM, DELTA_OF, "dqrelo", 1 / 8),
    (SMOLLM, DELTA_OF, "dqrelo", 1 / 16),
    (LAYER_OF_8B, CONVERT, "dqrelo", 1 / 8),
    (LAYER_OF_8B, CONVERT, "dqrelo", 1 / 16),
    (LAYER_OF_8B, CONVERT, "dqrelo-paper", 1 / 8),
)
LAYER = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}


def layer(folder: Path) -> tuple[Path, Path]:
    """One layer of an 8B model, random, and a change of noise and of rank 64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    folders = (folder / "base", folder / "model")
    for path in folders:
        path.mkdir()
        (path / "config.json").write_text(json.dumps({}))
    for name, (n, k) in LAYER.items():
        base = 0.02 * random(n, k)
        change = 1e-3 * random(n, k) + 2e-4 * random(n, 64) @ random(64, k)
        for path, tensor in zip(folders, (base, base + change), strict=True):
            key = f"model.layers.0.{name}.weight"
            save_file({key: tensor.bfloat16()}, path / f"{name}.safetensors")
    index = {f"model.layers.0.{name}.weight": f"{name}.safetensors" for name in LAYER}
    for path in folders:
        file = path / "model.safetensors.index.json"
        file.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folders


# Prints the seconds of delta_of alone; a trainer has imported and loaded all of this.
IN_MEMORY = """
import sys, time, torch
from transformers import AutoModelForCausalLM
from vllm_dqrelo import delta_of
base, model, method, ratio = sys.argv[1:]
trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
start = time.perf_counter()
delta_of(base, trained, float(ratio), method=method)
print(time.perf_counter() - start)
"""


def measure(
    base: Path, model: Path, method: str, ratio: float, way: str
) -> dict[str, float]:
    """Convert in a process of its own.

    Args:
        way: CONVERT or DELTA_OF.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dqrelo_tools.cli", "convert"]
        command += ["--base", str(base), "--model", str(model), "--method", method]
        command += ["--output", f"{folder}/delta", "--ratio", str(ratio)]
        if way == DELTA_OF:
            command = [sys.executable, "-c", IN_MEMORY]
            command += [str(base), str(model), method, str(ratio)]
        start = os.times().elapsed
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = os.times().elapsed - start
        if status:
            raise SystemExit("the conversion failed; the reason is above")
    seconds = float(said.split()[-1]) if way == DELTA_OF else seconds
    return {"seconds": round(seconds, 1), "peak_mib": round(usage.ru_maxrss / 1024)}


def main() -> None:
    """Print the table, and write it with the machine and the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a CSV file to write as well")
    output = parser.parse_args().output
    about, rows = machine(), []
    # Linux counts the memory of who starts a process to the peak of that process.
    apart = ProcessPoolExecutor(1, get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder, apart as pool:
        pairs = {
            SMOLLM: (smollm.base(), smollm.fine_tune("orders")),
            LAYER_OF_8B: pool.submit(layer, Path(folder)).result(),
        }
        for name, way, method, ratio in CASES:
            found = measure(*pairs[name], method, ratio, way)
            case = {"model": name, "way": way, "method": method, "ratio": ratio}
            rows.append({**case, **found, **about})
            print(f"{name:<26}", way, method, ratio, *found.values(), sep="\t")
    if output:
        write(output, rows)


if __name__ == "__main__":
    main()
