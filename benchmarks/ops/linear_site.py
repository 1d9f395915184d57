# SPDX-License-Identifier: Apache-2.0
"""The linear layers of Llama-3-8B with random deltas, and what they take."""

import math

import numpy as np
import torch

from benchmarks.ops.device import DEVICE, DTYPE
from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.layout import INT4_BLOCK, words_per_row
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import (
    FACTOR_DTYPES,
    INT4,
    Field,
    aligned,
    empty_table,
    factor_bytes,
    place_ranks,
)
from dqrelo_tools.method import METHODS
from vllm_dqrelo.format.config import DQRELO

LINEARS = {  # output features of each slice, input features
    "qkv": ([4096, 1024, 1024], 4096),
    "o": ([4096], 4096),
    "gate_up": ([14336, 14336], 4096),
    "down": ([4096], 14336),
    "lm_head": ([128256], 4096),
}
TINY = {"qkv": ([48, 16], 256), "lm_head": ([32], 256)}  # ranks: not of integers
LAYERS = 32  # of all but the last
FACTORS = {"int4": INT4, "bfloat16": DTYPE}


def planes_of(ratio: float) -> int:
    """The sign planes of a delta of large matrices."""
    return METHODS[DQRELO].size(4096, 4096, ratio, DTYPE).planes


def ranks_of(sizes: list[int], k: int, ratio: float, factors: torch.dtype) -> list[int]:
    """The rank of each slice, with the sign planes in so many of the layer's bytes.

    Args:
        factors: dtype of the low-rank factors, INT4 (in whole blocks) or DTYPE.
    """
    left = ratio - planes_of(ratio) / 16
    ranks = [math.ceil(n * k * left / (n + k)) for n in sizes]
    if factors == INT4:
        ranks = [round(4 * r / INT4_BLOCK) * INT4_BLOCK for r in ranks]
    return ranks


class Site:
    """One linear layer with ``deltas`` random deltas in an arena on the device.

    Args:
        sizes: output features of each slice.
        k: input features, a multiple of 256: any bits are signs then.
        deltas: how many.
        ratio: bytes of a delta over bytes of the bf16 layer.
        factors: see ``ranks_of``.
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
        planes = planes_of(ratio)
        self.ranks = ranks_of(sizes, k, ratio, factors)
        table = empty_table(deltas, len(sizes), "cpu")
        size = 0

        def place(count: int) -> int:
            nonlocal size
            offset, size = size, size + aligned(count)
            return offset

        for delta in range(deltas):
            for row, n, rank in zip(table[delta], sizes, self.ranks, strict=True):
                if planes:
                    row[Field.SIGNS] = place(2 * planes * n * words_per_row(k))
                    row[Field.PLANES] = planes
                    row[Field.SCALE] = place(4 * planes * n)
                if rank:
                    row[Field.RANK_A] = row[Field.RANK_B] = rank
                    row[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(factors)
                    row[Field.LORA_A] = place(factor_bytes(rank, k, factors))
                    row[Field.LORA_B] = place(factor_bytes(n, rank, factors))
                    if factors == INT4:
                        row[Field.LORA_SCALE] = place(4 * rank)
        place_ranks(table)
        self.bytes_per_delta = size // deltas
        arena = torch.randint(0, 256, (size,), dtype=torch.uint8, device=DEVICE)
        for row, n, rank in (
            (row, n, rank)
            for delta in table.tolist()
            for row, n, rank in zip(delta, sizes, self.ranks, strict=True)
        ):
            values = []
            if planes:
                scale = torch.full((planes * n,), 0.01, device=DEVICE)
                values += [(Field.SCALE, scale)]
            if rank and factors == INT4:  # any bytes are integers; their RMS is 4.6
                scale = torch.full((rank,), (k * rank) ** -0.5 / 21, device=DEVICE)
                values += [(Field.LORA_SCALE, scale)]
            elif rank:
                a = torch.randn(rank * k, device=DEVICE, dtype=DTYPE) / k**0.5
                b = torch.randn(n * rank, device=DEVICE, dtype=DTYPE) / rank**0.5
                values += [(Field.LORA_A, a), (Field.LORA_B, b)]
            for field, value in values:
                arena[row[field] : row[field] + value.nbytes] = value.view(torch.uint8)
        self.arena, self.table = arena, table.to(DEVICE)
        self.slices = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, torch.int32)

    def groups(self, slot_of_row: np.ndarray, merge_rows: int | None) -> RowGroups:
        """Which row is whose."""
        groups = RowGroups(len(slot_of_row), len(self.table), DEVICE, merge_rows)
        groups.set(slot_of_row)
        return groups

    def step(self, rows_per_delta: int) -> dict[str, torch.Tensor]:
        """The op's arguments for a step in which every delta has as many rows."""
        deltas = len(self.table)
        m = deltas * rows_per_delta
        groups = self.groups(np.arange(m, dtype=np.int32) % deltas, None)
        return {
            "y": torch.zeros(m, self.n, dtype=DTYPE, device=DEVICE),
            "scratch": torch.empty(m, sum(self.ranks), device=DEVICE),
            "x": torch.randn(m, self.k, dtype=DTYPE, device=DEVICE),
            "arena": self.arena,
            "table": self.table,
            "slices": self.slices,
            "rows": groups.rows,
            "slots": groups.slots,
            "starts": groups.starts,
            "num_active": groups.num_active,
        }
