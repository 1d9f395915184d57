# SPDX-License-Identifier: Apache-2.0
"""Time the delta linear on the layers of Llama-3-8B against the memory roofline.

For each fused linear layer, number of distinct deltas in a step and rows per delta:
the median time of one ``dqrelo::delta_linear_`` (both of its kernels) in a CUDA graph
with a cold L2, next to the time that the device's memory needs for the bytes that it
must move, and to the base's own bf16 GEMM of the same rows. An op that disagrees
with the reference is not timed.

    python benchmarks/benchmark_kernels.py --output results.csv
"""

import argparse
import csv
import math
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from dqrelo_kernels import (
    ops,  # noqa: F401  registers torch.ops.dqrelo
    reference,
)
from dqrelo_kernels.layout import INT4_BLOCK, int4_bytes, words_per_row
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import ALIGNMENT, FACTOR_DTYPES, INT4, Field, empty_table

LINEARS = {  # output features of each slice, input features
    "qkv": ([4096, 1024, 1024], 4096),
    "o": ([4096], 4096),
    "gate_up": ([14336, 14336], 4096),
    "down": ([4096], 14336),
}
GB_PER_S = {  # vendors' numbers; the longest name that fits is taken
    "A100-SXM4-40GB": 1555,
    "A100-SXM4-80GB": 2039,
    "A100 80GB PCIe": 1935,
    "H100 PCIe": 2039,
    "H100 80GB HBM3": 3352,
    "H200": 4800,
    "L4": 300,
    "L40S": 864,
}
DTYPE = torch.bfloat16
FACTORS = {"int4": INT4, "bfloat16": DTYPE}


class Site:
    """One linear layer with ``deltas`` random deltas in an arena on the device.

    Args:
        sizes: output features of each slice.
        k: input features, a multiple of 256: any bits are signs then.
        deltas: how many.
        ratio: bytes of a delta over bytes of the bf16 layer.
        factors: dtype of the low-rank factors, INT4 (in whole blocks) or DTYPE.
    """

    def __init__(
        self,
        sizes: list[int],
        k: int,
        deltas: int,
        ratio: float,
        factors: torch.dtype,
    ) -> None:
        self.sizes, self.k, self.n = sizes, k, sum(sizes)
        self.ranks = [math.ceil(n * k * (ratio - 1 / 16) / (n + k)) for n in sizes]
        if factors == INT4:
            self.ranks = [round(4 * r / INT4_BLOCK) * INT4_BLOCK for r in self.ranks]
        table = empty_table(deltas, len(sizes), "cpu")
        size = 0

        def place(count: int) -> int:
            nonlocal size
            offset, size = size, size + -(-count // ALIGNMENT) * ALIGNMENT
            return offset

        for delta in range(deltas):
            for row, n, rank in zip(table[delta], sizes, self.ranks, strict=True):
                row[Field.SIGNS] = place(2 * n * words_per_row(k))
                row[Field.PLANES] = 1
                row[Field.SCALE] = place(4 * n)
                if rank:
                    row[Field.RANK] = rank
                    row[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(factors)
                    if factors == INT4:
                        row[Field.LORA_A] = place(rank * int4_bytes(k))
                        row[Field.LORA_B] = place(n * int4_bytes(rank))
                        row[Field.LORA_SCALE] = place(4 * rank)
                    else:
                        row[Field.LORA_A] = place(2 * rank * k)
                        row[Field.LORA_B] = place(2 * rank * n)
        self.bytes_per_delta = size // deltas
        arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
        for row, n, rank in (
            (row, n, rank)
            for delta in table.tolist()
            for row, n, rank in zip(delta, sizes, self.ranks, strict=True)
        ):
            values = [(Field.SCALE, torch.full((n,), 0.01, device="cuda"))]
            if rank and factors == INT4:  # any bytes are integers; their RMS is 4.6
                scale = torch.full((rank,), (k * rank) ** -0.5 / 21, device="cuda")
                values += [(Field.LORA_SCALE, scale)]
            elif rank:
                a = torch.randn(rank * k, device="cuda", dtype=DTYPE) / k**0.5
                b = torch.randn(n * rank, device="cuda", dtype=DTYPE) / rank**0.5
                values += [(Field.LORA_A, a), (Field.LORA_B, b)]
            for field, value in values:
                arena[row[field] : row[field] + value.nbytes] = value.view(torch.uint8)
        self.arena, self.table = arena, table.cuda()
        self.slices = torch.tensor([0, *sizes]).cumsum(0).to("cuda", torch.int32)

    def step(self, rows_per_delta: int) -> dict[str, torch.Tensor]:
        """The op's arguments for a step in which every delta has as many rows."""
        deltas = len(self.table)
        m = deltas * rows_per_delta
        groups = RowGroups(m, deltas, "cuda")
        groups.set(np.arange(m, dtype=np.int32) % deltas)
        return {
            "y": torch.zeros(m, self.n, dtype=DTYPE, device="cuda"),
            "scratch": torch.empty(m, sum(self.ranks), device="cuda"),
            "x": torch.randn(m, self.k, dtype=DTYPE, device="cuda"),
            "arena": self.arena,
            "table": self.table,
            "slices": self.slices,
            "rows": groups.rows,
            "slots": groups.slots,
            "starts": groups.starts,
            "num_active": groups.num_active,
        }

    def bytes_moved(self, rows: int) -> int:
        """What a step must read and write: each delta, x, and y twice."""
        return len(self.table) * self.bytes_per_delta + 2 * rows * (self.k + 2 * self.n)


def check(arguments: dict[str, torch.Tensor]) -> float:
    """Relative RMS error of the op against the reference; raises where it is wrong.

    Rounding y to bf16 alone gives some 2^-10; a wrong delta, row or slice gives 1.
    """
    got = torch.zeros_like(arguments["y"])
    want = torch.zeros_like(got, dtype=torch.float32)
    torch.ops.dqrelo.delta_linear_(**{**arguments, "y": got})
    names = ("x", "arena", "table", "slices", "rows", "slots")
    reference.delta_linear_(want, *(arguments[name] for name in names))
    error = float((got.float() - want).norm() / want.norm())
    if not error < 2**-8:
        raise SystemExit(f"the op is wrong by {error:.2g} of the reference: not timed")
    return error


def median_us(launch: Callable[[], object], repeats: int) -> float:
    """Median time of ``launch`` replayed from a CUDA graph with a cold L2."""
    flush = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    events = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)
    ]
    for start, end in events:
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(1e3 * start.elapsed_time(end) for start, end in events)


