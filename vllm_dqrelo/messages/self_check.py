# SPDX-License-Identifier: Apache-2.0
"""The self-checks that passed: a JSON file for each kind of worker."""

import json
from pathlib import Path
from typing import Any

FOLDER = "dqrelo/self_check"  # in vLLM's cache folder
RESULT = "result"  # a key of each file: the line that the worker logged


def newest(cache: Path) -> dict[str, Any] | None:
    """The content of the newest file; None if a self-check was never remembered.

    Args:
        cache: vLLM's cache folder.

    Raises:
        OSError, ValueError: the file cannot be read.
    """
    files = sorted((cache / FOLDER).glob("*.json"), key=lambda p: p.stat().st_mtime)
    return json.loads(files[-1].read_text()) if files else None
