# SPDX-License-Identifier: Apache-2.0
"""Did deltas become slower? Their time against the base's and LoRA's, and history.

    python -m benchmarks.check [--record]

The steps of ``ops/cpu.py``, by the default method. Deltas, the base's own matrix
products and vLLM's LoRA at equal bytes are timed by turns in one process. Only the
ratios of the shortest times are compared, with the newest rows of the same kind of
machine in results/history.csv. A ratio may be ``BAND`` times the old ratio, a choice:
record twice on a quiet machine to see what ``BAND`` is worth there.

``--record`` adds the new ratios to the history. A kind of machine without a history
passes, and its ratios are added. Rows without a ``cpu_id`` are older than that column:
they are compared only on machines that do not have one either.

Last, the check names the results files that are older than the code that they measure
(age.py). An old file is not an error.
"""

import argparse
import sys
from collections.abc import Callable

import torch

from benchmarks.age import older
from benchmarks.machine import MACHINE, cpu_id, cpuinfo, machine
from benchmarks.ops.cpu import Base, Deltas, Loras, best_ms
from benchmarks.paths import RESULTS
from benchmarks.table import Table

HISTORY = RESULTS / "history.csv"
STEPS = [[8], [2] * 4, [1] * 8, [32]]  # rows of each delta
TURNS, SECONDS = 5, 0.5  # of each, and for how long
BAND = 1.25
RATIOS = ("delta_to_base", "delta_to_lora")
COLUMNS = ("rows", *RATIOS, "threads", *MACHINE, "cpu_id")


def shortest(runs: list[Callable[[], None]]) -> list[float]:
    """Milliseconds of each, the shortest of all turns."""
    turns = [[best_ms(run, SECONDS) for run in runs] for _ in range(TURNS)]
    return [min(times) for times in zip(*turns, strict=True)]


def slower(new: dict[str, str], old: dict[str, str]) -> list[str]:
    """What is beyond the band, in words."""
    return [
        f"{new['rows']} rows: {name} is {new[name]}, was {old[name]} at {old['commit']}"
        for name in RATIOS
        if float(new[name]) > BAND * float(old[name])
    ]


def last(history: list[dict[str, str]], row: dict[str, str]) -> dict[str, str] | None:
    """The newest row of the same step on the same kind of machine."""
    same = ("cpu", "cpu_id", "cores", "threads", "rows")
    found = [old for old in history if all(old[key] == row[key] for key in same)]
    return found[-1] if found else None


def main() -> None:
    """Measure, print, compare; exit with 1 if something became slower."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--record", action="store_true", help="add to a history")
    record = parser.parse_args().record
    history = Table(HISTORY, ("commit", "rows"), COLUMNS)
    before = list(history.rows)
    about = {"threads": torch.get_num_threads(), **machine()}
    about["cpu_id"] = cpu_id(cpuinfo())
    deltas, base, loras = Deltas(8, "dqrelo"), Base(), Loras(8)
    problems, unknown = [], False
    for step in STEPS:
        runs = [deltas.step(step), base.step(step), loras.step(step)]
        ours, theirs, lora = shortest(runs)
        row = {
            "rows": "+".join(map(str, step)),
            "delta_to_base": f"{ours / theirs:.3f}",
            "delta_to_lora": f"{ours / lora:.3f}",
            **{key: str(value) for key, value in about.items()},
        }
        old = last(before, row)
        shown = {name: (row[name], old[name] if old else "new") for name in RATIOS}
        print(f"{row['rows']:<18}", *(f"{n} {a} ({b})" for n, (a, b) in shown.items()))
        problems += slower(row, old) if old else []
        unknown |= old is None
        if record or old is None:
            history.add(row)
    if unknown:
        kind = f"{about['cpu']} ({about['cpu_id']}), {about['cores']} cores"
        print(f"not a history of {kind} yet: measured, recorded")
    if names := older():
        print("older than the code that they measure:", *names, sep="\n  ")
    if problems:
        sys.exit("slower, by more than noise:\n" + "\n".join(problems))


if __name__ == "__main__":
    main()
