# SPDX-License-Identifier: Apache-2.0
"""Which tensors describe one parameter of the fine-tune.

A matrix ``P`` is described by these, N x K being its shape and R its rank:

    P_shape   int64   [2]                N, K
    P_packed  int16   [N, ceil(K / 16)]  signs, in the order of dqrelo_kernels.layout;
    P_scale   float32 [1]                alpha; both absent in a delta of low rank
    P_lora_A  factor  [R, K]             the low-rank part is P_lora_B @ P_lora_A;
    P_lora_B  factor  [N, R]             both absent when R is 0

and then ``P(fine-tune) ~ P(base) + scale * signs + lora_B @ lora_A``. A tensor
called ``P`` is the fine-tune's parameter itself, exactly (norms and biases).
Parameters that are not mentioned are the base's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from dqrelo_kernels.layout import padding_is_clear, unpack_signs, words_per_row

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
LORA_A, LORA_B = "_lora_A", "_lora_B"
SUFFIXES = (PACKED, SCALE, SHAPE, LORA_A, LORA_B)
FACTOR_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EXACT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MatrixDelta:
    """The compressed change of one matrix.

    Attributes:
        shape: N, K.
        signs: [N, ceil(K / 16)] int16, packed; None in a delta of low rank.
        scale: [1] float32; None in a delta of low rank.
        lora_a: [R, K] bfloat16, float16 or float32; R may be 0 beside signs.
        lora_b: [N, R] of the same dtype.
    """

    shape: tuple[int, int]
    signs: torch.Tensor | None
    scale: torch.Tensor | None
    lora_a: torch.Tensor
    lora_b: torch.Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.lora_a.shape[0]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The stored tensors of the matrix called ``name``."""
        stored = {name + SHAPE: torch.tensor(self.shape, dtype=torch.int64)}
        if self.signs is not None and self.scale is not None:
            stored |= {name + PACKED: self.signs, name + SCALE: self.scale}
        if self.rank:
            stored |= {name + LORA_A: self.lora_a, name + LORA_B: self.lora_b}
        return stored

    @classmethod
    def from_tensors(
        cls, name: str, tensors: Mapping[str, torch.Tensor]
    ) -> "MatrixDelta":
        """The inverse of :meth:`tensors`; call ``matrix_problems`` on them first."""
        n, k = tensors[name + SHAPE].tolist()
        return cls(
            shape=(n, k),
            signs=tensors.get(name + PACKED),
            scale=tensors.get(name + SCALE),
            lora_a=tensors.get(name + LORA_A, torch.empty(0, k, dtype=torch.bfloat16)),
            lora_b=tensors.get(name + LORA_B, torch.empty(n, 0, dtype=torch.bfloat16)),
        )

    def dense(self) -> torch.Tensor:
        """``scale * signs + lora_B @ lora_A``, float32 [N, K]."""
        low_rank = self.lora_b.float() @ self.lora_a.float()
        if self.signs is None or self.scale is None:
            return low_rank
        signs = unpack_signs(self.signs, self.shape[1], torch.float32)
        return self.scale * signs + low_rank


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
    """All that is wrong with the stored tensors of one matrix; empty when sound."""
    if SHAPE not in suffixes:
        return [f"{name}: no tensor {name}{SHAPE}"]
    for pair in ((PACKED, SCALE), (LORA_A, LORA_B)):
        if len(suffixes & {*pair}) == 1:
            return [f"{name}: one of {' and '.join(pair)} without the other"]
    if suffixes == {SHAPE}:
        return [f"{name}: neither signs nor low-rank factors"]
    shape = tensors[name + SHAPE]
    if shape.dtype != torch.int64 or shape.shape != (2,) or bool((shape < 1).any()):
        return [f"{name}{SHAPE} must be two positive int64"]
    n, k = shape.tolist()
    rank = tensors[name + LORA_A].shape[0] if LORA_A in suffixes else 0
    expected: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {}
    if PACKED in suffixes:
        expected[PACKED] = ((n, words_per_row(k)), (torch.int16,))
        expected[SCALE] = ((1,), (torch.float32,))
    if LORA_A in suffixes:
        expected[LORA_A] = ((rank, k), FACTOR_DTYPES)
        expected[LORA_B] = ((n, rank), (tensors[name + LORA_A].dtype,))
    found = []
    for suffix, (size, dtypes) in expected.items():
        tensor = tensors[name + suffix]
        if tuple(tensor.shape) != size or tensor.dtype not in dtypes:
            found.append(
                f"{name}{suffix} is {tensor.dtype} {list(tensor.shape)}, expected "
                f"{' or '.join(map(str, dtypes))} {list(size)}"
            )
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            found.append(f"{name}{suffix} has a NaN or an infinity")
    packed = tensors.get(name + PACKED)
    if not found and packed is not None and not padding_is_clear(packed, k):
        found.append(f"{name}{PACKED} has padding bits set")
    return found


def exact_problems(name: str, tensor: torch.Tensor) -> list[str]:
    """All that is wrong with an exactly stored parameter; empty when sound."""
    if tensor.dtype not in EXACT_DTYPES:
        return [f"{name} is {tensor.dtype}, expected bfloat16, float16 or float32"]
    if not bool(tensor.isfinite().all()):
        return [f"{name} has a NaN or an infinity"]
    return []
