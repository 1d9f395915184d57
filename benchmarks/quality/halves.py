# SPDX-License-Identifier: Apache-2.0
"""Which low-rank parts are better in halves: KL on a task and on other text.

    python -m benchmarks.quality.halves [--output halves.csv] [--only NAME]

Every low-rank part without sign planes is fitted at once, or that of the embedding in
halves, or all of them (``compress.Factors``); each has its ``compress.strength``. Rows
that the file has already are not measured again.
"""

import argparse
from itertools import product
from pathlib import Path

from benchmarks.machine import MACHINE, machine
from benchmarks.paths import RESULTS
from benchmarks.quality import strength
from benchmarks.quality.bench import Bench, FineTune, Training
from benchmarks.quality.quality import HALF, OURS
from benchmarks.table import Table
from dqrelo_tools import compress
from dqrelo_tools.compress import Factors
from vllm_dqrelo.format.checkpoint import EMBEDDINGS, ends_with

FINE_TUNES = (*strength.FINE_TUNES, Training("orders", 30))
IN_HALVES = ("none", "embedding", "all")

COLUMNS = ("fine_tune", "ratio", "in_halves", "relative_error", "kl", "top1")
COLUMNS += ("kl_off_task", "top1_off_task", *MACHINE)


def measure(model: FineTune, table: Table) -> None:
    """Add the rows of one fine-tune."""
    name, state, base = model.name, model.state, model.bench.base
    for ratio, which in product(strength.RATIOS, IN_HALVES):
        if (name, f"{ratio:g}", which) in table:
            continue
        approximate, missed, whole = dict(state), 0.0, 0.0
        for parameter, tensor in state.items():
            if tensor.ndim != 2:
                continue
            change = tensor - base[parameter]
            size = OURS.size(*change.shape, ratio, HALF)
            embedding = which == "embedding" and ends_with(parameter, EMBEDDINGS)
            fit = Factors.in_halves if which == "all" or embedding else Factors.of
            part = fit(change, size.rank, size.dtype).dense()
            missed += float((change - part).square().sum())
            whole += float(change.square().sum())
            factor = compress.strength(change, change - part)
            approximate[parameter] = base[parameter] + factor * part
        row = {"fine_tune": name, "ratio": f"{ratio:g}", "in_halves": which}
        row["relative_error"] = f"{(missed / whole) ** 0.5:.5f}"
        row |= model.distances(approximate)
        print(*row.values(), flush=True)
        table.add({**row, **machine()})


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "halves.csv")
    parser.add_argument("--only", help="one fine-tune, such as orders-20-0.001")
    arguments = parser.parse_args()
    table = Table(arguments.output, ("fine_tune", "ratio", "in_halves"), COLUMNS)
    bench = Bench()
    for training in FINE_TUNES:
        if arguments.only in (None, training.name):
            measure(FineTune(bench, training), table)


if __name__ == "__main__":
    main()
