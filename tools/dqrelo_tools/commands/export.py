# SPDX-License-Identifier: Apache-2.0
"""``dqrelo export``."""

import argparse
from pathlib import Path

from dqrelo_tools.arguments import Commands, add_models


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "export", help="write base + delta as an ordinary checkpoint"
    )
    add_models(command, "--base", "--delta")
    command.add_argument("--output", type=Path, required=True, help="a new folder")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the merged checkpoint."""
    from dqrelo_tools.export import export

    size = export(arguments.base, arguments.delta, arguments.output)
    print(f"{size:,} bytes of tensors written to {arguments.output}")
    return 0
