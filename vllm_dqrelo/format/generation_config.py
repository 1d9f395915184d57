# SPDX-License-Identifier: Apache-2.0
"""generation_config.json: the tokens that end an answer, default sampling parameters.

A thread of vLLM's engine decodes them from a request as typed numbers, and ends at the
first value of another type. So they are checked in the file.
"""

import math
import reprlib
from collections.abc import Callable
from typing import Any

from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.json_file import parsed_json

MOST_BYTES = 2**20
MOST_INT = 2**63 - 1  # that a message to the engine can hold
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_PAD = -1  # of published Llamas, which lack the token

# The ranges of vLLM's SamplingParams (sampling_params.py, _verify_args).
PARAMETERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (float, lambda x: 0 <= x <= 2, "a number in [0, 2]"),
    "top_p": (float, lambda x: 0 < x <= 1, "a number in (0, 1]"),
    "min_p": (float, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
    "repetition_penalty": (float, lambda x: x > 0, "a finite number above 0"),
    "presence_penalty": (float, lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
    "frequency_penalty": (float, lambda x: -2 <= x <= 2, "a number in [-2, 2]"),
    "top_k": (int, lambda x: -1 <= x <= MOST_INT, "an integer, at least -1"),
    "max_new_tokens": (int, lambda x: 1 <= x <= MOST_INT, "an integer, at least 1"),
}


def read_generation_config(
    content: bytes, where: str, vocabulary: int
) -> dict[str, Any]:
    """The parsed and checked ``content`` of the file named ``where``.

    Args:
        vocabulary: V, how many tokens the model has.

    Raises:
        DqreloError: names the file and each key that cannot be used.
    """
    if len(content) > MOST_BYTES:
        raise DqreloError(
            f"{where} has {len(content):,} bytes; expected at most {MOST_BYTES:,}"
        )
    raw = parsed_json(content, where)
    if not isinstance(raw, dict):
        raise DqreloError(f"{where} is not a JSON object")
    problems = [*token_problems(raw, vocabulary), *parameter_problems(raw)]
    refuse(f"{where} cannot be used:", problems)
    return raw


def token_problems(raw: dict[str, Any], vocabulary: int) -> list[str]:
    """What is wrong with the special tokens of a parsed file."""
    problems = []
    for key in TOKENS:
        value = raw.get(key)
        tokens = value if isinstance(value, list) else [value]
        if value is None or (key == "pad_token_id" and value == NO_PAD):
            continue
        if not all(type(one) is int and 0 <= one < vocabulary for one in tokens):
            problems.append(
                f"{key} is {reprlib.repr(value)}; expected a token, an integer in "
                f"0..{vocabulary - 1}, a list of tokens, or null"
            )
    return problems


def parameter_problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with the default sampling parameters of a parsed file."""
    problems = []
    for key, (kind, in_range, expected) in PARAMETERS.items():
        value = raw.get(key)
        if value is not None and not (is_number(value, kind) and in_range(value)):
            problems.append(f"{key} is {reprlib.repr(value)}; expected {expected}")
    return problems


def is_number(value: Any, kind: type) -> bool:
    """Whether it is an int, or a finite float where ``kind`` is float; never a bool."""
    if type(value) is int:
        return kind is int or -MOST_INT <= value <= MOST_INT
    return kind is float and type(value) is float and math.isfinite(value)
