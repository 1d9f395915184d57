# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint of safetensors files, read tensor by tensor."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.json_file import read_json
from vllm_dqrelo.format.tensor_file import TensorFile
from vllm_dqrelo.format.tensors import ADDED

MODEL = "model"  # HF names: model.safetensors, model-00001-of-00002.safetensors
FLOAT_DTYPES = {"BF16", "F16", "F32"}
SAMPLED_ROWS = 8
MOST_OPEN = 64  # files of one model
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: itself, or the Hub's snapshot of it."""
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja", "*.model"]
        return Path(
            snapshot_download(name_or_path, revision=revision, allow_patterns=patterns)
        )
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a model that the Hugging Face "
            f"Hub could deliver ({type(error).__name__})"
        ) from error


class SafetensorsFiles:
    """The tensors of one or several safetensors files.

    Args:
        files: tensor name -> file that holds it.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        # Open files, not their content: memory holds the tensors in use and no more.
        self._opened = lru_cache(MOST_OPEN)(TensorFile)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def spec(self, name: str) -> tuple[str, list[int]]:
        """dtype as safetensors spells it, and shape; reads no data."""
        dtype, shape, _ = self._file(name).tensors[name]
        return dtype, shape

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._file(name).get(name)

    def rows(self, name: str, indices: Iterable[int]) -> Iterator[torch.Tensor]:
        """``tensor[i : i + 1]`` for each index."""
        return (self._file(name).row(name, index) for index in indices)

    @property
    def changed(self) -> bool:
        """Whether somebody wrote to one of the files since it was opened."""
        return any(self._opened(path).changed for path in {*self.files.values()})

    def _file(self, name: str) -> TensorFile:
        file = self._opened(self.files[name])
        if name not in file.tensors:
            raise DqreloError(f"{file.path} has no {name}; fetch it again")
        return file


def locate(folder: Path, stem: str) -> dict[str, Path]:
    """Which file holds which tensor: one ``stem.safetensors``, or shards and an index.

    Raises:
        FileNotFoundError: neither is there. DqreloError: the index is none, or a shard
            is missing or not in the folder.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(TensorFile(single).tensors, single)
    if not index.is_file():
        raise FileNotFoundError(f"{folder} has neither {single.name} nor {index.name}")
    raw = read_json(index)
    weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(weight_map, dict):
        raise DqreloError(f'{index} has no "weight_map" from tensors to files')
    names = list(weight_map.values())
    if not all(isinstance(name, str) and _is_plain(name) for name in names):
        raise DqreloError(f"{index} names something other than files of its folder")
    files = {folder / file for file in names}
    if absent := sorted(path.name for path in files if not path.is_file()):
        raise DqreloError(f"{index} names missing files: {absent}")
    return {name: folder / file for name, file in weight_map.items()}


def _is_plain(name: str) -> bool:
    """Whether it names a file of a folder, and nothing outside of it."""
    return Path(name).name == name and "\0" not in name


class Checkpoint(SafetensorsFiles):
    """The parameters of a model folder, under their names in the files.

    With tied embeddings a second copy of the shared matrix (``lm_head.weight``)
    is not a parameter of its own and is left out, unless ``untie`` was called.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # name -> the parameter that it is stored as, and which rows of it
        self._views: dict[str, tuple[str, slice]] = {}
        try:
            super().__init__(locate(folder, MODEL))
        except FileNotFoundError as error:
            refuse_pickles(folder)
            raise DqreloError(str(error)) from error
        if self.tied:
            self.files.pop("lm_head.weight", None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise DqreloError(f"{self.folder} is not a model folder: no config.json")
        return read_json(path)

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        text = self.config.get("text_config", self.config)
        return bool(text.get("tie_word_embeddings", False))

    def untie(self) -> None:
        """Count a tied LM head as a parameter of its own, with the embedding's values.

        The fingerprint is of the parameters before that.
        """
        embedding = next((name for name in self if name.endswith(EMBEDDING)), None)
        if embedding is None:
            raise DqreloError(f"{self.folder} has no embedding that its LM head is")
        self._view(HEAD, embedding, slice(None))

    def split(self, name: str, rows: int) -> None:
        """Count the rows of a matrix from ``rows`` on as a parameter of its own.

        It is called ``name + ADDED``.
        """
        stored, _ = self._views.get(name, (name, None))
        self._view(name + ADDED, stored, slice(rows, None))
        self._view(name, stored, slice(rows))

    def _view(self, name: str, stored: str, rows: slice) -> None:
        self.files[name] = self.files[stored]
        self._views[name] = stored, rows

    def spec(self, name: str) -> tuple[str, list[int]]:
        stored, rows = self._views.get(name, (name, slice(None)))
        dtype, shape = super().spec(stored)
        return dtype, [len(range(shape[0])[rows]), *shape[1:]] if shape else shape

    def get(self, name: str) -> torch.Tensor:
        stored, rows = self._views.get(name, (name, None))
        tensor = super().get(stored)
        return tensor if rows is None else tensor[rows].clone()

    def count(self) -> int:
        """How many numbers the parameters have; reads no data."""
        return sum(math.prod(self.spec(name)[1]) for name in self)

    def fingerprint(self) -> str:
        """Identify the weights without reading all of them.

        Semantics: SHA-256 over, for each parameter in order of its name, the JSON
        line ``[name, dtype, shape]`` and the bytes of up to 8 of its rows, those
        with index ``i * (rows - 1) // 7`` for i = 0..7, each once.
        """
        hasher = hashlib.sha256()
        for name in self:
            dtype, shape = self.spec(name)
            hasher.update(json.dumps([name, dtype, shape]).encode() + b"\n")
            rows, last = (shape[0] if shape else 0), SAMPLED_ROWS - 1
            indices = {i * (rows - 1) // last for i in range(SAMPLED_ROWS) if rows}
            for row in self.rows(name, sorted(indices)):
                hasher.update(tensor_bytes(row))
        return f"sha256:{hasher.hexdigest()}"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a CPU tensor in row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def refuse_pickles(folder: Path) -> None:
    """Say why, when all that ``folder`` has is pickle files."""
    pickles = sorted(p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt*")])
    if pickles:
        raise DqreloError(
            f"{folder} holds pickle files ({', '.join(pickles[:3])}), which can run "
            "code when opened. Save the model with save_pretrained(..., "
            "safe_serialization=True) and use that folder."
        )
