# SPDX-License-Identifier: Apache-2.0
"""Bytes as text, in the decimal units of Hugging Face's libraries."""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """The bytes of "1.2GB".

    Raises:
        ValueError: ``text`` is not a number and a unit.
    """
    number, unit = text.strip()[:-2], text.strip()[-2:].upper()
    try:
        return int(float(number) * UNITS[unit])
    except (KeyError, OverflowError, ValueError) as error:
        raise ValueError(f"{text} is not a size such as 1.2GB") from error


def format_size(size: int) -> str:
    """Text that ``parse_size`` makes ``size`` bytes of, to nine digits."""
    unit = ["KB", *(unit for unit in UNITS if size >= UNITS[unit])][-1]
    return f"{size / UNITS[unit]:.9g}{unit}"
