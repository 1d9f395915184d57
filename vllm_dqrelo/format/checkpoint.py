# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint of safetensors files, read tensor by tensor."""

import hashlib
import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open

from vllm_dqrelo.format.errors import DqreloError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOAT_DTYPES = {"BF16", "F16", "F32"}
SAMPLED_ROWS = 8


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
    """The tensors of one or several safetensors files, opened lazily.

    Args:
        files: tensor name -> file that holds it.
    """

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self._open: dict[Path, Any] = {}

    def _file(self, name: str) -> Any:
        path = self.files[name]
        if path not in self._open:
            self._open[path] = open_safetensors(path)
        return self._open[path]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.files))

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def spec(self, name: str) -> tuple[str, list[int]]:
        """dtype as safetensors spells it, and shape; reads no data."""
        view = self._file(name).get_slice(name)
        return view.get_dtype(), view.get_shape()

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        return self._file(name).get_tensor(name)

    def row(self, name: str, index: int) -> torch.Tensor:
        """``tensor[index]`` of a tensor with at least one dimension."""
        return self._file(name).get_slice(name)[index : index + 1]


def open_safetensors(path: Path) -> Any:
    """Open one file; a truncated or foreign one is a DqreloError."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DqreloError(
            f"{path} is not a readable safetensors file ({error}); fetch it again"
        ) from error


class Checkpoint(SafetensorsFiles):
    """The parameters of a model folder, under their names in the files.

    With tied embeddings a second copy of the shared matrix (``lm_head.weight``)
    is not a parameter of its own and is left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__(_locate(folder))
        if self.tied:
            self.files.pop("lm_head.weight", None)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise DqreloError(f"{self.folder} is not a model folder: no config.json")
        return json.loads(path.read_text())

    @property
    def tied(self) -> bool:
        """Whether the LM head is the embedding."""
        text = self.config.get("text_config", self.config)
        return bool(text.get("tie_word_embeddings", False))

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
            rows = shape[0] if shape else 0
            last = SAMPLED_ROWS - 1
            for index in sorted({i * (rows - 1) // last for i in range(SAMPLED_ROWS)}):
                if rows:
                    hasher.update(tensor_bytes(self.row(name, index)))
        return f"sha256:{hasher.hexdigest()}"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a CPU tensor in row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _locate(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    if (folder / SINGLE_FILE).is_file():
        path = folder / SINGLE_FILE
        return dict.fromkeys(open_safetensors(path).keys(), path)
    if (folder / INDEX_FILE).is_file():
        weight_map = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
        if absent := sorted(
            {f for f in weight_map.values() if not (folder / f).is_file()}
        ):
            raise DqreloError(f"{folder / INDEX_FILE} names missing files: {absent}")
        return {name: folder / file for name, file in weight_map.items()}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt*")
    )
    if pickles:
        raise DqreloError(
            f"{folder} holds pickle files ({', '.join(pickles[:3])}), which can run "
            "code when opened. Save the model with save_pretrained(..., "
            "safe_serialization=True) and use that folder."
        )
    raise DqreloError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}")
