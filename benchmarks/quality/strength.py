# SPDX-License-Identifier: Apache-2.0
"""How long a low-rank part should be: KL on a fine-tune's task and on other text.

    python -m benchmarks.quality.strength [--output strength.csv] [--only NAME]

The fine-tunes differ in learning rate and steps. A low-rank part without sign planes
is multiplied by its ``compress.strength`` with several limits; 1 is the part as it is.
Rows that the file has already are not measured again.
"""

import argparse
from pathlib import Path

from benchmarks.machine import MACHINE, machine
from benchmarks.paths import RESULTS
from benchmarks.quality.bench import Bench, FineTune, State, Training
from benchmarks.quality.quality import HALF, OURS
from benchmarks.table import Table
from dqrelo_tools import compress
from dqrelo_tools.compress import Factors

FINE_TUNES = (
    Training("queries", 10),
    Training("orders", 20, lr=1e-3),
    Training("tickets", 30),
)
RATIOS = (1 / 16, 1 / 32)
LIMITS = (1.0, 1.02, 1.05, 1.1)

COLUMNS = ("fine_tune", "ratio", "limit", "kl", "top1", "kl_off_task")
COLUMNS += ("top1_off_task", *MACHINE)


def measure(model: FineTune, table: Table) -> None:
    """Add the rows of one fine-tune."""
    name, changes = model.name, model.changes
    for ratio in RATIOS:
        if all((name, f"{ratio:g}", f"{limit:g}") in table for limit in LIMITS):
            continue
        kept: State = {}
        for parameter, change in changes.items():
            if change.ndim == 2:
                size = OURS.size(*change.shape, ratio, HALF)
                kept[parameter] = Factors.of(change, size.rank, size.dtype).dense()
        for limit in LIMITS:
            compress.MAX_STRENGTH = limit
            approximate = dict(model.state)
            for parameter, part in kept.items():
                change = changes[parameter]
                factor = compress.strength(change, change - part)
                approximate[parameter] = model.bench.base[parameter] + factor * part
            row = {"fine_tune": name, "ratio": f"{ratio:g}", "limit": f"{limit:g}"}
            row |= model.distances(approximate)
            print(*row.values(), flush=True)
            table.add({**row, **machine()})


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "strength.csv")
    parser.add_argument("--only", help="one fine-tune, such as orders-20-0.001")
    arguments = parser.parse_args()
    table = Table(arguments.output, ("fine_tune", "ratio", "limit"), COLUMNS)
    bench = Bench()
    for training in FINE_TUNES:
        if arguments.only in (None, training.name):
            measure(FineTune(bench, training), table)


if __name__ == "__main__":
    main()
