# SPDX-License-Identifier: Apache-2.0
"""The bytes that a base and a delta take in a server's memory, from file headers."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from dqrelo_tools.sizes import parse_size
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.json_file import read_json
from vllm_dqrelo.format.model_config import ModelConfig
from vllm_dqrelo.format.need import Need
from vllm_dqrelo.format.tensor_file import nbytes


def bytes_of(text: str, measure: Callable[[str], int]) -> int:
    """The bytes of "1.2GB", or of the model that ``text`` names.

    Args:
        text: a size, or a name.
        measure: gives the bytes of a name.

    Raises:
        DqreloError: there are 0 bytes. Otherwise what ``measure`` raises.
    """
    try:
        size = parse_size(text)
    except ValueError:
        size = measure(text)
    if size < 1:
        raise DqreloError(f"{text} has {size} bytes; expected a size such as 1.2GB")
    return size


def base_bytes(name_or_path: str, device: str = "cuda") -> int:
    """Bytes that the weights of a folder or a model on the Hub take on a device.

    Floats of more than 16 bits count as 16, as vLLM's ``--dtype auto`` serves them. On
    the "cpu" vLLM packs the matrix of each layer for oneDNN. vLLM also keeps embedding
    and LM head unpacked, and packs each of them even if they are one matrix
    (dispatch_cpu_unquantized_gemm in vllm/model_executor/layers/utils.py): two matrices
    of the vocabulary in addition to the weights. (One, where vLLM lacks a layer for the
    LM head, as in Gemma 2 and Cohere's models. vLLM pads experts to a width of a
    multiple of 32, which takes a little more.)

    Raises:
        DqreloError: a folder without a model, or the matrix of the vocabulary is not
            found. FileNotFoundError: neither a folder nor on the Hub.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        base = Checkpoint(folder)
        weights = [base.stored.spec(name) for name in base.stored]
        config = base.model_config
    else:
        weights, raw = on_hub(name_or_path)
        config = ModelConfig(f"{name_or_path}/config.json", raw)
    total = sum(served_bytes(*weight) for weight in weights)
    if device != "cpu":
        return total
    words = config.vocab_size
    matrices = [
        served_bytes(dtype, shape)
        for dtype, shape in weights
        if len(shape) == 2 and shape[0] == words
    ]
    if not matrices:
        raise DqreloError(
            f"{name_or_path} has no matrix of {words} rows, the vocab_size of its "
            "config.json. So the bytes that vLLM packs on the CPU are not known. Give "
            "the base's size, such as 16GB"
        )
    return total + 2 * max(matrices)


def on_hub(name: str) -> tuple[list[tuple[str, list[int]]], dict[str, Any]]:
    """dtype and shape of the weights of a model on the Hub, and its config.json.

    Raises:
        FileNotFoundError: it is not there.
    """
    try:
        found = HfApi().get_safetensors_metadata(name)
        config = hf_hub_download(name, "config.json")
    except Exception as error:  # which ones depends on the Hub's client
        raise FileNotFoundError(
            f"{name} is neither a size such as 16GB, nor a folder, nor a model "
            f"whose files the Hugging Face Hub could describe ({type(error).__name__})"
        ) from error
    weights: list[tuple[str, list[int]]] = [
        (weight.dtype, weight.shape)
        for file in found.files_metadata.values()
        for weight in file.tensors.values()
    ]
    return weights, read_json(Path(config))


def served_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes of one weight of a model that is served in 16 bits."""
    return nbytes("BF16" if dtype in ("F32", "F64") else dtype, shape)


def delta_bytes(path: str) -> int:
    """Bytes of a delta's extent in the arena of a server with one worker.

    Raises:
        DqreloError: it is damaged. FileNotFoundError: it is not there.
    """
    return Need.of(Path(path)).size
