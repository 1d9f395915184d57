# SPDX-License-Identifier: Apache-2.0
"""What a conversion has finished, on disk, so that it can be interrupted."""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from dqrelo_tools.report import Entry
from vllm_dqrelo.format.checkpoint import SafetensorsFiles
from vllm_dqrelo.format.tensor_file import TensorFile


class Journal(Mapping[str, torch.Tensor]):
    """One small file for each finished parameter; all their tensors as a mapping.

    Args:
        folder: made if need be. What another conversion left there is removed.
        identity: equal for two conversions that write the same bytes.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        mark = folder / "identity"
        if not mark.is_file() or mark.read_text() != identity:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            mark.write_text(identity)
        self._files = SafetensorsFiles({})

    def record(
        self, number: int, entry: Entry, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Keep what came of parameter ``number``; whole or not at all."""
        scratch = self.folder / "scratch"
        save_file(tensors, scratch, metadata={"entry": json.dumps(asdict(entry))})
        scratch.rename(self._piece(number))

    def entry(self, number: int) -> Entry | None:
        """The recorded entry of parameter ``number``; its tensors join the mapping."""
        piece = self._piece(number)
        if not piece.is_file():
            return None
        file = TensorFile(piece)
        self._files.files |= dict.fromkeys(file.tensors, piece)
        return Entry(**json.loads(file.metadata["entry"]))

    def _piece(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files.files)
