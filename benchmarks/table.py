# SPDX-License-Identifier: Apache-2.0
"""Results files: rows that are read and written, and a table that grows row by row."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(
    path: Path, rows: Sequence[Mapping[str, object]], columns: Iterable[str] = ()
) -> None:
    """Write rows as a CSV file.

    Args:
        path: of the file; its folder need not exist.
        rows: one or more.
        columns: of the file, in order; without them those of the first row. A row
            that lacks a column has an empty cell.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        names = list(columns) or list(rows[0])
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Table:
    """A results file that a benchmark goes on with where it stopped.

    Args:
        path: of the file; it need not exist.
        keys: columns that together name a row.
        columns: all columns of the file, in order.

    Raises:
        SystemExit: the file has other columns.
    """

    def __init__(
        self, path: Path, keys: tuple[str, ...], columns: tuple[str, ...]
    ) -> None:
        self.path, self.keys, self.columns = path, keys, columns
        self.rows: list[dict[str, object]] = []
        if path.exists():
            self.rows += read(path)
            for row in self.rows[:1]:
                if other := row.keys() - set(columns):
                    raise SystemExit(
                        f"{path} has the columns {', '.join(sorted(other))}, which "
                        "this benchmark does not write; give another output"
                    )

    def __contains__(self, key: tuple[str, ...]) -> bool:
        return any(tuple(row[k] for k in self.keys) == key for row in self.rows)

    def add(self, row: dict[str, object]) -> None:
        """Write a row.

        Raises:
            ValueError: it has a column that was not declared.
        """
        if other := row.keys() - set(self.columns):
            raise ValueError(f"{', '.join(sorted(other))}: not among {self.columns}")
        self.rows.append(row)
        write(self.path, self.rows, self.columns)
