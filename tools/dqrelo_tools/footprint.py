# SPDX-License-Identifier: Apache-2.0
"""The bytes that a base and a delta take in a server's memory, from file headers."""

import re
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.serialization._base import parse_size_to_int

from vllm_dqrelo.arena import aligned
from vllm_dqrelo.format.checkpoint import Checkpoint, SafetensorsFiles, locate
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import MODEL
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensors import ADDED, PACKED, SCALE, SHAPE, SUFFIXES


def bytes_of(text: str, measure: Callable[[str], int]) -> int:
    """The bytes that "1.2GB" means to Hugging Face, or those of what it names.

    Raises:
        DqreloError: there are none. Otherwise what ``measure`` raises.
    """
    try:
        size = parse_size_to_int(text)
    except ValueError:
        size = measure(text)
    if size < 1:
        raise DqreloError(f"{text} has {size} bytes; expected a size such as 1.2GB")
    return size


def base_bytes(name_or_path: str) -> int:
    """Bytes of the weights of a folder or a model on the Hub, which is not downloaded.

    Floats of more than 16 bits count as 16, as vLLM's ``--dtype auto`` serves them.

    Raises:
        DqreloError: a folder without a model. FileNotFoundError: neither.
    """
    if Path(name_or_path).is_dir():
        stored = Checkpoint(Path(name_or_path)).stored
        return sum(weight_bytes(*stored.spec(name)) for name in stored)
    try:
        found = HfApi().get_safetensors_metadata(name_or_path)
    except Exception as error:  # which ones depends on the Hub's client
        raise FileNotFoundError(
            f"{name_or_path} is neither a size such as 16GB, nor a folder, nor a model "
            f"whose files the Hugging Face Hub could describe ({type(error).__name__})"
        ) from error
    files = found.files_metadata.values()
    return sum(
        weight_bytes(weight.dtype, weight.shape)
        for file in files
        for weight in file.tensors.values()
    )


def weight_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of one weight of a model that is served in 16 bits."""
    return prod(shape) * (2 if dtype in ("F32", "F64") else itemsize(dtype))


def itemsize(dtype: str) -> int:
    """2 of "BF16"."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) // 8 if bits else 1


def delta_bytes(path: str) -> int:
    """Bytes of a delta's extent in the arena, as vllm_dqrelo/packed.py lays it out.

    Signs and factors are as in the file, scales one for each row, and what is stored
    exactly is float32; the start of each tensor is aligned.

    Raises:
        DqreloError: it is damaged. FileNotFoundError: it is not there.
    """
    folder = Path(path)
    DeltaConfig.read(folder)
    files = SafetensorsFiles(locate(folder, MODEL))
    total = 0
    for name in files:
        dtype, shape = files.spec(name)
        suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
        if suffix == SHAPE or name.endswith(ADDED):  # rows that have a place already
            continue
        if suffix == SCALE:
            shape = files.spec(name.removesuffix(SCALE) + PACKED)[1][:2]
        total += aligned(prod(shape) * (itemsize(dtype) if suffix else 4))
    return total
