# SPDX-License-Identifier: Apache-2.0
"""The cases of fuzz.py and fuzz_server.py, and what became of them."""

import argparse
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.table import Row, write

Mutation = Callable[[Any], None]
FAULT = "FAULT"  # begins an outcome that is a fault; its reason follows
SHOWN = 40  # faults that are printed
SAMPLES = 20  # of memory


def parse(about: str, cases: int) -> argparse.Namespace:
    """The command line of either; ``numbers`` are those of the cases.

    Args:
        about: the docstring of the module.
        cases: how many there are by default.
    """
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--cases", type=int, default=cases)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one case, by its number")
    parser.add_argument("--output", type=Path, help="a CSV file to write as well")
    arguments = parser.parse_args()
    one = arguments.only
    arguments.numbers = range(arguments.cases) if one is None else range(one, one + 1)
    return arguments


class Cases:
    """Cases, each of which depends on the seed and its number alone.

    Args:
        numbers: of the cases.
        seed: of all of them.

    Attributes:
        counts: kind of mutation -> outcome -> number of cases.
        memory: MiB, in the course of the run.
        faults: case, mutation and reason of each.
    """

    def __init__(self, numbers: range, seed: int) -> None:
        self.numbers, self.seed = numbers, seed
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)
        self.memory: list[float] = []
        self.faults: list[str] = []

    def each(
        self, mutations: Sequence[Mutation]
    ) -> Iterator[tuple[int, Mutation, random.Random]]:
        """Number, mutation and random numbers of each case."""
        for number in tqdm(self.numbers, "fuzz", mininterval=5, disable=None):
            rng = random.Random(f"{self.seed} {number}")
            yield number, mutations[number % len(mutations)], rng

    def add(
        self, number: int, mutate: Mutation, outcome: str, mib: Callable[[], float]
    ) -> None:
        """Note what became of a case, and now and then the memory."""
        if outcome.startswith(FAULT):
            self.faults.append(f"case {number}, {mutate.__name__}: {outcome}")
            outcome = "faults"
        self.counts[mutate.__doc__ or ""][outcome] += 1
        if (number - self.numbers[0]) % max(len(self.numbers) // SAMPLES, 1) == 0:
            self.memory.append(mib())

    def rows(self, outcomes: Sequence[str]) -> list[Row]:
        """One row for each kind of mutation, and one for all of them with the memory.

        Args:
            outcomes: columns, in order.
        """
        total = sum(self.counts.values(), Counter())
        half_way = self.memory[len(self.memory) // 2]
        held = {"first": self.memory[0], "half_way": half_way, "end": self.memory[-1]}
        rows = []
        for name, found in [*self.counts.items(), ("all", total)]:
            row: dict[str, object] = {"mutation": name, "cases": found.total()}
            row |= {outcome: found[outcome] for outcome in outcomes}
            for when, mib in held.items():
                row[f"memory_{when}_mib"] = round(mib) if found is total else ""
            row |= {"seed": self.seed, **machine()}
            rows.append({key: str(value) for key, value in row.items()})
        return rows

    def report(
        self,
        outcomes: Sequence[str],
        table: Callable[[list[Row]], str],
        output: Path | None,
    ) -> None:
        """Print the table and the first faults; write the rows if ``output`` is given.

        Args:
            outcomes: columns of the rows, in order.
            table: rows -> Markdown.
            output: a CSV file.
        """
        rows = self.rows(outcomes)
        print(table(rows))
        if output:
            write(output, rows)
        print(*self.faults[:SHOWN], sep="\n", file=sys.stderr)
