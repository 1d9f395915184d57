# SPDX-License-Identifier: Apache-2.0
"""``dqrelo deltas``."""

import argparse
import json
import os

from dqrelo_tools.arguments import Commands
from vllm_dqrelo.format.errors import DqreloError


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "deltas", help="list, load, unload or pin the deltas of a running server"
    )
    command.add_argument("action", choices=("list", "load", "unload", "pin"))
    command.add_argument(
        "name", nargs="?", metavar="NAME", help="of a delta, unless list"
    )
    command.add_argument("--url", default="http://localhost:8000")
    command.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        help="of the server (default: VLLM_API_KEY)",
    )
    command.add_argument(
        "--load-inplace",
        action="store_true",
        help="with load: read the folder of a loaded delta again",
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what a server says of its deltas."""
    from dqrelo_tools.remote import Server, to_text

    if (arguments.action == "list") == bool(arguments.name):
        raise DqreloError(
            "deltas list does not take a NAME"
            if arguments.name
            else f"deltas {arguments.action} takes the NAME of a delta"
        )
    if arguments.load_inplace and arguments.action != "load":
        raise DqreloError(f"deltas {arguments.action} does not take --load-inplace")
    server = Server(arguments.url, arguments.api_key)
    if arguments.action == "list":
        listed = server.list()
        print(json.dumps(listed, indent=2) if arguments.json else to_text(listed))
        return 0
    options = {"load_inplace": True} if arguments.load_inplace else {}
    found = server.do(arguments.action, arguments.name, **options)
    said = f"{arguments.name} is now on {found['tier']}"
    print(json.dumps(found, indent=2) if arguments.json else said)
    return 0
