# SPDX-License-Identifier: Apache-2.0
"""What the deltas of one step cost on this CPU, on the shapes of SmolLM2-135M.

    python -m benchmarks.ops.cpu [--output results.csv] [--short]

Every op of a forward pass, through torch.ops as the server calls it, bfloat16, ratio
1/8, by both methods: in native code and in plain torch; beside them the base's own
matrix products as vLLM does them, vLLM's LoRA at equal bytes, and the time of copying
the bytes that the step reads. The best of several runs; the ratios of one run are what
counts.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

from benchmarks.machine import machine
from benchmarks.table import write
from dqrelo_kernels import ops  # noqa: F401
from dqrelo_kernels.cpu import build as cpu
from dqrelo_kernels.layout import words_per_row
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import (
    FACTOR_DTYPES,
    Field,
    aligned,
    empty_table,
    factor_bytes,
    place_ranks,
)
from dqrelo_tools.method import METHODS

LAYERS, HIDDEN, VOCAB = 30, 576, 49152
LINEARS = [  # K, and N of each slice
    (HIDDEN, (576, 192, 192)),
    (HIDDEN, (HIDDEN,)),
    (HIDDEN, (1536, 1536)),
    (1536, (HIDDEN,)),
]
RATIO, RANKS = 0.125, 1024
# rows of each delta in the step: decode over 1, 2, 4 and 8 deltas, and a prompt
STEPS = [[8], [4, 4], [2] * 4, [1] * 8, [256]]


class Deltas:
    """Random deltas in one arena, with the tables of all sites."""

    def __init__(self, slots: int, method: str) -> None:
        self.slots, self.size, self.method = slots, 0, METHODS[method]
        shapes = [*LINEARS] * LAYERS + [(HIDDEN, (VOCAB,))]
        self.linears = [(k, ends, self._matrices(k, ends)) for k, ends in shapes]
        self.norms = [self._weights() for _ in range(2 * LAYERS + 1)]
        # Ordinary numbers everywhere: denormal ones would take longer.
        self.arena = torch.randn(self.size // 2).bfloat16().view(torch.uint8)

    def _take(self, size: int) -> int:
        offset = self.size
        self.size += aligned(size)
        return offset

    def _matrices(self, k: int, sizes: tuple[int, ...]) -> torch.Tensor:
        table = empty_table(self.slots, len(sizes), "cpu")
        for slot in range(self.slots):
            for j, n in enumerate(sizes):
                size, row = (
                    self.method.size(n, k, RATIO, torch.bfloat16),
                    table[slot, j],
                )
                row[Field.SIDE_BY_SIDE] = 1
                row[Field.SIGNS] = self._take(2 * n * words_per_row(k))
                row[Field.SCALE] = self._take(4 * n)
                row[Field.PLANES] = size.planes
                row[Field.RANK_A] = row[Field.RANK_B] = size.rank
                for field, rows, columns in (
                    (Field.LORA_A, size.rank, k),
                    (Field.LORA_B, n, size.rank),
                ):
                    row[field] = self._take(factor_bytes(rows, columns, size.dtype))
                row[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(size.dtype)
                if not size.dtype.is_floating_point:
                    row[Field.LORA_SCALE] = self._take(4 * size.rank)
        place_ranks(table)
        return table

    def _weights(self) -> torch.Tensor:
        table = empty_table(self.slots, 1, "cpu")
        for slot in range(self.slots):
            table[slot, 0, Field.WEIGHT] = self._take(4 * HIDDEN)
        return table

    def step(self, rows: list[int]) -> Callable[[], None]:
        """One forward pass of which ``rows[slot]`` rows belong to each slot."""
        m = sum(rows)
        groups = RowGroups(m, self.slots, "cpu")
        groups.set(np.repeat(np.arange(len(rows)), rows).astype(np.int32))
        scratch = torch.empty(m, RANKS)
        calls = []
        for k, sizes, table in self.linears:
            x = torch.randn(m, k).bfloat16()
            y = torch.zeros(m, sum(sizes), dtype=torch.bfloat16)
            ends = torch.tensor((0, *sizes)).cumsum(0).int()
            calls.append((y, scratch, x, self.arena, table, ends))
        x = torch.randn(m, HIDDEN).bfloat16()
        ids = torch.randint(0, VOCAB, (m,))
        vocab = torch.tensor([0, VOCAB], dtype=torch.int32)
        by_row = (groups.rows, groups.slots, groups.num_active)

        def run() -> None:
            torch.ops.dqrelo.delta_embedding_(
                x.clone(), ids, self.arena, self.linears[-1][2], vocab, *by_row
            )
            for table in self.norms:
                torch.ops.dqrelo.delta_norm_(
                    torch.empty_like(x), x, self.arena, table, *by_row, 1e-5, False
                )
            for call in calls:
                torch.ops.dqrelo.delta_linear_(*call, *groups.of_rows)

        return run


class Base:
    """The matrix products of the base, with random weights, as vLLM does them."""

    def __init__(self) -> None:
        shapes = [(k, sum(sizes)) for k, sizes in LINEARS] * LAYERS + [(HIDDEN, VOCAB)]
        self.layers = [(k, self._layer(n, k)) for k, n in shapes]

    def _layer(self, n: int, k: int) -> Callable[..., torch.Tensor]:
        layer = torch.nn.Module()
        layer.weight = torch.nn.Parameter(torch.randn(n, k).bfloat16(), False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        return layer.cpu_linear

    def step(self, rows: list[int]) -> Callable[[], None]:
        """One forward pass over all rows."""
        xs = {k: torch.randn(sum(rows), k).bfloat16() for k, _ in self.layers}
        calls = [(linear, xs[k]) for k, linear in self.layers]

        def run() -> None:
            for linear, x in calls:
                linear(x, None, None)

        return run


class Loras:
    """vLLM's own LoRA on the CPU: as many bytes on every linear layer and the LM head.

    Embedding and norms, which it cannot change or not at equal cost, are left out.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        shapes = [*LINEARS] * LAYERS + [(HIDDEN, (VOCAB,))]
        self.layers = [(k, sizes, *self._factors(k, sizes)) for k, sizes in shapes]

    def _factors(
        self, k: int, sizes: tuple[int, ...]
    ) -> tuple[list[torch.Tensor], ...]:
        n = sum(sizes)
        rank = round(RATIO * n * k / (n + len(sizes) * k))
        a = [torch.randn(self.slots, 1, rank, k).bfloat16() for _ in sizes]
        return a, [torch.randn(self.slots, 1, size, rank).bfloat16() for size in sizes]

    def step(self, rows: list[int]) -> Callable[[], None]:
        """One forward pass of which ``rows[slot]`` rows belong to each slot."""
        m, adapters = sum(rows), list(range(1, self.slots + 1))
        ids = tuple(np.repeat(adapters[: len(rows)], rows).tolist())
        wrapper = PunicaWrapperCPU(m, m, "cpu")
        prefill = m > 8
        mapping = LoRAMapping(ids, ids, is_prefill=prefill)
        wrapper.update_metadata(mapping, [*adapters], self.slots, VOCAB)
        calls = [
            (
                torch.zeros(m, sum(sizes), dtype=torch.bfloat16),
                torch.randn(m, k).bfloat16(),
                a,
                b,
                sizes,
            )
            for k, sizes, a, b in self.layers
        ]
        *linears, (y, x, (a,), (b,), _) = calls

        def run() -> None:
            for y_linear, x_linear, a_linear, b_linear, sizes in linears:
                wrapper.add_lora_linear(
                    y_linear, x_linear, a_linear, b_linear, 1.0, sizes
                )
            wrapper.add_lora_logits(y, x, a, b, 1.0)

        return run