def bandwidth(options: argparse.Namespace) -> float:
    """Bytes per second of the device's memory."""
    if options.gb_per_s:
        return options.gb_per_s * 1e9
    device = torch.cuda.get_device_name()
    names = [name for name in GB_PER_S if name in device]
    if not names:
        raise SystemExit(f"say how fast the memory of {device} is: --gb-per-s")
    return GB_PER_S[max(names, key=len)] * 1e9


def measurements(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row of the table per linear layer, number of deltas and rows per delta."""
    bytes_per_s = bandwidth(options)
    one = torch.zeros(1, device="cuda")
    smallest = median_us(lambda: one.add_(1), options.repeats)
    for name in options.linears:
        sizes, k = LINEARS[name]
        weight = torch.randn(sum(sizes), k, dtype=DTYPE, device="cuda")
        for deltas in options.deltas:
            site = Site(sizes, k, deltas, options.ratio, FACTORS[options.factors])
            for rows in options.rows:
                step = site.step(rows)
                error = check(step)
                us = median_us(
                    lambda step=step: torch.ops.dqrelo.delta_linear_(**step),
                    options.repeats,
                )
                gemm = median_us(
                    lambda x=step["x"], w=weight: torch.nn.functional.linear(x, w),
                    options.repeats,
                )
                ideal = site.bytes_moved(deltas * rows) / bytes_per_s * 1e6
                yield {
                    "device": torch.cuda.get_device_name(),
                    "linear": name,
                    "deltas": deltas,
                    "rows_per_delta": rows,
                    "ratio": options.ratio,
                    "factors": options.factors,
                    "ranks": "+".join(map(str, site.ranks)),
                    "us": round(us, 2),
                    "roofline_us": round(ideal, 2),
                    "of_roofline": round(ideal / us, 3),
                    "base_gemm_us": round(gemm, 2),
                    "smallest_kernel_us": round(smallest, 2),
                    "relative_error": f"{error:.2g}",
                }


def main() -> None:
    """Parse the command line and measure."""
    folder = os.environ.get("OUT") or Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(folder, "kernels.csv"))
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=list(LINEARS))
    parser.add_argument(
        "--deltas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--ratio", type=float, default=1 / 8)
    parser.add_argument("--factors", choices=FACTORS, default="int4")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--gb-per-s", type=float, help="memory bandwidth")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with options.output.open("w", newline="") as file:
        writer = None
        for row in measurements(options):
            if writer is None:
                writer = csv.DictWriter(file, row)
                writer.writeheader()
                print(*row)
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
