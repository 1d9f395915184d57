# SPDX-License-Identifier: Apache-2.0
"""What a generation_config.json may say, and what is refused."""

import json

import pytest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.generation_config import MOST_BYTES, read_generation_config

VOCABULARY = 320


def read(content):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    text = text.encode() if isinstance(text, str) else text
    return read_generation_config(text, "x/generation_config.json", VOCABULARY)


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"eos_token_id": 0, "bos_token_id": 319, "pad_token_id": None},
        {"eos_token_id": [2, 319], "pad_token_id": -1},
        {"eos_token_id": []},
        {"temperature": 1, "top_k": 50, "top_p": 1, "max_new_tokens": 2048},
        {"temperature": 0.0, "top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1},
        {"presence_penalty": 1.5, "frequency_penalty": -2},
        # Keys that no server looks at.
        {"do_sample": True, "transformers_version": "4.43.0", "max_length": "x"},
    ],
)
def test_what_is_published_is_taken(raw):
    assert read(raw) == raw


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("eos_token_id", v) for v in ("2", 3.0, True, 320, -1, {}, 10**30)],
        *[("eos_token_id", v) for v in ([2, 999_999], [[2]], [2, "3"], [False])],
        *[("bos_token_id", v) for v in ("1", 1.5, [1, None])],
        *[("pad_token_id", v) for v in (-2, 320, [-1])],
        *[("temperature", v) for v in ("0.7", True, -0.1, 2.5, [1.0], 10**400)],
        *[("top_p", v) for v in (0, 1.1, "1", False)],
        *[("min_p", v) for v in (-0.1, 2)],
        *[("repetition_penalty", v) for v in (0, -1, 10**30, [[1]])],
        *[("presence_penalty", v) for v in (3, "0")],
        *[("frequency_penalty", v) for v in (-2.5, True)],
        *[("top_k", v) for v in (-2, 50.0, "50", True, 2**63)],
        *[("max_new_tokens", v) for v in (0, -5, 1.0, "9", 2**64, True)],
    ],
)
def test_what_cannot_be_used_is_refused_by_file_and_key(key, value):
    with pytest.raises(DqreloError) as error:
        read({"do_sample": True, key: value})
    first, *lines = str(error.value).splitlines()
    assert first == "x/generation_config.json cannot be used:"
    assert [line.strip().partition(" is ")[0] for line in lines] == [key]
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
@pytest.mark.parametrize("key", ["temperature", "top_p", "repetition_penalty", "top_k"])
def test_numbers_that_are_not_finite_are_refused(key, number):
    with pytest.raises(DqreloError, match=key):
        read(f'{{"{key}": {number}}}')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not valid JSON"),
        ("", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("null", "is not a JSON object"),
        (b"\xff{}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "is not valid JSON"),
        ('{"top_k": ' + "9" * 100_000 + "}", "is not valid JSON"),
        (" " * (MOST_BYTES + 1), "has 1,048,577 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused(content, message):
    with pytest.raises(DqreloError, match=f"^x/generation_config.json {message}"):
        read(content)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(DqreloError, match=r"(?s)eos_token_id.*temperature.*top_k"):
        read({"top_k": "x", "temperature": "y", "eos_token_id": "z"})
