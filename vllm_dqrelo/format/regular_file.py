# SPDX-License-Identifier: Apache-2.0
"""A file that anyone may have put there: a plain one of bounded size, or an error.

To open a pipe waits for whoever writes to it, and to read a device may never end.
"""

import io
import os
import stat
from pathlib import Path

from vllm_dqrelo.format.errors import DqreloError


def open_regular(path: Path) -> io.FileIO:
    """Open a regular file for reading, unbuffered; never waits.

    Raises:
        FileNotFoundError: it is not there. DqreloError: it is something other than a
            regular file, or cannot be read.
    """
    try:
        # NONBLOCK: a pipe may take the file's name at any time.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DqreloError(f"{path} is a link to a file that is missing") from error
        raise
    except OSError as error:
        raise DqreloError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise DqreloError(f"{path} is not a regular file; replace or remove it")
    return io.FileIO(file)


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a regular file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: it is not there. DqreloError: it is larger, or
            ``open_regular`` refuses it.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise DqreloError(f"{path} has {size:,} bytes; expected at most {most:,}")
        try:
            content = io.BufferedReader(file).read(size + 1)
        except OSError as error:
            raise DqreloError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) != size:
        raise DqreloError(f"{path} was changed while it was read. Load it again")
    return content
