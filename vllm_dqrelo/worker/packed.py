# SPDX-License-Identifier: Apache-2.0
"""A delta ready for the device: one run of bytes and a table of where things are."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.layernorm import GemmaRMSNorm

from dqrelo_kernels.layout import side_by_side
from dqrelo_kernels.table import (
    ABSENT,
    FACTOR_DTYPES,
    Field,
    aligned,
    empty_table,
    place_ranks,
)
from vllm_dqrelo.format.checkpoint import HEAD
from vllm_dqrelo.format.errors import refuse
from vllm_dqrelo.format.tensors import ADDED, MatrixDelta, take_columns
from vllm_dqrelo.worker.sites import Place, Sites
from vllm_dqrelo.worker.tower import Change, Tower, is_beside

logger = init_logger(f"vllm.{__name__}")

NORM_FIELDS = {"weight": Field.WEIGHT, "bias": Field.BIAS}


@dataclass(frozen=True)
class PackedDelta:
    """A registered delta in host memory.

    Attributes:
        digest: of its content.
        extent: uint8 [bytes], copied as a whole into the arena.
        entries: int64 [slices of all sites, Field], offsets from the extent's start.
        added: site -> rows [E, K] of tokens that are not the base's.
        vocab_size: tokens of its model; None for the base's.
        elsewhere: parameters that only another stage of a pipeline can have.
        tower: changes of what encodes images, on the CPU.
    """

    digest: str
    extent: torch.Tensor
    entries: torch.Tensor
    added: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    vocab_size: int | None = None
    elsewhere: frozenset[str] = frozenset()
    tower: Mapping[str, Change] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes it takes in the arena."""
        return self.extent.numel()

    @property
    def host_bytes(self) -> int:
        """Bytes it takes in host memory."""
        return self.size + sum(change.nbytes for change in self.tower.values())


class Source(Protocol):
    """What a delta is packed from: a folder's ``Delta``, or the self-check's."""

    folder: Any
    config: Any
    matrices: list[str]
    exact: list[str]
    added_tokens: int

    def matrix(self, name: str) -> MatrixDelta:
        """The compressed change of a matrix."""

    def parameter(self, name: str) -> torch.Tensor:
        """A parameter that is stored exactly."""


class _Extent:
    """Collects tensors and the offsets that they will have."""

    def __init__(self, device: torch.device) -> None:
        self._parts: list[tuple[int, torch.Tensor]] = []
        self._size = 0
        self._device = device

    @property
    def side_by_side(self) -> bool:
        """Whether rows of a matrix lie so, see dqrelo_kernels.layout."""
        return self._device.type == "cpu"

    def add(self, tensor: torch.Tensor) -> int:
        """The byte offset of ``tensor``."""
        offset = self._size
        self._parts.append((offset, tensor.contiguous().flatten().view(torch.uint8)))
        self._size = aligned(offset + tensor.nbytes)
        return offset

    def add_matrices(self, *packed: torch.Tensor) -> int:
        """The same for packed matrices of one shape."""
        if not self.side_by_side:
            return self.add(torch.stack(packed))
        return self.add(torch.cat([side_by_side(matrix) for matrix in packed]))

    def bytes(self) -> torch.Tensor:
        """All bytes, uint8, in pageable memory."""
        data = torch.zeros(self._size, dtype=torch.uint8)
        for offset, part in self._parts:
            data[offset : offset + part.numel()].copy_(part)
        return data


