# SPDX-License-Identifier: Apache-2.0
"""The table of benchmarks/ops/gpu.py: the shapes that say most; and sums of its rows.

A step of vLLM with the few layers of models.py is bound by the host. The sums are what
the linear layers of the whole Llama-3.1-8B take on the device.
"""

from pathlib import Path

from benchmarks.ops.device import interpret

interpret()

from benchmarks.gpu.part import options  # noqa: E402
from benchmarks.ops.gpu import main  # noqa: E402
from benchmarks.ops.linear_site import LAYERS  # noqa: E402
from benchmarks.table import Row, read, write  # noqa: E402

FULL = (
    "--deltas 1 4 16 32 --rows 1 --repeats 30",
    "--deltas 1 4 16 32 --rows 1 --repeats 30 --ratio 0.0625",
    "--deltas 1 4 16 --rows 16 256 --repeats 30",
)
TINY = ("--tiny --factors bfloat16 --deltas 1 2 --rows 1 --repeats 1",)
SHAPE = ("deltas", "rows_per_delta", "ratio")


def sums(rows: list[Row]) -> list[dict[str, object]]:
    """Milliseconds of all linear layers of a model, by shape.

    Args:
        rows: of the table.

    Returns:
        A row for each shape of which every layer was timed. A column that a layer
        lacks is empty.
    """
    times = [c for c in rows[0] if c.endswith("us") and c != "smallest_kernel_us"]
    linears = {row["linear"] for row in rows}
    by_shape: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        by_shape.setdefault(tuple(row[k] for k in SHAPE), {})[row["linear"]] = row
    found = []
    for shape, of in by_shape.items():
        if of.keys() == linears:
            total: dict[str, object] = dict(zip(SHAPE, shape, strict=True))
            for column in times:
                known = all(row[column] for row in of.values())
                value = sum(
                    float(row[column]) * (1 if name == "lm_head" else LAYERS)
                    for name, row in of.items()
                    if known
                )
                name = column.removesuffix("us") + "ms"
                total[name] = f"{value / 1e3:.3f}" if known else ""
            found.append(total)
    return found


def run(output: Path, shapes: tuple[str, ...]) -> None:
    """Measure, and write the sums again after each set of shapes."""
    for arguments in shapes:
        main(["--output", str(output / "kernels.csv"), *arguments.split()])
        write(output / "layers.csv", sums(read(output / "kernels.csv")))


if __name__ == "__main__":
    found = options()
    run(found.output, TINY if found.tiny else FULL)
