# SPDX-License-Identifier: Apache-2.0
"""A delta as vLLM knows it: a LoRARequest."""

import zlib
from pathlib import Path

from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.config import DeltaConfig

DIGEST = "#sha256:"


def delta_request(name: str, folder: Path, load_inplace: bool = False) -> LoRARequest:
    """The request object that selects a delta.

    The digest makes the path, and with it vLLM's key of cached prefixes, one of
    content: a folder that is replaced in place and loaded again is another delta. A
    name keeps its number in every process; 0 stands for the base.

    Raises:
        DqreloError: delta_config.json cannot be used. FileNotFoundError: there is none.
    """
    folder = folder.absolute()
    digest = DeltaConfig.read(folder).digest.removeprefix("sha256:")
    number = zlib.crc32(name.encode()) % (2**31 - 1) + 1
    return LoRARequest(
        name, number, f"{folder}{DIGEST}{digest}", load_inplace=load_inplace
    )


def folder_of(request: LoRARequest) -> Path:
    """Where the delta of a request lies."""
    return Path(request.lora_path.partition(DIGEST)[0])
