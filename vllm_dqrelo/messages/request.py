# SPDX-License-Identifier: Apache-2.0
"""A delta as vLLM knows it: a LoRARequest, with a path of a folder and its content."""

import re
import zlib
from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.config import DIGEST, DeltaConfig

PATH = re.compile(rf"(.*)#({DIGEST.pattern})", re.DOTALL)


class Bound(LoRARequest):
    """A client's request in the engine; see ``engine/deltas.py``."""

    model: str = ""  # the client's name for it


def delta_request(name: str, folder: Path, load_inplace: bool = False) -> LoRARequest:
    """The request object that selects a delta.

    The digest makes the path content-addressed, and with it vLLM's key of cached
    prefixes: a folder that is replaced in place and loaded again is another delta. A
    name keeps its number in every process; 0 stands for the base.

    Raises:
        DqreloError: delta_config.json cannot be used. FileNotFoundError: it is missing.
    """
    folder = folder.absolute()
    path = path_with_digest(folder, DeltaConfig.read(folder).digest)
    number = zlib.crc32(name.encode()) % (2**31 - 1) + 1
    return LoRARequest(name, number, path, load_inplace=load_inplace)


def folder_of(request: LoRARequest) -> Path:
    """The folder of a request's delta."""
    return split_path(request.lora_path)[0]


def path_with_digest(folder: Path | str, digest: str) -> str:
    """``FOLDER#sha256:DIGEST``, the path of a LoRARequest."""
    return f"{folder}#{digest}"


def split_path(path: str) -> tuple[Path, str | None]:
    """The folder and the digest of such a path; None for a path that is a folder.

    A folder may be called ``d#1``.
    """
    match = PATH.fullmatch(path)
    return (Path(match[1]), match[2]) if match else (Path(path), None)
