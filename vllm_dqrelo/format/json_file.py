# SPDX-License-Identifier: Apache-2.0
"""A JSON file that anyone may have written."""

import json
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.regular_file import read_bytes

MOST_BYTES = 64 * 2**20  # an index of a million tensors


def read_json(path: Path) -> Any:
    """The parsed content of ``path``; a DqreloError says why it cannot be read."""
    try:
        return parsed_json(read_bytes(path, MOST_BYTES), str(path))
    except FileNotFoundError as error:
        raise DqreloError(f"{path} cannot be read: {error.strerror}") from error


def parsed_json(content: bytes, where: str) -> Any:
    """The JSON that ``content``, of the file named ``where``, is."""
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DqreloError(f"{where} is not valid JSON: {error}") from error
