# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have, and what options take: sizes, numbers, shares."""

import argparse
from pathlib import Path
from typing import TypeAlias

from dqrelo_tools.sizes import parse_size
from vllm_dqrelo.format.errors import DqreloError

# argparse has no public name for what ``add_subparsers`` returns.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def size(text: str) -> int:
    """The bytes of "1.2GB"; a speed may end in "/s"."""
    try:
        parsed = parse_size(text.removesuffix("/s"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if parsed < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a size such as 1.2GB")
    return parsed


def folder(text: str) -> Path:
    """A folder, "~" being the home of the user."""
    return Path(text).expanduser()


def count(text: str) -> int:
    """A positive number of things."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"{text} is not a number above 0 and at most 1"
        )
    return value


def ratio(text: str) -> float:
    """A number, "0.0625" or "1/16"; ``convert`` has its range."""
    over, slash, under = text.partition("/")
    try:
        return float(over) / float(under) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(
            f"{text} is not a ratio such as 0.0625 or 1/16"
        ) from None


def add_models(command: argparse.ArgumentParser, *options: str) -> None:
    """Add the options that name models and deltas."""
    texts = {
        "--base": "the base model: a folder or a Hub id",
        "--model": "the fine-tune: a folder or a Hub id",
        "--delta": "a delta folder",
    }
    for option in options:
        kind = folder if option == "--delta" else str
        command.add_argument(option, type=kind, required=True, help=texts[option])


def add_device(command: argparse.ArgumentParser) -> None:
    """Add the option that says where to compute."""
    command.add_argument(
        "--device", default="cpu", help="where to compute: cpu (default) or cuda"
    )


def require_device(device: str) -> None:
    """Refuse a device that torch does not have, before the work."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise DqreloError(f"--device {device} cannot be used: {reason}") from error


def add_plot(command: argparse.ArgumentParser, what: str) -> None:
    """Add the option that saves a picture of ``what``."""
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help=f"save a picture of {what} (.png, .pdf, .svg)",
    )
