# SPDX-License-Identifier: Apache-2.0
"""``dqrelo convert``."""

import argparse
from pathlib import Path

from dqrelo_tools.arguments import (
    Commands,
    add_device,
    add_models,
    ratio,
    require_device,
    size,
)
from dqrelo_tools.sizes import format_size
from vllm_dqrelo.format.config import (
    DEFAULT_RATIO,
    DQRELO,
    MAX_SHARD_SIZE,
    METHODS,
    PAPER,
)
from vllm_dqrelo.format.errors import DqreloError


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "convert", help="write the delta from a base to its fine-tune"
    )
    add_models(command, "--base", "--model")
    command.add_argument(
        "--base-quantized",
        metavar="MODEL",
        help="a quantised copy of the base, to serve the delta with: the delta repairs "
        "the quantisation error as well",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DELTA", help="a new folder"
    )
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--ratio",
        type=ratio,
        default=DEFAULT_RATIO,
        help="size as a fraction of 16 bits per weight, such as 0.0625 or 1/16 "
        f"(default: {DEFAULT_RATIO})",
    )
    either.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="size of all files with tensors, such as 1.2GB: divided among the "
        "matrices by predicted error; reads the models twice",
    )
    command.add_argument(
        "--method",
        choices=METHODS,
        default=DQRELO,
        help=f"{DQRELO} (default), or {PAPER}: as published in arXiv 2604.16940",
    )
    command.add_argument(
        "--max-shard-size",
        type=size,
        default=MAX_SHARD_SIZE,
        metavar="SIZE",
        help="largest size of a file with tensors; memory holds one file (default: "
        f"{format_size(MAX_SHARD_SIZE)})",
    )
    add_device(command)
    command.add_argument(
        "--push-to-hub", metavar="REPO_ID", help="upload the delta to the Hub as well"
    )
    command.add_argument(
        "--private", action="store_true", help="make the repository private"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write a delta and print what it cost."""
    from dqrelo_tools.convert import convert
    from dqrelo_tools.hub import push, require_access

    require_device(arguments.device)
    repo_id = arguments.push_to_hub
    if repo_id:
        require_access(repo_id)
    elif arguments.private:
        raise DqreloError(
            "--private needs --push-to-hub: it makes the repository private"
        )
    report = convert(
        arguments.base,
        arguments.model,
        arguments.output,
        arguments.ratio,
        max_shard_size=arguments.max_shard_size,
        device=arguments.device,
        method=arguments.method,
        budget=arguments.budget,
        base_quantized=arguments.base_quantized,
    )
    print(report.to_text())
    print(f"written to {arguments.output}")
    if repo_id:
        print(f"pushed to {push(arguments.output, repo_id, arguments.private)}")
    return 0
