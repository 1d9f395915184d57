# SPDX-License-Identifier: Apache-2.0
"""Random deltas in the layout of a CPU, and what they mean in float64."""

import numpy as np
import torch

from dqrelo_kernels.layout import pack_int4, pack_signs, side_by_side
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import (
    FACTOR_DTYPES,
    INT4,
    Field,
    empty_table,
)

EPS = torch.finfo(torch.float32).eps
POPULARITY = {
    "base": [-1, -1, -1, -1],
    "identical": [1, 1, 1, 1, 1, 1],
    "distinct": [0, 1, 2],
    "alone": [0, 0],
    "mixed": [2, -1, 0, 2, 1, -1, 2],
    "skewed": [0] * 9 + [2, 1, -1],
    "many": [0] * 37 + [1] * 20 + [-1] + [2] * 12,
    "nothing": [],
}


class Arena:
    """Tensors behind one another in one buffer, and dense copies of what they mean."""

    def __init__(self, slots: int, sizes: list[int], seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.parts = [torch.zeros(64, dtype=torch.uint8)]
        self.table = empty_table(slots, len(sizes), "cpu")
        self.sizes = sizes
        self.factors = {}  # of (slot, index): scale [N], A [R, K] and B [N, R]

    def put_matrices(self, *packed: torch.Tensor) -> int:
        return self.put(torch.cat([side_by_side(matrix) for matrix in packed]))

    def put(self, tensor: torch.Tensor) -> int:
        offset = sum(part.numel() for part in self.parts)
        data = tensor.contiguous().flatten().view(torch.uint8)
        self.parts.append(torch.nn.functional.pad(data, (0, -data.numel() % 64)))
        return offset

    @property
    def data(self) -> torch.Tensor:
        return torch.cat(self.parts)

    def matrix(self, slot, index, k, rank, dtype=torch.bfloat16, planes=1):
        """Put a random matrix there; returns it dense in float64."""
        n = self.sizes[index]
        row = self.table[slot, index]
        row[Field.SIDE_BY_SIDE] = 1
        dense = torch.zeros(n, k, dtype=torch.float64)
        sizes = torch.zeros(n).double()
        a, b = torch.zeros(1, k).double(), torch.zeros(n, 1).double()
        if planes:
            positive = torch.rand(planes, n, k, generator=self.generator) > 0.5
            scale = torch.rand(planes, n, 1, generator=self.generator)
            row[Field.SIGNS] = self.put_matrices(*map(pack_signs, positive))
            row[Field.SCALE], row[Field.PLANES] = self.put(scale), planes
            dense += (torch.where(positive, 1.0, -1.0) * scale.double()).sum(dim=0)
            sizes += scale.double().sum(dim=(0, 2))
        if rank:
            a, b = self.factor(rank, k, dtype), self.factor(n, rank, dtype)
            row[Field.RANK_A] = row[Field.RANK_B] = rank
            self.place_ranks(slot)
            row[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(dtype)
            row[Field.LORA_A] = self.put_matrices(pack_int4(a) if dtype == INT4 else a)
            row[Field.LORA_B] = self.put_matrices(pack_int4(b) if dtype == INT4 else b)
            scale = torch.ones(rank, 1)
            if not dtype.is_floating_point:
                largest = 8 if dtype == INT4 else 127
                scale = torch.rand(rank, 1, generator=self.generator) / largest**2
                row[Field.LORA_SCALE] = self.put(scale)
            a, b = scale.double() * a.double(), b.double()
            dense += b @ a
        self.factors[slot, index] = sizes, a, b
        return dense

    def place_ranks(self, slot):
        first = 0
        for row in self.table[slot]:
            row[Field.FIRST_A] = row[Field.FIRST_B] = first
            first += max(0, int(row[Field.RANK_A]))

    def lost(self, slot, x):
        """What 16-bit activations may lose in native code, of one row: [sum of N].

        Each number of x and of A x is rounded to a whole multiple of the largest one
        over 8191, and the errors of k of them add up as sqrt(k); or those of A x are
        rounded to bfloat16, by at most 2^-8 each, which are added up here.
        """
        out = []
        for index, n in enumerate(self.sizes):
            if (slot, index) not in self.factors:
                out.append(torch.zeros(n).double())
                continue
            sizes, a, b = self.factors[slot, index]
            step = 6 / 12**0.5 / 8191  # six standard deviations
            t = a @ x
            wrong = 2**-8 * t.abs() + step * x.abs().max() * a.norm(dim=1)
            lost = step * x.abs().max() * len(x) ** 0.5 * sizes + b.abs() @ wrong
            out.append(lost + step * t.abs().max() * b.norm(dim=1))
        return torch.cat(out)

    def factor(self, rows, columns, dtype):
        if dtype.is_floating_point:
            return torch.randn(rows, columns, generator=self.generator).to(dtype)
        low, high = (-8, 8) if dtype == INT4 else (-127, 128)
        values = torch.randint(low, high, (rows, columns), generator=self.generator)
        return values.to(torch.int8)

    def vector(self, slot, index, field, length):
        value = torch.randn(length, generator=self.generator)
        self.table[slot, index, field] = self.put(value)
        return value.double()


def groups_of(slot_of_row, slots=3):
    groups = RowGroups(128, slots, "cpu")
    groups.set(np.array(slot_of_row, dtype=np.int32))
    return groups


SIZES = [7, 48, 1]
SLICES = torch.tensor([0, 7, 55, 56], dtype=torch.int32)
# For each slot: ranks of the three slices, sign planes, factors.
DELTAS = {
    "floats": [
        ((3, 5, 1), 1, torch.float32),
        ((0, 2, 0), 1, torch.bfloat16),
        ((0, 4, 0), 0, torch.float16),
    ],
    "integers": [
        ((67, 34, 1), 2, INT4),
        ((0, 20, 129), 1, torch.int8),
        ((64, 1, 7), 0, INT4),
    ],
    "one dtype": [((5, 2, 1), 1, INT4), ((3, 0, 2), 2, INT4), ((9, 130, 1), 0, INT4)],
    "hardly any": [((0, 0, 0), 0, INT4), ((3, 0, 0), 0, INT4), ((0, 0, 0), 0, INT4)],
}


def random_deltas(arena, deltas, k):
    """Put these deltas there; dense change and bias of every slot, in float64."""
    n = sum(SIZES)
    change = {slot: torch.zeros(n, k).double() for slot in (-1, 0, 1, 2)}
    bias = {slot: torch.zeros(n).double() for slot in (-1, 0, 1, 2)}
    for slot, (ranks, planes, factors) in enumerate(deltas):
        start = 0
        for index, size in enumerate(SIZES):
            if ranks[index] or planes:
                change[slot][start : start + size] = arena.matrix(
                    slot, index, k, ranks[index], factors, planes
                )
            start += size
    bias[2][:7] = arena.vector(2, 0, Field.BIAS, 7)  # a bias without a matrix
    return change, bias
