# SPDX-License-Identifier: Apache-2.0
"""Write a folder so that it is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vllm_dqrelo.format.errors import DqreloError

# A full disk, a quota and a limit of the process, as the system words them; the
# safetensors library gives no number.
NO_ROOM = ("No space left", "Disk quota exceeded", "File too large")


def require_free(output: Path, size: int) -> None:
    """Refuse an output that is taken, or a disk without ``size`` bytes for it."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DqreloError(
            f"{output} exists and is not an empty folder; remove it or choose another"
        )
    parent = next(p for p in output.absolute().parents if p.exists())
    if (free := shutil.disk_usage(parent).free) < size:
        raise DqreloError(
            f"{output} needs {size:,} bytes, {parent} has {free:,} left; free some "
            "space or choose another disk"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``output`` when the block ends without error.

    ``output`` may exist as an empty folder. After an error nothing is left behind;
    a full disk becomes a DqreloError.
    """
    scratch = output.parent / f".{output.name}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        with writing(output):
            scratch.mkdir(parents=True)
            yield scratch
            for path in scratch.iterdir():
                path.chmod(0o644)  # safetensors makes private files
            os.replace(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def writing(output: Path) -> Iterator[None]:
    """Make a DqreloError of a disk that has no room, or that must not be written to."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if any(reason in str(error) for reason in NO_ROOM):
            raise DqreloError(
                f"the disk of {output} is full; nothing was written. Free some space "
                "or choose another disk"
            ) from error
        if isinstance(error, SafetensorError | PermissionError):
            raise DqreloError(f"{output} cannot be written: {error}") from error
        raise
