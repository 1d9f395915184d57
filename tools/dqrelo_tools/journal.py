# SPDX-License-Identifier: Apache-2.0
"""The finished part of a conversion, on disk: a conversion can be interrupted."""

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from dqrelo_tools.report import Entry
from vllm_dqrelo.format.checkpoint import SafetensorsFiles
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.folder import PARTS, locked, scratch_of, size_of, writing
from vllm_dqrelo.format.tensor_file import TensorFile

logger = logging.getLogger(__name__)

# torch's error when it gets no memory is a RuntimeError.
OF_THE_MACHINE = (OSError, SafetensorError, MemoryError, RuntimeError)


class Interrupted(DqreloError):
    """A conversion that the same command continues.

    Args:
        reason: why the conversion stopped.
        kept: where the finished part is.
    """

    def __init__(self, reason: str, kept: str) -> None:
        super().__init__(f"{reason}\n{kept}")
        self.reason = reason


class Journal(Mapping[str, torch.Tensor]):
    """One small file for each finished parameter; all their tensors as a mapping.

    Args:
        folder: exists. What another conversion left there is removed.
        identity: equal for two conversions that write the same bytes.

    Attributes:
        complete: whether all parameters are in it.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.complete = False
        mark = folder / "identity"
        if not mark.is_file() or mark.read_text() != identity:
            if size := size_of(folder):
                logger.info(
                    "%s bytes that another conversion to the same folder left in %s "
                    "are removed",
                    f"{size:,}",
                    folder,
                )
            for path in folder.iterdir():
                path.unlink()
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

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return size_of(self.folder)

    def _piece(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files.files)


@contextmanager
def journal_of(output: Path, identity: str) -> Iterator[Journal]:
    """The journal of a conversion to ``output``, which this process alone writes.

    The journal is removed at the end, and after an error of the input. The journal is
    kept after an error of the machine, and after any error once it is complete.

    Raises:
        DqreloError: another process is writing ``output``; or the block failed, and
            where the journal is kept.
    """
    folder = scratch_of(output, PARTS)
    with locked(folder, output):
        complete = False
        try:
            with writing(output):
                journal = Journal(folder, identity)
                try:
                    yield journal
                finally:
                    complete = journal.complete
        except BaseException as error:
            cause = error.__cause__ if isinstance(error, DqreloError) else error
            machine = isinstance(cause, OF_THE_MACHINE)
            if isinstance(error, Exception) and not (complete or machine):
                shutil.rmtree(folder, ignore_errors=True)
                raise
            if not any(path.suffix for path in folder.iterdir()):  # no work in it
                shutil.rmtree(folder, ignore_errors=True)
                raise
            kept = (
                f"{size_of(folder):,} bytes that are converted already are kept in "
                f"{folder}: the same command goes on from there"
            )
            if not isinstance(error, Exception):
                logger.info(kept)
                raise
            own = isinstance(error, DqreloError | OSError)
            reason = str(error) if own else f"{type(error).__name__}: {error}"
            raise Interrupted(reason, kept) from error
        shutil.rmtree(folder)
