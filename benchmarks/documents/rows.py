# SPDX-License-Identifier: Apache-2.0
"""Rows of a results file, and of a Markdown table."""

import csv

from benchmarks.paths import RESULTS

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of a results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
