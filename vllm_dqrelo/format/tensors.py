# SPDX-License-Identifier: Apache-2.0
"""Which tensors describe one parameter of the fine-tune.

A matrix ``P`` is described by these, N x K being its shape, R its rank, and Q the
number of its sign planes:

    P_shape      int64   [2]                   N, K
    P_packed     int16   [Q, N, ceil(K / 16)]  signs, in the order of
                                               dqrelo_kernels.layout
    P_scale      float32 [Q, N] or [Q, 1]      of each row, or of the whole plane
    P_lora_A     factor  [R, K]                the low-rank part is
    P_lora_B     factor  [N, R]                P_lora_B @ P_lora_A, or with integers
    P_lora_scale float32 [R]                   P_lora_B @ (P_lora_scale * P_lora_A)

    P(fine-tune) ~ P(base) + sum of scale * signs + low-rank part

Signs and scale are both absent in a delta of low rank, the factors when R is 0. A
uint8 factor holds two integers of four bits a byte: A is then [R, ceil(K / 2)] and B
[N, ceil(R / 2)]. A tensor called ``P`` is the fine-tune's parameter itself, exactly
(norms and biases). ``P_added`` [E, K] are the rows that the fine-tune's matrix has
beyond the base's N, exactly: tokens that it added to the vocabulary. Parameters that
are not mentioned are the base's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dqrelo_kernels.layout import (
    int4_bytes,
    int4_padding_is_clear,
    padding_is_clear,
    take_int4,
    take_signs,
    unpack_int4,
    unpack_signs,
    words_per_row,
)

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
LORA_A, LORA_B, LORA_SCALE = "_lora_A", "_lora_B", "_lora_scale"
# A suffix comes before those that it ends with.
SUFFIXES = (PACKED, LORA_SCALE, SCALE, SHAPE, LORA_A, LORA_B)
ADDED = "_added"
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT4 = torch.uint8  # two a byte
FACTOR_DTYPES = (*FLOATS, torch.int8, INT4)
ROWS = 1024  # of signs, unpacked at a time


@dataclass(frozen=True)
class MatrixDelta:
    """The compressed change of one matrix; Q planes and rank R, either may be 0.

    Attributes:
        shape: N, K.
        signs: [Q, N, ceil(K / 16)] int16, packed.
        scale: [Q, N] or [Q, 1] float32.
        lora_a: [R, K] of one of FACTOR_DTYPES; INT4 packed, [R, ceil(K / 2)].
        lora_b: [N, R] of the same dtype; INT4 packed, [N, ceil(R / 2)].
        lora_scale: [R] float32 with integers, else None.
    """

    shape: tuple[int, int]
    signs: torch.Tensor
    scale: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    lora_scale: torch.Tensor | None = None

    @property
    def planes(self) -> int:
        """Q."""
        return self.signs.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors("").values())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of the matrix called ``name``."""
        stored = {name + SHAPE: torch.tensor(self.shape, dtype=torch.int64)}
        if self.planes:
            stored |= {name + PACKED: self.signs, name + SCALE: self.scale}
        if self.rank:
            stored |= {name + LORA_A: self.lora_a, name + LORA_B: self.lora_b}
            if self.lora_scale is not None:
                stored[name + LORA_SCALE] = self.lora_scale
        return stored

    @classmethod
    def from_tensors(
        cls, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> "MatrixDelta":
        """The inverse of :meth:`tensors`; call ``matrix_problems`` on them first."""
        n, k = tensors[name + SHAPE].tolist()
        signs = torch.empty(0, n, words_per_row(k), dtype=torch.int16)
        return cls(
            shape=(n, k),
            signs=tensors.get(name + PACKED, signs),
            scale=tensors.get(name + SCALE, torch.empty(0, 1)),
            lora_a=tensors.get(name + LORA_A, torch.empty(0, k, dtype=torch.bfloat16)),
            lora_b=tensors.get(name + LORA_B, torch.empty(n, 0, dtype=torch.bfloat16)),
            lora_scale=tensors.get(name + LORA_SCALE),
        )

    def part(self, rows: torch.Tensor, columns: torch.Tensor) -> "MatrixDelta":
        """The change of some rows and columns, int64 each, that keep their order."""
        k = self.shape[1]
        signs = [take_signs(plane[rows], k, columns) for plane in self.signs]
        return MatrixDelta(
            shape=(len(rows), len(columns)),
            signs=torch.stack(signs) if signs else self.signs[:, : len(rows)],
            scale=self.scale if self.scale.shape[1] == 1 else self.scale[:, rows],
            lora_a=take_columns(self.lora_a, k, columns),
            lora_b=self.lora_b[rows],
            lora_scale=self.lora_scale,
        )

    def to(self, device: torch.device) -> "MatrixDelta":
        """The same with its tensors on ``device``."""
        scale = self.lora_scale
        return MatrixDelta(
            shape=self.shape,
            signs=self.signs.to(device),
            scale=self.scale.to(device),
            lora_a=self.lora_a.to(device),
            lora_b=self.lora_b.to(device),
            lora_scale=None if scale is None else scale.to(device),
        )

    def dense(self) -> torch.Tensor:
        """The change of the base's matrix, float32 [N, K]."""
        a, b = self.lora_a, self.lora_b
        if a.dtype == INT4:
            a, b = unpack_int4(a, self.shape[1]), unpack_int4(b, self.rank)
        a, b = a.float(), b.float()
        out = b @ (a if self.lora_scale is None else self.lora_scale[:, None] * a)
        for signs, scale in zip(self.signs, self.scale, strict=True):
            sides = (side.split(ROWS) for side in (out, signs, scale.expand(len(out))))
            for rows, words, sizes in zip(*sides, strict=True):
                plane = unpack_signs(words, self.shape[1], torch.float32)
                rows.addcmul_(sizes[:, None], plane)
        return out


def take_columns(
    factor: torch.Tensor, columns: int, taken: torch.Tensor
) -> torch.Tensor:
    """Some columns of a factor that has ``columns``: int64, in ascending order."""
    if factor.dtype == INT4:
        return take_int4(factor, columns, taken)
    return factor[:, taken]


def group(names: Iterable[str]) -> tuple[dict[str, set[str]], list[str]]:
    """Sort stored tensors into matrices (name -> suffixes) and exact parameters."""
    matrices: dict[str, set[str]] = {}
    exact = []
    for stored in sorted(names):
        suffix = next((s for s in SUFFIXES if stored.endswith(s)), None)
        if suffix:
            matrices.setdefault(stored.removesuffix(suffix), set()).add(suffix)
        else:
            exact.append(stored)
    return matrices, exact


def matrix_problems(
    name: str, suffixes: set[str], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """The problems of the stored tensors of one matrix; empty when sound."""
    if SHAPE not in suffixes:
        return [f"{name}: tensor {name}{SHAPE} is missing"]
    for pair in ((PACKED, SCALE), (LORA_A, LORA_B)):
        if len(suffixes & {*pair}) == 1:
            return [f"{name}: one of {' and '.join(pair)} without the other"]
    if not suffixes & {PACKED, LORA_A}:
        return [f"{name}: neither signs nor low-rank factors"]
    shape = tensors[name + SHAPE]
    if shape.dtype != torch.int64 or shape.shape != (2,) or bool((shape < 1).any()):
        return [f"{name}{SHAPE} must be two positive int64"]
    n, k = shape.tolist()
    found = []

    def expect(
        suffix: str, dtypes: tuple[torch.dtype, ...], *sizes: tuple[int, ...]
    ) -> None:
        tensor = tensors[name + suffix]
        if tensor.dtype not in dtypes or tuple(tensor.shape) not in sizes:
            found.append(
                f"{name}{suffix} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{' or '.join(map(str, dtypes))} "
                f"{' or '.join(str(list(size)) for size in sizes)}"
            )
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found.append(f"{name}{suffix} has a NaN or an infinity")

    if PACKED in suffixes:
        planes = max([1, *tensors[name + PACKED].shape[:1]])
        expect(PACKED, (torch.int16,), (planes, n, words_per_row(k)))
        expect(SCALE, (torch.float32,), (planes, n), (planes, 1))
        if not found and not padding_is_clear(tensors[name + PACKED].flatten(0, 1), k):
            found.append(f"{name}{PACKED} has padding bits set")
    integer = False
    if LORA_A in suffixes:
        factor = tensors[name + LORA_A]
        rank, dtype = max([1, *factor.shape[:1]]), factor.dtype
        integer, packed = dtype in FACTOR_DTYPES and dtype not in FLOATS, dtype == INT4
        expect(LORA_A, FACTOR_DTYPES, (rank, int4_bytes(k) if packed else k))
        expect(LORA_B, (dtype,), (n, int4_bytes(rank) if packed else rank))
        for suffix, columns in ((LORA_A, k), (LORA_B, rank)) if packed else ():
            if not found and not int4_padding_is_clear(tensors[name + suffix], columns):
                found.append(f"{name}{suffix} has padding bits set")
    if integer != (LORA_SCALE in suffixes):
        found.append(f"{name}{LORA_SCALE} belongs to integer factors, and only to them")
    elif integer:
        expect(LORA_SCALE, (torch.float32,), (rank,))
    return found


def exact_problems(name: str, tensor: torch.Tensor) -> list[str]:
    """The problems of an exactly stored parameter; empty when sound."""
    if tensor.dtype not in FLOATS:
        return [f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32"]
    if name.endswith(ADDED) and (tensor.ndim != 2 or not tensor.numel()):
        return [f"{name} is {list(tensor.shape)}, expected rows of a matrix"]
    if not bool(tensor.isfinite().all()):
        return [f"{name} has a NaN or an infinity"]
    return []
