# SPDX-License-Identifier: Apache-2.0
"""``dqrelo serve``."""

import argparse

from dqrelo_tools.arguments import Commands


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "serve",
        help="serve a base and its deltas; takes every option of vllm serve",
        usage="dqrelo serve BASE [--delta NAME=DELTA ...] [--delta-dir DIR ...] "
        "[vllm serve options]",
    )
    command.add_argument("base", metavar="BASE", help="a folder or a Hub id")
    command.add_argument(
        "--delta",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=DELTA",
        help="delta folders and the model names that reach them; repeatable",
    )
    command.add_argument(
        "--delta-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="a folder of deltas: each sub-folder is a model, loaded when a request "
        "first names it; repeatable",
    )
    command.add_argument(
        "--hub-namespace",
        action="append",
        default=[],
        metavar="NAMESPACE",
        help="a user or organisation of the Hub whose deltas /v1/load_lora_adapter may "
        "load; repeatable",
    )
    command.add_argument(
        "--delta-endpoints",
        action="store_true",
        help="add /v1/dqrelo/deltas, which the command dqrelo deltas uses",
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Hand over to vLLM."""
    from vllm_dqrelo.frontend.serve import serve

    return serve(
        arguments.base,
        arguments.delta,
        arguments.vllm_arguments,
        arguments.delta_dir,
        arguments.hub_namespace,
        arguments.delta_endpoints,
    )
