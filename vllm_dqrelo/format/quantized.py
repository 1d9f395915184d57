# SPDX-License-Identifier: Apache-2.0
"""Quantised matrices of a checkpoint, read as the numbers that they stand for.

A matrix ``P.weight`` [N, K] is stored as several tensors, by its format:

    compressed-tensors   P.weight_packed int32 [N, K / n], n numbers a word, with
                         P.weight_shape and P.weight_scale [N, groups of columns]
    compressed-tensors,  P.weight int8 or float8 [N, K] with P.weight_scale, of all or
    fp8                  of each row, or P.weight_scale_inv, of each block
    gptq                 P.qweight int32 [K / n, N] with P.scales and P.qzeros, of
                         groups of columns, and P.g_idx, the group of each column
    awq                  P.qweight int32 [K, N / n], the same

vLLM computes with the same numbers; order.py compares them when a server starts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dqrelo.format.errors import DqreloError

PACKED, SCALE, BLOCK_SCALE = ".weight_packed", ".weight_scale", ".weight_scale_inv"
SHAPE, ZEROS, GROUPS = ".weight_shape", ".weight_zero_point", ".weight_g_idx"
QWEIGHT, QZEROS, SCALES, G_IDX = ".qweight", ".qzeros", ".scales", ".g_idx"
WEIGHT = ".weight"
PARTS = (PACKED, SCALE, BLOCK_SCALE, SHAPE, ZEROS, GROUPS)
GPTQ_PARTS = (QWEIGHT, QZEROS, SCALES, G_IDX)
# Of activations; a matrix is read without them.
OTHERS = (".input_scale", ".input_zero_point", ".activation_scale")
METHODS = ("compressed-tensors", "fp8", "gptq", "awq")
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # place in a word of each of 8 columns

Spec = Callable[[str], tuple[str, list[int]]]
Get = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Quantized:
    """One matrix.

    Attributes:
        module: P.
        parts: suffixes of its tensors.
        config: quantization_config of the checkpoint's config.json.
    """

    module: str
    parts: frozenset[str]
    config: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The names of the matrix's tensors."""
        return [self.module + part for part in sorted(self.parts)]

    def shape(self, spec: Spec, get: Get) -> list[int]:
        """N, K; ``spec`` and ``get`` are of the stored tensors."""
        if PACKED in self.parts:
            return get(self.module + SHAPE).tolist()
        if QWEIGHT in self.parts:
            rows, columns = spec(self.module + QWEIGHT)[1]
            n = 32 // self.config["bits"]
            awq = self.config["quant_method"] == "awq"
            return [columns * n, rows] if awq else [columns, rows * n]
        return spec(self.module + WEIGHT)[1]

    def dense(self, get: Get) -> torch.Tensor:
        """What it stands for, float32 [N, K]."""
        tensors = {part: get(self.module + part) for part in self.parts}
        if PACKED in self.parts:
            return _packed(tensors)
        if QWEIGHT in self.parts:
            awq = self.config["quant_method"] == "awq"
            return _awq(tensors) if awq else _gptq(tensors, self.config)
        return _scaled(tensors, self.config)


def method_of(config: Any) -> Any:
    """The quant_method of a quantization_config; other values than objects as given."""
    return config.get("quant_method") if isinstance(config, Mapping) else config


def find(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Quantized]:
    """Parameter -> quantised matrix, of the stored tensors called ``names``.

    Raises:
        DqreloError: the format is not one that can be read.
    """
    if (method := method_of(config)) not in METHODS:
        raise DqreloError(
            f"a checkpoint quantised by {method} cannot be read, only by "
            f"{', '.join(METHODS)}. Convert from the 16-bit checkpoint"
        )
    parts: dict[str, set[str]] = {}
    stored = set(names)
    for name in stored:
        for suffix in (*PARTS, *GPTQ_PARTS):
            if name.endswith(suffix):
                parts.setdefault(name.removesuffix(suffix), set()).add(suffix)
    for module, suffixes in parts.items():
        if module + WEIGHT in stored:
            suffixes.add(WEIGHT)
    return {
        module + WEIGHT: Quantized(module, frozenset(suffixes), config)
        for module, suffixes in parts.items()
    }


def _packed(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    n, k = tensors[SHAPE].tolist()
    bits = 32 // -(-k // tensors[PACKED].shape[1])
    values = _unpack(tensors[PACKED], bits)[:, :k] - (1 << bits - 1)
    scale, zeros = tensors[SCALE].float(), tensors.get(ZEROS)
    group = tensors.get(GROUPS, torch.arange(k) // -(-k // scale.shape[1])).long()
    if zeros is not None:  # packed by rows
        offset = _unpack(zeros.T, bits).T[:n] - (1 << bits - 1)
        values = values - offset[:, group]
    return values * scale[:, group]


def _scaled(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> torch.Tensor:
    values = tensors[WEIGHT].float()
    if BLOCK_SCALE not in tensors:
        scale = tensors[SCALE].float()
        return values * (scale[:, None] if scale.ndim == 1 else scale)
    rows, columns = config["weight_block_size"]
    scale = tensors[BLOCK_SCALE].float()
    scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return values * scale[: values.shape[0], : values.shape[1]]


def _gptq(
    tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> torch.Tensor:
    bits = config["bits"]
    values = _unpack(tensors[QWEIGHT].T, bits)  # [N, K]
    # The first version of the format stores the zero points less one.
    first = config.get("checkpoint_format", "gptq") != "gptq_v2"
    zeros, scales = _unpack(tensors[QZEROS], bits) + first, tensors[SCALES].float()
    k = values.shape[1]
    group = tensors.get(G_IDX, torch.arange(k) // -(-k // len(scales))).long()
    return (values - zeros.T[:, group]) * scales.T[:, group]


def _awq(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    values, zeros = (
        _unpack(tensors[part], 4).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1)
        for part in (QWEIGHT, QZEROS)
    )
    scales = tensors[SCALES].float()
    group = torch.arange(len(values)) // (len(values) // len(scales))
    return ((values - zeros[group]) * scales[group]).T.contiguous()


def _unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of some bits, the lowest first: int32 [rows, columns * 32 / bits]."""
    if bits not in (2, 4, 8):
        raise DqreloError(f"matrices of {bits} bits cannot be read, only of 2, 4 or 8")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return (words[:, :, None] >> shifts & (1 << bits) - 1).flatten(1)
