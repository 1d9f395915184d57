# SPDX-License-Identifier: Apache-2.0
"""What a results file has, and a Markdown table of it."""

import json
from typing import Any

from benchmarks.paths import RESULTS
from benchmarks.table import Row
from benchmarks.table import read as read_csv


def read(name: str) -> list[Row]:
    """The rows of a CSV file in results/."""
    return read_csv(RESULTS / name)


def read_json(name: str) -> Any:
    """The value of a JSON file in results/."""
    return json.loads((RESULTS / name).read_text())


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
