# SPDX-License-Identifier: Apache-2.0
"""The one error for input that cannot be used."""

from collections.abc import Sequence


class DqreloError(ValueError):
    """Bad input: what was wrong, what was expected, what to do."""


def refuse(subject: str, problems: Sequence[str], limit: int = 20) -> None:
    """Raise one DqreloError that lists all ``problems``; do nothing without any."""
    if problems:
        lines = [f"  {problem}" for problem in problems[:limit]]
        if len(problems) > limit:
            lines.append(f"  ... and {len(problems) - limit} more")
        raise DqreloError("\n".join([subject, *lines]))