def pack(
    delta: Source,
    sites: Sites,
    device: torch.device,
    unlike: Mapping[str, str] = MappingProxyType({}),
    tower: Tower | None = None,
) -> PackedDelta:
    """Lay a delta out for the sites of a model on ``device``.

    Args:
        delta: adds at most as many tokens as the sites have room for.
        unlike: parameters that vLLM has otherwise than the checkpoint, and how
            (order.py).
        tower: what encodes images; None where the base encodes all of them.

    Raises:
        DqreloError: it has a parameter that no site takes, or of another shape; a
            delta is served as a whole or not at all. In a stage of a pipeline what no
            site takes is ``elsewhere``: ``agreed`` sees that some stage has it.
    """
    extent, problems = _Extent(device), []
    vocab_size = delta.config.vocab_size
    if vocab_size is None:
        vocab_size = sites.tokens + delta.added_tokens
    elif 0 < sites.tokens <= vocab_size:
        problems.append(
            f"vocab_size is {vocab_size}, expected fewer than the base's {sites.tokens}"
        )
    added: dict[str, torch.Tensor] = {}
    encoder: dict[str, Change] = {}
    elsewhere, beside, unused = set(), [], []
    entries = empty_table(1, sites.count, "cpu")[0]
    for name in [*delta.matrices, *delta.exact]:
        tied = HEAD not in delta.matrices
        places = sites.places(name.removesuffix(ADDED), tied)
        if not places and tower is not None and tower.has(name):
            change = (
                delta.matrix(name) if name in delta.matrices else delta.parameter(name)
            )
            if problem := tower.problem(name, tuple(change.shape)):
                problems.append(problem)
            elif tower.uses(name):
                encoder[name] = tower.cut(name, change)
            else:
                unused.append(name)
            continue
        if not places and is_beside(sites.model, name.removesuffix(ADDED)):
            beside.append(name)
            continue
        if not places and sites.is_stage:
            elsewhere.add(name)
            continue
        if not places:
            problems.append(f"{name} is not a parameter of the model")
            continue
        if name.endswith(ADDED):
            rows = delta.parameter(name)
            for place in places:
                expected = place.shape[1:] if place.site.is_vocabulary else None
                if tuple(rows.shape[1:]) != expected:
                    problems.append(
                        f"{name} is {list(rows.shape)}: not rows of {place.site.name}"
                    )
                    continue
                here = sites.added_here(place.site)
                added[place.site.name] = rows[here.start : here.stop].clone()
            continue
        fields, shape = (
            _matrix(delta, name, places[0], extent)
            if name in delta.matrices
            else _vector(delta, name, places[0], extent)
        )
        for place in places:
            if shape != place.shape:
                problems.append(f"{name} is {shape}, {place.site.name} {place.shape}")
            elif not fields:
                problems.append(f"{name} is stored exactly: only vectors can be")
            if name in unlike:
                problems.append(f"{name}: {unlike[name]}")
            for field, value in fields.items():
                entries[place.slice, field] = value
    if beside:
        problems.append(
            f"{len(beside)} of its parameters, such as {beside[0]}, are outside of the "
            "language model (vision tower, projector), where all models of this server "
            "have the base's: start it with --enable-tower-connector-lora"
        )
    for site in sites.by_name.values():
        mine = entries[site.first : site.first + len(site.sizes)]
        place_ranks(mine.view(site.experts, -1, len(Field)))
    _complete_norms(entries, sites, extent)
    refuse(f"{delta.folder} does not fit the served model:", problems)
    if unused:
        logger.info(
            "dqrelo: %s changes %d parameters that vLLM does not load, such as %s",
            delta.folder,
            len(unused),
            unused[0],
        )
    data = extent.bytes()
    return PackedDelta(
        delta.config.digest,
        data,
        entries,
        added,
        vocab_size,
        frozenset(elsewhere),
        encoder,
    )


def _matrix(
    delta: Source, name: str, place: Place, extent: _Extent
) -> tuple[dict[Field, int], tuple[int, ...]]:
    matrix = delta.matrix(name)
    shape, fields = matrix.shape, {}
    if shape != place.shape:
        return {}, shape
    if place.site.is_split:
        matrix = matrix.part(place.rows, place.columns)
    if extent.side_by_side:
        fields[Field.SIDE_BY_SIDE] = 1
    if matrix.planes:
        fields[Field.SIGNS] = extent.add_matrices(*matrix.signs)
        fields[Field.PLANES] = matrix.planes
        scale = matrix.scale.expand(matrix.planes, matrix.shape[0])
        fields[Field.SCALE] = extent.add(scale)
    fields[Field.FACTOR_DTYPE] = FACTOR_DTYPES.index(matrix.lora_a.dtype)
    of_a, of_b = place.site.ranks(matrix.rank)
    if len(of_a):
        fields[Field.RANK_A], fields[Field.FIRST_A] = len(of_a), int(of_a[0])
        fields[Field.LORA_A] = extent.add_matrices(matrix.lora_a[of_a])
        if matrix.lora_scale is not None:
            fields[Field.LORA_SCALE] = extent.add(matrix.lora_scale[of_a])
    if len(of_b):
        fields[Field.RANK_B], fields[Field.FIRST_B] = len(of_b), int(of_b[0])
        lora_b = take_columns(matrix.lora_b, matrix.rank, of_b)
        fields[Field.LORA_B] = extent.add_matrices(lora_b)
    return fields, shape


def _vector(
    delta: Source, name: str, place: Place, extent: _Extent
) -> tuple[dict[Field, int], tuple[int, ...]]:
    value = delta.parameter(name).float()
    shape = tuple(value.shape)
    if place.site.is_norm:
        # Gemma's norm multiplies by 1 + weight; the op multiplies by its argument.
        gemma = isinstance(place.site.module, GemmaRMSNorm)
        field = NORM_FIELDS[place.leaf]
        return {field: extent.add(value + 1 if gemma else value)}, shape
    if place.leaf == "bias" and shape == place.shape:
        base = place.site.base_vector("bias", place.index)
        change = value[place.rows] - base
        if not place.site.adds_bias:
            change.zero_()
        return {Field.BIAS: extent.add(change)}, shape
    return {}, shape


def _complete_norms(entries: torch.Tensor, sites: Sites, extent: _Extent) -> None:
    """A norm is redone as a whole: what the fine-tune left alone is the base's."""
    for site in sites.by_name.values():
        entry = entries[site.first]
        fields = list(NORM_FIELDS.values())
        if not site.is_norm or bool((entry[fields] == ABSENT).all()):
            continue
        for leaf, field in NORM_FIELDS.items():
            if entry[field] == ABSENT and site.has(leaf):
                entry[field] = extent.add(site.base_vector(leaf))
