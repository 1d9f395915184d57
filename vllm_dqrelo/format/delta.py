# SPDX-License-Identifier: Apache-2.0
"""A delta folder: checked as a whole when opened, written in one piece."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from vllm_dqrelo.format.checkpoint import (
    SafetensorsFiles,
    locate,
    tensor_bytes,
)
from vllm_dqrelo.format.config import CONFIG_NAME, MAX_SHARD_SIZE, DeltaConfig
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.folder import check_output, file_bytes, new_folder
from vllm_dqrelo.format.tensor_file import text_of
from vllm_dqrelo.format.tensors import (
    ADDED,
    MatrixDelta,
    exact_problems,
    group,
    matrix_problems,
)

MODEL = "delta_model"  # sharded and indexed as Hugging Face checkpoints are


def digest(config: DeltaConfig, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Identify a delta by its content.

    Semantics: SHA-256 over the keys of delta_config.json but ``digest``, as one
    line of JSON with sorted keys, and, for each tensor, the JSON line
    ``[name, dtype, shape]`` and its bytes.

    Args:
        config: the delta's configuration; its ``digest`` is not read.
        tensors: (name, tensor) in order of the names.
    """
    keys = {key: value for key, value in config.to_dict().items() if key != "digest"}
    hasher = hashlib.sha256(json.dumps(keys, sort_keys=True).encode() + b"\n")
    for name, tensor in tensors:
        line = json.dumps([name, text_of(tensor.dtype), list(tensor.shape)])
        hasher.update(line.encode() + b"\n")
        hasher.update(tensor_bytes(tensor))
    return f"sha256:{hasher.hexdigest()}"


class Delta:
    """An opened delta folder.

    Args:
        folder: has delta_config.json and the tensors, in one file or sharded.
        most_bytes: of its files; larger files are not read.
        watch: called with the bytes of each tensor that is read here; all are read
            twice.

    Attributes:
        config: the parsed delta_config.json.
        matrices: names of the parameters stored as a compressed change.
        exact: names of the parameters stored as they are.
        added_tokens: the number that the fine-tune has beyond the base's vocabulary.

    Raises:
        FileNotFoundError: not a delta folder.
        DqreloError: a part is damaged or unknown; lists all of them.
    """

    def __init__(
        self,
        folder: Path,
        most_bytes: float = math.inf,
        watch: Callable[[int], object] = lambda size: None,
    ) -> None:
        self.folder = folder
        self.config = DeltaConfig.read(folder)
        self._files = SafetensorsFiles(locate(folder, MODEL))
        size = file_bytes(self._files.files.values())
        if size > most_bytes:
            raise DqreloError(
                f"{folder} has {size:,} bytes of tensors, expected at most "
                f"{most_bytes:,} of what this server has room for. Convert it again"
            )
        suffixes, self.exact = group(self._files)
        self.matrices = sorted(suffixes)

        def read(name: str) -> torch.Tensor:
            tensor = self._files.get(name)
            watch(tensor.nbytes)
            return tensor

        problems = []
        for name, present in suffixes.items():
            stored = {name + s: read(name + s) for s in present}
            problems += matrix_problems(name, present, stored)
        for name in self.exact:
            problems += exact_problems(name, read(name))
        refuse(f"{folder} is not a sound delta:", problems)
        counts = {n: self._files.spec(n)[1][0] for n in self.exact if n.endswith(ADDED)}
        if len(set(counts.values())) > 1:
            raise DqreloError(
                f"{folder} has different numbers of added tokens: {counts}"
            )
        self.added_tokens = max(counts.values(), default=0)
        if self.added_tokens and self.config.vocab_size is not None:
            raise DqreloError(
                f"{folder} has {self.added_tokens} tokens more than its base, and "
                f"{CONFIG_NAME} a vocab_size, which is for fine-tunes with fewer"
            )
        self._suffixes = suffixes
        content = ((name, read(name)) for name in self._files)
        if (found := digest(self.config, content)) != self.config.digest:
            raise DqreloError(
                f"{folder} was changed after it was written: its digest is {found}, "
                f"{CONFIG_NAME} says {self.config.digest}. Fetch or convert it again."
            )

    def save_pretrained(self, output: Path | str) -> Path:
        """Copy the folder to ``output``, as a whole or not at all.

        Args:
            output: must not exist, or be empty.

        Returns:
            The absolute path of the copy.

        Raises:
            DqreloError: ``output`` is taken, or must not be written.
        """
        output = check_output(Path(output))
        with new_folder(output) as folder:
            shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return output

    def check_unchanged(self) -> None:
        """Refuse a folder that was written to while it was read."""
        if self._files.changed:
            raise DqreloError(
                f"{self.folder} was changed while it was read. Load it again"
            )

    def matrix(self, name: str) -> MatrixDelta:
        """The compressed change of the matrix ``name``."""
        suffixes = self._suffixes[name]
        return MatrixDelta.from_tensors(
            name, {name + s: self._files.get(name + s) for s in suffixes}
        )

    def parameter(self, name: str) -> torch.Tensor:
        """The exactly stored parameter ``name``."""
        return self._files.get(name)

    def merged(self, name: str, before: torch.Tensor) -> torch.Tensor:
        """The parameter ``name`` of base + delta, in the dtype of the base's.

        Args:
            before: the base's.
        """
        value = before
        if name in self.matrices:
            value = before.float() + self.matrix(name).dense()
        elif name in self.exact:
            value = self.parameter(name)
        if name + ADDED in self.exact:
            value = torch.cat((value.float(), self.parameter(name + ADDED).float()))
        return value.to(before.dtype)


