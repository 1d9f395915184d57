# SPDX-License-Identifier: Apache-2.0
"""Write a folder as a whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from vllm_dqrelo.format.errors import DqreloError

# A full disk, a quota and a limit of the process, as the system words them; the
# safetensors library gives no number.
NO_ROOM = ("No space left", "Disk quota exceeded", "File too large")
PARTS, PARTIAL = "parts", "partial"  # of unfinished work


def check_output(output: Path) -> Path:
    """The absolute path of a folder that is to be written, ``~`` and links followed.

    Raises:
        DqreloError: it is taken, or must not be written.
    """
    output = Path(os.path.realpath(os.path.expanduser(output)))
    if output.exists() and (not output.is_dir() or _content(output)):
        raise DqreloError(
            f"{output} exists and is not an empty folder; remove it or choose another"
        )
    parent = _nearest(output)
    if not parent.is_dir():
        raise DqreloError(
            f"{parent} is not a folder; choose another place than {output}"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DqreloError(f"{output} cannot be written: {parent} is write-protected")
    return output


def require_free(output: Path, size: int, *sources: Path) -> None:
    """Refuse a disk without ``size`` free bytes, and an output inside of a source.

    Args:
        output: as ``check_output`` gives it. Its parts count as free.
        size: bytes of all files, parts included.
        sources: folders that are read.
    """
    for source in sources:
        if output.is_relative_to(source.resolve()):
            raise DqreloError(
                f"{output} is in {source}, which is read; choose a folder outside of it"
            )
    size -= size_of(scratch_of(output, PARTS))
    parent = _nearest(output)
    if (free := shutil.disk_usage(parent).free) < size:
        raise DqreloError(
            f"{output} needs {size:,} bytes, {parent} has {free:,} left; free some "
            "space or choose another disk"
        )


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A scratch folder that becomes ``output`` when the block ends without error.

    An empty folder ``output`` stays the same folder: it may be mounted, or be the
    current one. After an error the scratch folder is removed; a full disk becomes a
    DqreloError.
    """
    there = output.is_dir()
    scratch = scratch_of(output, PARTIAL)
    with locked(scratch, output), writing(output):
        try:
            _clear(scratch)  # of a process that was killed
            yield scratch
            for path in scratch.iterdir():
                path.chmod(0o644)  # safetensors makes private files
            if there:
                _move(scratch, output)
            else:
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


def scratch_of(output: Path, kind: str) -> Path:
    """The scratch folder of ``output``, on the same disk."""
    if output.is_dir():
        return output / f".{kind}"
    return output.parent / f".{output.name}.{kind}"


@contextmanager
def locked(folder: Path, output: Path) -> Iterator[None]:
    """Make ``folder``, where this process alone writes ``output`` in the block.

    Folders above it that were made for it are removed again when they stay empty.

    Raises:
        DqreloError: another process has it.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some network disks have no locks.
        taken = False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            pass
        if taken or not folder.is_dir():
            raise DqreloError(
                f"another process is writing {output}; wait for it, or choose another "
                "folder"
            )
        yield
    finally:
        os.close(handle)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder; 0 if the folder is missing."""
    if not folder.is_dir():
        return 0
    return file_bytes(folder.iterdir())


def file_bytes(files: Iterable[Path]) -> int:
    """Bytes of some files, each of them counted once."""
    return sum(path.stat().st_size for path in {*files})


def _content(folder: Path) -> list[Path]:
    """The entries of a folder, without the unfinished work of earlier processes."""
    own = {f".{kind}" for kind in (PARTS, PARTIAL)}
    return [path for path in folder.iterdir() if path.name not in own]


def _nearest(output: Path) -> Path:
    """``output``, or the folder above it that exists."""
    return next(path for path in (output, *output.parents) if path.exists())


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _move(scratch: Path, output: Path) -> None:
    """Move all files, those last that say what the folder is."""
    moved = []
    try:
        for path in sorted(scratch.iterdir(), key=lambda p: p.suffix == ".json"):
            path.rename(output / path.name)
            moved.append(output / path.name)
    except BaseException:
        for path in moved:
            path.unlink()
        raise
