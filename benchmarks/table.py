# SPDX-License-Identifier: Apache-2.0
"""A results file that a benchmark goes on with where it stopped."""

import csv
from pathlib import Path


class Table:
    """A CSV file that grows row by row and knows what it has.

    Args:
        path: of the file; it need not exist.
        keys: columns that together name a row.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path, self.keys = path, keys
        self.rows: list[dict[str, object]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return any(tuple(row[k] for k in self.keys) == key for row in self.rows)

    def add(self, row: dict[str, object]) -> None:
        """Write a row."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("w", newline="") as file:
            names = dict.fromkeys(name for row in self.rows for name in row)
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