def added_tokens(folder: Path) -> int:
    """``Delta.added_tokens`` of a folder, of which only the headers are read."""
    files = SafetensorsFiles(locate(folder, MODEL))
    shapes = [files.spec(name)[1] for name in files if name.endswith(ADDED)]
    return max((shape[0] for shape in shapes if shape), default=0)


def vocabulary_size(folder: Path, base: int) -> int:
    """The vocabulary's size of a delta's fine-tune; reads headers only.

    Args:
        base: that of its base, without a server's room for added tokens.

    Raises:
        FileNotFoundError: not a delta folder. DqreloError: it cannot be used.
    """
    own = DeltaConfig.read(folder).vocab_size
    return base + added_tokens(folder) if own is None else own


def weight_files(folder: Path) -> list[Path]:
    """The files of a delta that hold its tensors."""
    return sorted(folder.glob(f"{MODEL}*.safetensors"))


def write_delta(
    folder: Path,
    config: DeltaConfig,
    tensors: Mapping[str, torch.Tensor],
    max_shard_size: int = MAX_SHARD_SIZE,
    watch: Callable[[int], object] = lambda size: None,
) -> DeltaConfig:
    """Write delta_config.json and the tensors into ``folder``.

    Args:
        folder: exists; see ``folder.new_folder`` for all or nothing.
        config: ``digest`` is filled in here.
        tensors: as ``tensors.MatrixDelta.tensors`` and exact parameters give them.
            Each is asked for twice and need not be in memory in between.
        max_shard_size: in bytes; one shard is in memory.
        watch: called with the bytes of each tensor that is read here; all are read
            twice.

    Returns:
        The configuration as written.
    """

    def read(name: str) -> torch.Tensor:
        tensor = tensors[name]
        watch(tensor.nbytes)
        return tensor

    ordered = [(name, tensors[name].nbytes) for name in sorted(tensors)]
    split = split_state_dict_into_shards_factory(
        dict(ordered),
        get_storage_size=lambda size: size,
        filename_pattern=MODEL + "{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: read(name).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        path = folder / f"{MODEL}.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    content = ((name, read(name)) for name, _ in ordered)
    config = replace(config, digest=digest(config, content))
    (folder / CONFIG_NAME).write_text(config.to_json())
    return config
