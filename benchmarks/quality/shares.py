# SPDX-License-Identifier: Apache-2.0
"""How many of a delta's bytes embedding and LM head should take: KL of several shares.

    python -m benchmarks.quality.shares [--output shares.csv] [--only NAME]

The fine-tunes are of Gemma 3 270M, five eighths of whose weights are the embedding's,
and of SmolLM2-135M, where they are a fifth. A share of 1 leaves all matrices the same
ratio (``Method.ratios``). Rows that the file has already are not measured again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.machine import MACHINE, machine
from benchmarks.paths import RESULTS
from benchmarks.quality.bench import Bench, FineTune, Training
from benchmarks.quality.quality import OURS, approximated, of
from benchmarks.table import Table
from dqrelo_tools import method

FINE_TUNES = {
    Training("orders", 20, base="gemma3"): (1.0, 0.35, 0.25, 0.15),
    Training("queries", 60, lr=5e-5, base="gemma3"): (1.0, 0.35, 0.25, 0.15),
    Training("tickets", 30, lr=1e-4, base="gemma3"): (1.0, 0.35, 0.25, 0.15),
    Training("orders", 30): (1.0, 0.15),
    Training("queries", 10): (1.0, 0.15),
}
RATIOS = (1 / 8, 1 / 16, 1 / 32)

COLUMNS = ("fine_tune", "ratio", "most_of_tokens", "bits_per_weight", "relative_error")
COLUMNS += ("kl", "top1", "kl_off_task", "top1_off_task", *MACHINE)


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "shares.csv")
    parser.add_argument("--only", help="one fine-tune, such as gemma3-orders-20")
    arguments = parser.parse_args()
    method.MANY = 0.0  # every share is divided
    keys = ("fine_tune", "ratio", "most_of_tokens")
    table, bench = Table(arguments.output, keys, COLUMNS), None
    for training, shares in FINE_TUNES.items():
        if arguments.only not in (None, training.name):
            continue
        if bench is None or bench.name != training.base:
            bench = Bench(training.base)
        model = FineTune(bench, training)
        for ratio in RATIOS:
            for share in shares:
                key = (model.name, f"{ratio:g}", f"{share:g}")
                if key in table:
                    continue
                divided = of(replace(OURS, most_of_tokens=share), ratio)
                state, numbers = approximated(model, divided)
                row = dict(zip(keys, key, strict=True)) | numbers
                row |= model.distances(state)
                print(*row.values(), flush=True)
                table.add({**row, **machine()})


if __name__ == "__main__":
    main()
