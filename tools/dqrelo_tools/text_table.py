# SPDX-License-Identifier: Apache-2.0
"""A table as lines of text, for people."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[object]], sides: str = "<>") -> str:
    """Lines of text, two spaces between columns.

    Args:
        rows: cells; the first row has the titles.
        sides: where the cells of each column are aligned, "<" left or ">" right. The
            last side is repeated: by default all columns but the first are numbers.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = list(zip(sides.ljust(len(widths), sides[-1]), widths, strict=True))
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, (side, width) in zip(row, columns, strict=True)
        ).rstrip()
        for row in cells
    )
