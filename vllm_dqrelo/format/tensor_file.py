# SPDX-License-Identifier: Apache-2.0
"""One safetensors file, read with plain reads.

The safetensors library maps a file into memory. A mapped file that somebody cuts short
ends the process that reads the file, and here that is a server. A read of bytes that
are gone is an error like any other.

The library's ``safe_open(..., backend="pread")`` (0.8.0) still maps the file to parse
the header, and reads the whole tensor for a slice of one row.
"""

import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.regular_file import open_regular

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
MOST_HEADER = 100 * 2**20  # bytes, the safetensors library's own limit
BAD_HEADER = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
CHUNK = 2**26  # bytes that one read asks for at most


class TensorFile:
    """An open file: it stays the same one when another takes its name.

    Args:
        path: of the file.

    Attributes:
        tensors: name -> dtype as safetensors spells it, shape, first byte.
        metadata: the header's.

    Raises:
        FileNotFoundError: it is not there. DqreloError: it is truncated, foreign or
            cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_regular(path)
        self._opened = self._state()
        self.tensors: dict[str, tuple[str, list[int], int]] = {}
        try:
            self.metadata = self._read_header()
        except BAD_HEADER as error:
            raise DqreloError(
                f"{path} is not a readable safetensors file ({error}); fetch it again"
            ) from error

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        dtype, shape, start = self.tensors[name]
        return self._read_tensor(name, dtype, shape, start)

    def row(self, name: str, index: int) -> torch.Tensor:
        """``tensor[index : index + 1]``."""
        dtype, (_, *shape), start = self.tensors[name]
        first = start + index * nbytes(dtype, shape)
        return self._read_tensor(name, dtype, [1, *shape], first)

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to it since it was opened."""
        return self._state() != self._opened

    def _state(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns

    def _read_header(self) -> dict[str, str]:
        """Fill ``tensors``; they must cover the file without gap or overlap."""
        size, _ = self._opened
        length = int.from_bytes(self._read(0, min(size, 8)), "little")
        if size < 8 or length > min(size - 8, MOST_HEADER):
            raise ValueError(f"its header has {length} bytes, the file {size}")
        header = json.loads(self._read(8, length))
        metadata = header.pop("__metadata__", {})
        end = 0
        places = sorted((entry["data_offsets"], name) for name, entry in header.items())
        for (first, last), name in places:
            dtype, shape = header[name]["dtype"], header[name]["shape"]
            if not isinstance(dtype, str):
                raise ValueError(f"{name} has a dtype that is not text")
            if not all(type(n) is int and n >= 0 for n in (*shape, first, last)):
                raise ValueError(
                    f"{name} has a shape or an offset that is not a number"
                )
            if dtype in DTYPES and last - first != nbytes(dtype, shape):
                raise ValueError(f"{name} has {last - first} bytes for {dtype} {shape}")
            if first != end or last < first:
                raise ValueError(f"{name} is not where it should be")
            end = last
            self.tensors[name] = dtype, list(shape), 8 + length + first
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes, but has {size}")
        return metadata

    def _read_tensor(
        self, name: str, dtype: str, shape: list[int], start: int
    ) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch_dtype(name, dtype))
        content = tensor.view(-1).view(torch.uint8).numpy()
        for first in range(0, len(content), CHUNK):
            part = content[first : first + CHUNK]
            part[:] = memoryview(self._read(start + first, len(part)))
        return tensor

    def _read(self, start: int, size: int) -> bytes:
        """Bytes of the file, all of them."""
        try:
            found = os.pread(self._file.fileno(), size, start)
        except OSError as error:
            raise DqreloError(
                f"{self.path} cannot be read: {error.strerror}"
            ) from error
        if len(found) != size:
            raise DqreloError(f"{self.path} was cut short while it was read")
        return found


def torch_dtype(name: str, dtype: str) -> torch.dtype:
    """The dtype called so in a header; a DqreloError for one that torch has not."""
    if dtype not in DTYPES:
        raise DqreloError(f"{name} has dtype {dtype!r}; expected one of {[*DTYPES]}")
    return DTYPES[dtype]


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of a tensor, as a header describes the tensor.

    The digits of a dtype are its bits: torch lacks some of the format's ("F4"). An
    element without digits ("BOOL") has one byte.
    """
    bits = re.search(r"\d{1,3}", dtype)
    return math.prod(shape) * (int(bits[0]) if bits else 8) // 8


def text_of(dtype: torch.dtype) -> str:
    """ "bfloat16", as config.json and ``--dtype`` spell it."""
    return str(dtype).removeprefix("torch.")
