# SPDX-License-Identifier: Apache-2.0
"""A user's own text: one prompt a line, plain or as JSON."""

import json
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError, refuse

Prompt = str | list[dict[str, Any]]  # text, or the messages of a chat
KEYS = ("messages", "prompt", "text")  # of a JSON line; the first that it has counts
JSON_LINES = (".jsonl", ".json", ".ndjson")


def read_prompts(path: Path) -> dict[int, Prompt]:
    """Line number -> prompt, without blank lines.

    Args:
        path: of UTF-8 text. A name that ends like one of JSON_LINES makes each line a
            JSON object with one of KEYS, whose value is text or a list of messages.

    Raises:
        DqreloError: a line is not valid (all are listed), or the file lacks prompts.
        FileNotFoundError: the file is missing.
    """
    prompts: dict[int, Prompt] = {}
    problems = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = {
                number: line for number, line in enumerate(file, 1) if line.strip()
            }
    except UnicodeDecodeError as error:
        raise DqreloError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in lines.items():
        try:
            json_lines = path.suffix.lower() in JSON_LINES
            prompts[number] = parse(line) if json_lines else line.rstrip("\n")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    refuse(f"{path} cannot be used:", problems)
    if not prompts:
        raise DqreloError(f"{path} has no prompts: expected one a line")
    return prompts


def parse(line: str) -> Prompt:
    """The prompt of one JSON line; a ValueError says what is wrong with it."""
    raw = json.loads(line)
    key = next((key for key in KEYS if isinstance(raw, dict) and key in raw), None)
    if key is None:
        raise ValueError(f"expected a JSON object with one of {', '.join(KEYS)}")
    value = raw[key]
    if isinstance(value, str) and value.strip() and key != "messages":
        return value
    if isinstance(value, list) and value and all(map(is_message, value)):
        return value
    raise ValueError(
        f"{key} is {json.dumps(value)[:80]}, expected "
        f'{"" if key == "messages" else "text or "}a list of {{"role", "content"}}'
    )


def is_message(value: object) -> bool:
    """Whether it is what a chat template takes."""
    return isinstance(value, dict) and {"role", "content"} <= value.keys()
