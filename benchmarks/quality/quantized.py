# SPDX-License-Identifier: Apache-2.0
"""What a delta on a quantised base keeps of a fine-tune, and what it repairs.

    python -m benchmarks.quality.quantized [--output-dir benchmarks/results]

Full fine-tunes of SmolLM2-135M (quality.py), and the base rounded to the
nearest: integers of four bits with a scale for 64 columns, of eight with one for each
row. Embeddings, which are the LM head, and norms stay in 16 bits, and activations too.
A delta is made from the 16-bit base, or from what the rounded one stands for. Rows that
``quantized.csv`` has already are not measured again.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.machine import MACHINE, machine
from benchmarks.models.tasks import TASKS
from benchmarks.paths import RESULTS
from benchmarks.quality.bench import Bench, FineTune, State, Training
from benchmarks.quality.quality import of
from benchmarks.table import Table
from dqrelo_tools.method import METHODS

RATIO = 1 / 8
STEPS = 30
# Bits of a weight, columns that share a scale.
BASES: dict[str, tuple[int, int | None]] = {"w4": (4, 64), "w8": (8, None)}
KEYS = ("fine_tune", "base", "delta_of")
COLUMNS = (*KEYS, "kl", "top1", *MACHINE)


def rounded(weight: torch.Tensor, bits: int, columns: int | None) -> torch.Tensor:
    """The nearest multiples of a scale, in bfloat16 as they are served."""
    groups = weight.unflatten(1, (-1, columns or weight.shape[1]))
    most = 2 ** (bits - 1) - 1
    scale = (groups.abs().amax(-1, keepdim=True) / most).clamp_min(1e-12)
    whole = (groups / scale).round().clamp(-most - 1, most)
    return (whole * scale).flatten(1).bfloat16().float()


def quantised(base: State, name: str) -> State:
    """A base whose linear layers are rounded."""
    bits, columns = BASES[name]
    return {
        key: rounded(tensor, bits, columns) if "_proj" in key else tensor
        for key, tensor in base.items()
    }


def change(model: FineTune, reference: State) -> State:
    """What the delta of a fine-tune from ``reference`` adds to each parameter."""
    method = of(METHODS["dqrelo"], RATIO)
    exact = {name: tensor - reference[name] for name, tensor in model.state.items()}
    return {
        name: method(name, exact)[0] if change.ndim == 2 and change.any() else change
        for name, change in exact.items()
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    output = parser.parse_args().output_dir
    table, bench = Table(output / "quantized.csv", KEYS, COLUMNS), Bench()
    bases = {"16 bits": bench.base}
    bases |= {name: quantised(bench.base, name) for name in BASES}
    for task in TASKS:
        model = FineTune(bench, Training(task, STEPS))
        for reference in (None, *bases):
            served = [reference] if reference in BASES else list(bases)
            label = f"{reference} base" if reference else "none"
            missing = [b for b in served if (model.name, b, label) not in table]
            if not missing:
                continue
            added = change(model, bases[reference]) if reference else {}
            for base in missing:
                state = {n: t + added.get(n, 0) for n, t in bases[base].items()}
                found = model.distances(state)
                row = dict(zip(KEYS, (model.name, base, label), strict=True))
                row |= {"kl": found["kl"], "top1": found["top1"]}
                table.add({**row, **machine()})
    print(f"{table.path} is complete")


if __name__ == "__main__":
    main()