def best_ms(run: Callable[[], None], seconds: float) -> float:
    """The shortest of the runs that fit into ``seconds``, after one to warm up."""
    run()
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> None:
    """Print the table, and write it with the machine and the versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="a CSV file to write as well")
    parser.add_argument("--short", action="store_true", help="without plain torch")
    arguments = parser.parse_args()
    output = arguments.output
    base, loras = Base(), Loras(8)
    about = {"threads": torch.get_num_threads(), **machine()}
    rows = []
    means = ("native",) if arguments.short else ("native", "torch")
    columns = (*means, "base", "lora", "copy")
    head = "".join(f"{column:>9}" for column in columns)
    for method in METHODS:
        print(f"{method:<22}{head}  ms a step")
        deltas = Deltas(8, method)
        for step in STEPS:
            label = "+".join(map(str, step))
            found = measure(deltas, base, loras, step, means)
            rows.append({"method": method, "rows": label, **found, **about})
            print(f"{label:<22}" + "".join(f"{v:>9.1f}" for v in found.values()))
            sys.stdout.flush()
    if output:
        write(output, rows)


def measure(
    deltas: Deltas, base: Base, loras: Loras, step: list[int], means: tuple[str, ...]
) -> dict[str, float]:
    """Milliseconds of one step by each means."""
    found = {}
    for name in means:
        os.environ["DQRELO_NATIVE"] = "1" if name == "native" else "0"
        cpu.reset()
        found[f"{name}_ms"] = best_ms(deltas.step(step), 3)
    found["base_ms"] = best_ms(base.step(step), 3)
    found["lora_ms"] = best_ms(loras.step(step), 3)
    source = deltas.arena[: deltas.size // deltas.slots * len(step)]
    target = torch.empty_like(source)
    found["copy_ms"] = best_ms(lambda: target.copy_(source), 1)
    return {name: round(ms, 2) for name, ms in found.items()}


if __name__ == "__main__":
    main()
