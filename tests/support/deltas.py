# SPDX-License-Identifier: Apache-2.0
"""Random deltas of one site, and steps that use them, for the launchers."""

import numpy as np
import torch

from dqrelo_kernels import reference
from dqrelo_kernels.layout import int4_bytes, pack_int4, pack_signs, side_by_side
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import (
    ABSENT,
    ALIGNMENT,
    FACTOR_DTYPES,
    INT4,
    Field,
    empty_table,
    place_ranks,
    read,
    read_matrices,
)
from vllm_dqrelo.format.tensors import take_columns

HAS_DEVICE = torch.cuda.is_available()
DEVICE = "cuda" if HAS_DEVICE else "cpu"
# Slots 0 and 1 have everything, 2 lacks its last slice, 3 is empty, 4 has biases.
SLOTS, EMPTY, BIASES = 5, 3, 4
# They and the factor dtypes take turns.
RANKS, PLANES = (128, 18, 52, 1, 0, 130), (1, 2, 0)


class Deltas:
    """Matrices of every kind in an arena, with their table."""

    def __init__(self, sizes: list[int], k: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.sizes, self.k = sizes, k
        self.size, self.parts = 0, [torch.empty(0, dtype=torch.uint8)]
        self.table = empty_table(SLOTS, len(sizes), "cpu")
        self.slices = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    def put(self, tensor: torch.Tensor) -> int:
        offset, data = self.size, tensor.contiguous().flatten().view(torch.uint8)
        padding = -data.numel() % ALIGNMENT
        self.parts.append(torch.nn.functional.pad(data, (0, padding)))
        self.size += data.numel() + padding
        return offset

    def fill(
        self,
        ranks: tuple[int, ...] = RANKS,
        dtypes: tuple[torch.dtype, ...] = FACTOR_DTYPES,
        biases: bool = True,
    ) -> "Deltas":
        """Matrices for slots 0, 1 and 2."""
        for i, slot in enumerate((0, 1, 2)):
            for j, n in enumerate(self.sizes):
                if slot == 2 and j and j == len(self.sizes) - 1:
                    continue
                row = self.table[slot, j]
                if planes := PLANES[(i + j) % len(PLANES)]:
                    signs = [
                        pack_signs(self.random(n, self.k) > 0) for _ in range(planes)
                    ]
                    row[Field.SIGNS] = self.put(torch.stack(signs))
                    row[Field.PLANES] = planes
                    row[Field.SCALE] = self.put(self.random(planes, n))
                if rank := ranks[(i + j) % len(ranks)]:
                    dtype = dtypes[(i + 2 * j) % len(dtypes)]
                    row[Field.RANK_A] = row[Field.RANK_B] = rank
                    row[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(dtype)
                    row[Field.LORA_A] = self.put(self.factor(rank, self.k, dtype))
                    row[Field.LORA_B] = self.put(self.factor(n, rank, dtype))
                    if not dtype.is_floating_point:
                        peak = 8 if dtype == INT4 else 128
                        scale = self.random(rank) / peak**2
                        row[Field.LORA_SCALE] = self.put(scale)
        place_ranks(self.table)
        if biases:
            for slot, j in ((0, 0), (BIASES, len(self.sizes) - 1)):
                self.table[slot, j, Field.BIAS] = self.put(self.random(self.sizes[j]))
        return self

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def factor(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point:
            return self.random(rows, columns).to(dtype)
        peak = 8 if dtype == INT4 else 128
        values = torch.randint(-peak, peak, (rows, columns), generator=self.generator)
        return pack_int4(values.to(torch.int8)) if dtype == INT4 else values.to(dtype)

    @property
    def arena(self) -> torch.Tensor:
        return torch.cat(self.parts).to(DEVICE)

    def scratch(self, rows: int) -> torch.Tensor:
        ranks = self.table[:, :, Field.RANK_A].clamp_min(0).sum(1).max()
        return torch.full((rows, int(ranks) + 3), torch.nan, device=DEVICE)

    def slack(self, x: torch.Tensor, slot: int, dtype: torch.dtype) -> torch.Tensor:
        """How far from the reference a row may be, before y is rounded: [M, N].

        Two float32 sums of the same K terms in other orders differ by about
        sqrt(K) eps times the sum of the terms' sizes; four times that is allowed.
        On a device, 16-bit activations meet the low-rank factors as TF32: A, A x
        and B may each lose one part in 2^10, less than one in 2^8 in all. Of int4
        factors nothing is lost, and A x is rounded to the activations' dtype.
        """
        k, arena = x.shape[1], self.arena.cpu()
        unit = 4 * k**0.5 * torch.finfo(torch.float32).eps
        slack = []
        for j, n in enumerate(self.sizes):
            entry = self.table[slot, j].tolist()
            scale = sum(s.abs().T for s, _ in reference.planes(arena, entry, n, k))
            size = unit * (1 + scale * x.abs().sum(1, keepdim=True).expand(-1, n))
            if entry[Field.RANK_A] != ABSENT:
                a = reference.lora_a(arena, entry, k)
                b = reference.lora_b(arena, entry, n)
                product = x.abs() @ a.float().abs().T @ b.float().abs().T
                lost = 2**-8 if HAS_DEVICE and dtype != torch.float32 else 0
                if FACTOR_DTYPES[entry[Field.FACTOR_DTYPE]] == INT4:
                    lost = torch.finfo(dtype).eps / 2
                size = size + product * (unit + lost)
            slack.append(size)
        return torch.cat(slack, dim=1)


def step(deltas: Deltas, slot_of_row: list[int], dtype: torch.dtype):
    """x and y of a step; what no delta may read or write is NaN."""
    x = deltas.random(len(slot_of_row), deltas.k).to(dtype)
    y = deltas.random(len(slot_of_row), sum(deltas.sizes)).to(dtype)
    base = torch.tensor(slot_of_row) < 0
    x[base], y[base] = torch.nan, torch.nan
    return x.to(DEVICE), y.to(DEVICE)


def workers_of(deltas, arena: torch.Tensor, k: int, field: Field) -> list[torch.Tensor]:
    """The tables of three workers, each with some ranks of LORA_A or of LORA_B.

    Args:
        deltas: has a ``table`` [slots, slices, Field], ``sizes``, and ``put``.
        arena: uint8, what was put so far.
    """
    tables = [deltas.table.clone() for _ in range(3)]
    is_a = field == Field.LORA_A
    rank_field = Field.RANK_A if is_a else Field.RANK_B
    first_field = Field.FIRST_A if is_a else Field.FIRST_B
    for slot, index in (deltas.table[:, :, field] != ABSENT).nonzero().tolist():
        entry = deltas.table[slot, index].tolist()
        rank, dtype = entry[rank_field], FACTOR_DTYPES[entry[Field.FACTOR_DTYPE]]
        rows, columns = (rank, k) if is_a else (deltas.sizes[index], rank)
        width = int4_bytes(columns) if dtype == INT4 else columns
        (factor,) = read_matrices(arena, entry, field, dtype, 1, rows, width)
        parts = torch.arange(rank).tensor_split(3)
        for table, of in zip(tables, parts, strict=True):
            row = table[slot, index]
            row[field] = row[rank_field] = row[first_field] = ABSENT
            if not len(of):
                continue
            part = factor[of] if is_a else take_columns(factor, rank, of)
            together = entry[Field.SIDE_BY_SIDE] != ABSENT
            row[field] = deltas.put(side_by_side(part) if together else part)
            row[rank_field] = len(of)
            row[first_field] = entry[first_field] + int(of[0])
            if is_a and entry[Field.LORA_SCALE] != ABSENT:
                scale = read(arena, entry[Field.LORA_SCALE], torch.float32, rank)
                row[Field.LORA_SCALE] = deltas.put(scale[of])
    return tables


def popularity(law: str, rows: int) -> list[int]:
    """The slot of each row; some rows are the base's whatever the law."""
    generator = np.random.default_rng(rows)
    zipf = 1 / np.arange(1, SLOTS + 1)
    slots = {
        "identical": lambda: np.ones(rows, dtype=int),
        "distinct": lambda: np.arange(rows) % SLOTS,
        "uniform": lambda: generator.integers(-1, SLOTS, rows),
        "zipf": lambda: generator.choice(SLOTS, rows, p=zipf / zipf.sum()),
        "skewed": lambda: np.where(np.arange(rows) < 0.9 * rows, 0, 2),
        "base": lambda: np.full(rows, -1),
    }[law]()
    slots[3::7] = -1
    return slots.tolist()


def groups_of(slot_of_row: list[int]) -> RowGroups:
    groups = RowGroups(len(slot_of_row) + 3, SLOTS, DEVICE)
    groups.set(np.array(slot_of_row, dtype=np.int32))
    return groups
