# SPDX-License-Identifier: Apache-2.0
"""Sizes and ratios, as options and as text."""

import argparse

import pytest

from dqrelo_tools.arguments import ratio, size
from dqrelo_tools.footprint import bytes_of
from dqrelo_tools.sizes import format_size, parse_size

NOT_A_SIZE = "is not a size such as 1.2GB"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("5MB", 5_000_000),
        ("1.2GB", 1_200_000_000),
        (" 3 kb ", 3_000),
        ("0.5tb", 500_000_000_000),
        ("1e3KB", 1_000_000),
        ("0GB", 0),
    ],
)
def test_units_are_decimal(text, count):
    assert parse_size(text) == count


@pytest.mark.parametrize(
    "text", ["", "GB", "5", "5 GiB", "5XB", "xMB", "infGB", "nanGB"]
)
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match=NOT_A_SIZE):
        parse_size(text)
    with pytest.raises(argparse.ArgumentTypeError, match=NOT_A_SIZE):
        size(text)
    assert bytes_of(text, lambda name: 7) == 7  # a name


@pytest.mark.parametrize("text", ["0GB", "-1GB", "0.1/s"])
def test_a_size_of_an_option_is_at_least_one_byte(text):
    with pytest.raises(argparse.ArgumentTypeError, match=NOT_A_SIZE):
        size(text)


def test_a_speed_is_a_size_a_second():
    assert size("2GB/s") == 2 * 10**9


@pytest.mark.parametrize("count", [1, 999, 1000, 120_000, 1_234_567, 10**9, 3 * 10**12])
def test_the_text_of_a_size_is_that_size(count):
    assert parse_size(format_size(count)) == count


@pytest.mark.parametrize("text", ["1/16", "0.0625", " 1 / 16 "])
def test_a_ratio_is_a_number_or_a_fraction(text):
    assert ratio(text) == 0.0625


@pytest.mark.parametrize("text", ["1/0", "1/", "/8", "1/8/2", "an eighth", "1/x", ""])
def test_what_is_not_a_ratio_is_refused(text):
    message = f"^{text} is not a ratio such as 0.0625 or 1/16"
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        ratio(text)
