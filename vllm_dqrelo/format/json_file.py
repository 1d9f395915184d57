# SPDX-License-Identifier: Apache-2.0
"""A JSON file that anyone may have written."""

import json
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError

MOST_BYTES = 64 * 2**20  # an index of a million tensors


def read_json(path: Path) -> Any:
    """The parsed content of ``path``; a DqreloError says why there is none."""
    try:
        size = path.stat().st_size
        text = path.read_text(encoding="utf-8") if size <= MOST_BYTES else ""
    except UnicodeDecodeError as error:
        raise DqreloError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise DqreloError(f"{path} cannot be read: {error.strerror}") from error
    if size > MOST_BYTES:
        raise DqreloError(f"{path} has {size:,} bytes; expected at most {MOST_BYTES:,}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DqreloError(f"{path} is not valid JSON: {error}") from error
