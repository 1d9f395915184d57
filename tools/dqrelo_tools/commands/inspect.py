# SPDX-License-Identifier: Apache-2.0
"""``dqrelo inspect``."""

import argparse
import json

from dqrelo_tools.arguments import Commands, folder


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser("inspect", help="show the content of a delta")
    command.add_argument(
        "delta",
        type=folder,
        metavar="DELTA",
        help="a folder, or OWNER/NAME on the Hub, of which headers are read only",
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print configuration and contents of a delta."""
    from dqrelo_tools.describe import describe, to_text

    description = describe(arguments.delta)
    text = json.dumps(description, indent=2) if arguments.json else to_text(description)
    print(text)
    return 0
