# SPDX-License-Identifier: Apache-2.0
"""A Hugging Face checkpoint of safetensors files, read tensor by tensor."""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.json_file import read_json
from vllm_dqrelo.format.kinds import explain, refuse_broken
from vllm_dqrelo.format.model_config import ModelConfig
from vllm_dqrelo.format.part import WHOLE, Part
from vllm_dqrelo.format.quantized import METHODS, OTHERS, Quantized, find, method_of
from vllm_dqrelo.format.tensor_file import DTYPES, TensorFile, nbytes, text_of
from vllm_dqrelo.format.tensors import ADDED, FLOATS

MODEL = "model"  # HF names: model.safetensors, model-00001-of-00002.safetensors
NAMES = {dtype: name for name, dtype in DTYPES.items() if dtype in FLOATS}
FLOAT_DTYPES = set(NAMES.values())
SAMPLED_ROWS = 8
MOST_OPEN = 64  # files of one model
HEAD = "lm_head.weight"
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = (
    "embed_tokens.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "wte.weight",
)
# Parts of a multimodal model other than its language model, by their names.
BESIDE = re.compile(r"(^|\.)(vis|audio|connector|multi_modal_projector|mm_projector)")


def resolve(name_or_path: str, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: itself, or the Hub's snapshot of it."""
    path = Path(name_or_path).expanduser()
    if not name_or_path:
        raise DqreloError("a model has an empty name; expected a folder or a Hub id")
    if path.is_dir():
        refuse_broken(path)
        return path
    if path.is_file() or path.is_symlink():
        raise DqreloError(explain(path, MODEL))
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
        FileNotFoundError: both are missing; says what the folder is. DqreloError: not
            an index, or a shard is missing or not in the folder.
    """
    single = folder / f"{stem}.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(TensorFile(single).tensors, single)
    if not index.exists():
        raise FileNotFoundError(explain(folder, stem.removesuffix("_model")))
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


def ends_with(name: str, endings: Iterable[str]) -> bool:
    """Whether the last parts of a parameter's name are one of ``endings``."""
    return any(f".{name}".endswith(f".{ending}") for ending in endings)


def _is_plain(name: str) -> bool:
    """Whether it names a file of a folder, and nothing outside of it."""
    return Path(name).name == name and "\0" not in name


class Checkpoint(SafetensorsFiles):
    """The parameters of a model folder, under their names in the files.

    With tied embeddings a second copy of the shared matrix (``lm_head.weight``) is not
    a parameter of its own and is left out, unless ``untie`` was called. A quantised
    matrix is a parameter in the dtype of the model (quantized.py).

    Attributes:
        stored: the tensors as they are in the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # name -> the tensor that it is stored in, and which part of it
        self._views: dict[str, tuple[str, Part]] = {}
        self._filled: dict[str, Checkpoint] = {}  # name -> who has the other rows
        self._quantized: dict[str, Quantized] = {}
        try:
            super().__init__(locate(folder, MODEL))
        except FileNotFoundError as error:
            raise DqreloError(str(error)) from error
        self.stored = SafetensorsFiles(dict(self.files))
        if (head := self.head) and self.tied and self._embeddings:
            del self.files[head]
        if HEAD not in self.files:
            self.stored.files.pop(HEAD, None)
        if self.quantization:
            self._quantized = find(self.quantization, self.files)
            for name, matrix in self._quantized.items():
                files = [self.files.pop(part) for part in matrix.names]
                self.files[name] = files[0]
            for name in [name for name in self.files if name.endswith(OTHERS)]:
                del self.files[name]

    @cached_property
    def quantization(self) -> dict[str, Any] | None:
        """How the matrices are quantised, by config.json; None if they are not.

        A trainer may write 16-bit weights and leave in config.json how it had
        quantised them (bitsandbytes): weights that are floats are not quantised.
        """
        config = self.config.get("quantization_config")
        if config and method_of(config) not in METHODS and self._has_floats_only():
            return None
        return config

    def _has_floats_only(self) -> bool:
        return all(self.stored.spec(name)[0] in FLOAT_DTYPES for name in self.stored)

    @property
    def dtype(self) -> torch.dtype:
        """In which a quantised matrix is read: that of the model."""
        name = self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16"
        dtypes = {text_of(dtype): dtype for dtype in FLOATS}
        if str(name) not in dtypes:
            raise DqreloError(
                f"{self.folder / 'config.json'}: dtype is {name!r}, expected one of "
                f"{', '.join(dtypes)}"
            )
        return dtypes[name]

    @cached_property
    def config(self) -> dict[str, Any]:
        """The parsed config.json."""
        path = self.folder / "config.json"
        if not path.is_file():
            raise DqreloError(
                f"{self.folder} is not a model folder: it has weights, but not their "
                "config.json. Copy the config.json that they were trained with"
            )
        config = read_json(path)
        if not isinstance(config, dict):
            raise DqreloError(f"{path} is not a JSON object")
        return config

    @cached_property
    def model_config(self) -> ModelConfig:
        """What config.json says."""
        return ModelConfig(self.folder / "config.json", self.config)

    @cached_property
    def tied(self) -> bool:
        """Whether the LM head is the embedding.

        As transformers and vLLM see it: where config.json ties them and an LM head is
        stored all the same, it is the embedding if it has the embedding's values
        (``tie_weights`` in modeling_utils.py; vllm's model_loader/weight_tying.py).
        """
        head = self.head
        if not self.model_config.tied or not head or len(self._embeddings) != 1:
            return self.model_config.tied
        embedding = self.get(self.embedding)
        return torch.equal(self.get(head).to(embedding.dtype), embedding)

    @property
    def head(self) -> str | None:
        """The name of the LM head's matrix; None if it is not a parameter."""
        heads = [name for name in self if ends_with(name, HEADS)]
        return HEAD if HEAD in heads else heads[0] if len(heads) == 1 else None

    @property
    def embedding(self) -> str:
        """The name of the matrix that a tied LM head is."""
        found = self._embeddings
        if len(found) != 1:
            raise DqreloError(
                f"{self.folder}: its LM head is tied to its embedding, expected one "
                f"tensor called {' or '.join(EMBEDDINGS)}, found {found or 'none'}"
            )
        return found[0]

    @property
    def tied_embedding(self) -> str | None:
        """The parameter that the LM head is, too; None where it is not known."""
        found = self._embeddings
        return found[0] if self.tied and len(found) == 1 else None

    @property
    def _embeddings(self) -> list[str]:
        return [name for name in self if ends_with(name, EMBEDDINGS)]

    def untie(self, head: str = HEAD) -> None:
        """Count a tied LM head as a parameter of its own, with the embedding's values.

        The fingerprint is of the parameters before that.
        """
        self._view(head, *self._stored_as(self.embedding))

    def split(self, name: str, rows: int) -> None:
        """Count the rows of a matrix from ``rows`` on as a parameter of its own.

        It is called ``name + ADDED``.
        """
        stored, part = self._stored_as(name)
        self._view(name + ADDED, stored, replace(part, start=rows))
        self._view(name, stored, replace(part, stop=rows))

    def fill(self, name: str, base: "Checkpoint") -> None:
        """Count the rows that ``base`` has beyond those of a parameter as its own."""
        self._filled[name] = base

    def rename(self, names: Mapping[str, tuple[str, Part]]) -> None:
        """Call parameters, or parts of them, otherwise.

        Args:
            names: the new name -> which part of the parameter of which old name.
        """
        views = {}
        for new, (old, part) in names.items():
            stored, whole = self._stored_as(old)
            views[new] = stored, whole if part == WHOLE else part
        for old in {old for old, _ in names.values()}:
            self.drop(old)
        for new, view in views.items():
            self._view(new, *view)

    def drop(self, name: str) -> None:
        """Count a tensor as a parameter no longer."""
        del self.files[name]
        self._views.pop(name, None)

    def _stored_as(self, name: str) -> tuple[str, Part]:
        return self._views.get(name, (name, WHOLE))

    def _view(self, name: str, stored: str, part: Part) -> None:
        matrix = self._quantized.get(stored)
        self.files[name] = self.stored.files[matrix.names[0] if matrix else stored]
        self._views[name] = stored, part

    def spec(self, name: str) -> tuple[str, list[int]]:
        stored, part = self._stored_as(name)
        if matrix := self._quantized.get(stored):
            shape = matrix.shape(self.stored.spec, self.stored.get)
            dtype = NAMES[self.dtype]
        else:
            dtype, shape = self.stored.spec(stored)
        if name in self._filled:
            return dtype, self._filled[name].spec(name)[1]
        return dtype, part.shape(shape)

    def get(self, name: str) -> torch.Tensor:
        stored, part = self._stored_as(name)
        if matrix := self._quantized.get(stored):
            tensor = matrix.dense(self.stored.get).to(self.dtype)
        elif part.expert is not None:
            (tensor,) = next(self.stored.rows(stored, [part.expert]))
        else:
            tensor = self.stored.get(stored)
        tensor = tensor if part == WHOLE else part.of(tensor)
        if name in self._filled:
            others = self._filled[name].get(name)[len(tensor) :]
            tensor = torch.cat((tensor, others.to(tensor.dtype)))
        return tensor

    def rows(self, name: str, indices: Iterable[int]) -> Iterator[torch.Tensor]:
        if name not in self._quantized and name not in self._views:
            return self.stored.rows(name, indices)
        tensor = self.get(name)
        return (tensor[index : index + 1] for index in indices)

    def nbytes(self, itemsize: int) -> int:
        """Bytes of the parameters when a float takes ``itemsize``; reads no data."""
        total = 0
        for name in self.stored:
            dtype, shape = self.stored.spec(name)
            is_float = dtype in FLOAT_DTYPES
            total += itemsize * math.prod(shape) if is_float else nbytes(dtype, shape)
        return total

    def fingerprint(self) -> str:
        """Identify the weights without reading all of them.

        Semantics: SHA-256 over, for each parameter in order of its name, the JSON
        line ``[name, dtype, shape]`` and the bytes of up to 8 of its rows, those
        with index ``i * (rows - 1) // 7`` for i = 0..7, each once. Of a quantised
        checkpoint it is the stored tensors, and before them one line of JSON with
        sorted keys, its quantization_config.
        """
        hasher, stored = hashlib.sha256(), self.stored
        if self.quantization:
            line = json.dumps(self.quantization, sort_keys=True)
            hasher.update(line.encode() + b"\n")
        for name in stored:
            dtype, shape = stored.spec(name)
            hasher.update(json.dumps([name, dtype, shape]).encode() + b"\n")
            rows, last = (shape[0] if shape else 0), SAMPLED_ROWS - 1
            indices = {i * (rows - 1) // last for i in range(SAMPLED_ROWS) if rows}
            for row in stored.rows(name, sorted(indices)):
                hasher.update(tensor_bytes(row))
        return f"sha256:{hasher.hexdigest()}"


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The little-endian bytes of a CPU tensor in row order."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
