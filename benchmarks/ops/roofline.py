# SPDX-License-Identifier: Apache-2.0
"""The least that the kernels can take on a GPU, by bytes and operations: predicted.

    python -m benchmarks.ops.roofline [--device H100] [--output results.csv]

Of a kernel, the longest of three times: of its bytes at the memory's speed, of its
tensor products at the tensor cores' speed, and of the instructions of its inner loops,
counted by sass_report.py, at one for each scheduler and clock. Launches, tails and
what does not overlap are left out, so that a kernel that is measured takes longer.
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.ops.linear_site import FACTORS, LAYERS, LINEARS, planes_of, ranks_of
from dqrelo_tools.method import SHAPE_BYTES, Size


class Device(NamedTuple):
    """A vendor's numbers.

    Attributes:
        bytes_per_s: of the memory.
        flops: dense bf16 operations a second.
        instructions: a second, counted for one lane of a warp.
    """

    bytes_per_s: float
    flops: float
    instructions: float


DEVICES = {  # instructions: SMs x 4 schedulers x 32 lanes x boost clock
    "A100": Device(2.039e12, 312e12, 108 * 128 * 1.41e9),
    "H100": Device(3.352e12, 989e12, 132 * 128 * 1.98e9),
    "H200": Device(4.8e12, 989e12, 132 * 128 * 1.98e9),
}
# Instructions of a loop for each sign or element of A that a tile streams, and the rows
# of its tile: sass_report.py, sm_90, bfloat16 and int4. From TALL rows on the second.
PER_SIGN = {16: 1.61, 64: 2.58}
PER_FACTOR = {16: 3.36, 64: 8.05}
TALL = 257


def delta_bytes(
    sizes: list[int], k: int, ranks: list[int], factors: torch.dtype, planes: int
) -> int:
    """What a delta of a linear layer takes in the arena, without alignment."""
    return sum(
        Size(planes, rank, factors).bytes(n, k) - SHAPE_BYTES
        for n, rank in zip(sizes, ranks, strict=True)
    )


def predict(
    device: Device, name: str, deltas: int, rows: int, ratio: float, factors: str
) -> dict[str, float]:
    """Microseconds of one linear layer of a step with ``rows`` rows of each delta.

    Returns:
        base_us: the base's own product. delta_us: our two kernels. merged_us: a matrix
        made for each delta and one product with it, which replace both.
    """
    sizes, k = LINEARS[name]
    n, m = sum(sizes), deltas * rows
    ranks = ranks_of(sizes, k, ratio, FACTORS[factors])
    planes = planes_of(ratio)
    one = delta_bytes(sizes, k, ranks, FACTORS[factors], planes)
    factor = sum(rank * (k + size) for rank, size in zip(ranks, sizes, strict=True))
    tile = 64 if m >= TALL else 16
    tiles = -(-rows // tile) * deltas
    moved = deltas * one + 2 * m * (k + 2 * n)
    base = max(
        2 * (n * k + m * (n + k)) / device.bytes_per_s, 2 * m * n * k / device.flops
    )
    delta = max(
        moved / device.bytes_per_s,
        2 * tiles * tile * (planes * n * k + factor) / device.flops,
        tiles
        * (PER_SIGN[tile] * planes * n * k + PER_FACTOR[tile] * factor)
        / device.instructions,
    )
    product = 2 * k * sum(n * rank for n, rank in zip(sizes, ranks, strict=True))
    made = max((one + 4 * n * k) / device.bytes_per_s, product / device.flops)
    merged = deltas * made + max(
        2 * (deltas * n * k + m * (n + k)) / device.bytes_per_s,
        2 * m * n * k / device.flops,
    )
    return {"base_us": 1e6 * base, "delta_us": 1e6 * delta, "merged_us": 1e6 * merged}


def step(
    device: Device, deltas: int, rows: int, ratio: float, factors: str
) -> dict[str, float]:
    """The same of all linear layers of a step; attention is not in it."""
    total = dict.fromkeys(("base_us", "delta_us", "merged_us"), 0.0)
    for name in LINEARS:
        found = predict(device, name, deltas, rows, ratio, factors)
        for key, value in found.items():
            total[key] += value * (1 if name == "lm_head" else LAYERS)
    return total


def rows(device: str, ratio: float, factors: str) -> Iterator[dict[str, object]]:
    """Rows of the table: decode steps, and prompts of one delta."""
    shapes = [(deltas, 1) for deltas in (1, 4, 16, 64)] + [(16, 16)]
    shapes += [(1, n) for n in (256, 1024, 2048, 4096, 8192)]
    for deltas, count in shapes:
        found = step(DEVICES[device], deltas, count, ratio, factors)
        yield {
            "device": device,
            "deltas": deltas,
            "rows_per_delta": count,
            "ratio": ratio,
            "factors": factors,
            **{
                key.replace("_us", "_ms"): round(us / 1e3, 2)
                for key, us in found.items()
            },
        }


def main() -> None:
    """Print the predictions, or write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=DEVICES, nargs="+", default=["H100"])
    parser.add_argument("--ratio", type=float, nargs="+", default=[1 / 8, 1 / 16])
    parser.add_argument("--factors", choices=FACTORS, default="int4")
    parser.add_argument("--output", type=Path, help="a CSV file, not standard output")
    options = parser.parse_args()
    table = [
        row
        for device in options.device
        for ratio in options.ratio
        for row in rows(device, ratio, options.factors)
    ]
    with options.output.open("w", newline="") if options.output else sys.stdout as file:
        writer = csv.DictWriter(file, table[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
