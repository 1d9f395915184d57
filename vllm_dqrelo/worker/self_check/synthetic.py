# SPDX-License-Identifier: Apache-2.0
"""Random deltas of the served model, which ``pack`` takes as it takes a folder's."""

import math
import zlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dqrelo_kernels.layout import int4_bytes, pack_int4, pack_signs, words_per_row
from dqrelo_kernels.table import ALIGNMENT
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.tensor_file import text_of
from vllm_dqrelo.format.tensors import INT4, MatrixDelta
from vllm_dqrelo.worker.sites import Place

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

OFFSETS = 2**16  # a tensor begins at one of these elements of its pool, aligned


class Kind(NamedTuple):
    """How a delta describes its matrices.

    Attributes:
        planes: sign planes.
        rank: of the low-rank part, even.
        dtype: of the factors.
    """

    planes: int
    rank: int
    dtype: torch.dtype

    def limited(self, rank: int) -> "Kind":
        """With at most ``rank`` ranks."""
        return self._replace(rank=min(self.rank, rank))

    def __str__(self) -> str:
        dtype = "int4" if self.dtype == INT4 else text_of(self.dtype)
        return f"{self.planes} planes and rank {self.rank} in {dtype}"


class Named(NamedTuple):
    """A parameter of the base, and where it is in the model."""

    name: str
    place: Place


def by_site(manager: "DeltaManager") -> dict[str, list[Named]]:
    """The parameters of each site that a delta can change."""
    found: dict[str, list[Named]] = {name: [] for name in manager.sites.by_name}
    for name in manager.base:
        if name not in manager.unlike:
            for place in manager.sites.places(name):
                found[place.site.name].append(Named(name, place))
    return found


class Synthetic:
    """A delta of random numbers, with the attributes of ``format.Delta``.

    Semantics: each entry of a change has the root mean square
    ``strength * rms(W)`` of its matrix W, or ``1 / sqrt(K)`` where ``strength`` is
    None. Each entry of a vector moves by about an eighth of the vector's mean size.
    The same name has the same numbers in all workers.

    Args:
        digest: its name in this worker.
        base: of the served model.
        names: parameters of ``base`` that the delta changes.
        kind: of its matrices.
        strength: see above.
    """

    added_tokens = 0

    def __init__(
        self,
        digest: str,
        base: Checkpoint,
        names: Iterable[str],
        kind: Kind,
        strength: float | None = None,
    ) -> None:
        self.folder: Any = digest
        self.config: Any = SimpleNamespace(digest=digest, vocab_size=None)
        self.base, self.kind, self.strength = base, kind, strength
        self.matrices: list[str] = []
        self.exact: list[str] = []
        for name in names:
            is_matrix = len(base.spec(name)[1]) == 2
            (self.matrices if is_matrix else self.exact).append(name)

    def matrix(self, name: str) -> MatrixDelta:
        """The change of the matrix ``name``; its tensors are views of shared pools."""
        n, k = self.base.spec(name)[1]
        planes, rank, dtype = self.kind
        size = self._size(name, k) / math.sqrt(bool(planes) + bool(rank))
        generator = self._generator(name)
        scale = 0.5 + torch.rand(planes, n, generator=generator)
        signs = self._signs(name, planes, n, k)
        scale *= size / math.sqrt(max(planes, 1))
        a, b = self._factor(name, "A", rank, k), self._factor(name, "B", n, rank)
        if dtype.is_floating_point:
            a = (a.float() * (size / math.sqrt(max(rank, 1)))).to(dtype)
            return MatrixDelta((n, k), signs, scale, a, b)
        peak = 8 if dtype == INT4 else 128
        unit = 3 / peak**2 * size / math.sqrt(max(rank, 1))  # of uniform integers
        sizes = unit * (0.5 + torch.rand(rank, generator=generator))
        return MatrixDelta((n, k), signs, scale, a, b, sizes)

    def parameter(self, name: str) -> torch.Tensor:
        """The whole vector ``name``, float32."""
        value = self.base.get(name).float()
        noise = torch.randn(len(value), generator=self._generator(name))
        return value + noise * (value.abs().mean() + 0.1) / 8

    def change(
        self, parameter: Named, rows: torch.Tensor, device: torch.device
    ) -> MatrixDelta:
        """The change of some rows of a worker's part of a matrix.

        Args:
            parameter: a matrix.
            rows: int64, of the rows that this worker has.
            device: of the result's tensors.
        """
        place = parameter.place
        matrix = self.matrix(parameter.name)
        part = matrix.part(place.rows[rows.cpu()], place.columns)
        sizes = part.lora_scale
        return MatrixDelta(
            part.shape,
            part.signs.to(device),
            part.scale.to(device),
            part.lora_a.to(device),
            part.lora_b.to(device),
            None if sizes is None else sizes.to(device),
        )

    def _size(self, name: str, k: int) -> float:
        if self.strength is None:
            return 1 / math.sqrt(k)
        n = self.base.spec(name)[1][0]
        rows = torch.cat(list(self.base.rows(name, sorted({0, n // 2, n - 1}))))
        return self.strength * float(rows.float().square().mean().sqrt())

    def _generator(self, name: str) -> torch.Generator:
        seed = zlib.crc32(f"{self.folder} {name}".encode())
        return torch.Generator().manual_seed(seed)

    def _signs(self, name: str, planes: int, n: int, k: int) -> torch.Tensor:
        shape, key = (planes, n, words_per_row(k)), f"{self.folder} {name}"
        if k % 16 == 0:  # not a bit of padding
            return _random(torch.int16, shape, key)
        bits = _random(torch.int8, (planes, n, k), key) > 0
        packed = [pack_signs(plane) for plane in bits]
        return torch.stack(packed) if packed else torch.empty(shape, dtype=torch.int16)

    def _factor(self, name: str, which: str, rows: int, columns: int) -> torch.Tensor:
        key, dtype = f"{self.folder} {name} {which}", self.kind.dtype
        if dtype != INT4:
            return _random(dtype, (rows, columns), key)
        if columns % 2 == 0:  # not a nibble of padding
            return _random(dtype, (rows, int4_bytes(columns)), key)
        values = _random(torch.int8, (rows, columns), key) >> 4
        return pack_int4(values)


_pools: dict[torch.dtype, torch.Tensor] = {}


def _random(dtype: torch.dtype, shape: tuple[int, ...], key: str) -> torch.Tensor:
    """A view of random numbers: normal, or all integers of ``dtype``.

    A key has the same numbers each time: a larger pool begins as a smaller one does.
    """
    count, offset = math.prod(shape), zlib.crc32(key.encode()) % OFFSETS
    offset -= offset % ALIGNMENT
    pool = _pools.get(dtype)
    if pool is None or len(pool) < count + OFFSETS:
        generator = torch.Generator().manual_seed(0)
        size = (count + OFFSETS,)
        if dtype.is_floating_point:
            pool = torch.randn(size, generator=generator).to(dtype)
        else:
            ends = torch.iinfo(dtype)
            pool = torch.randint(
                ends.min, ends.max + 1, size, dtype=dtype, generator=generator
            )
        _pools[dtype] = pool
    return pool[offset : offset + count].view(shape)


def free_pools() -> None:
    """Free the memory that synthetic deltas share."""
    _pools.clear()
