# SPDX-License-Identifier: Apache-2.0
"""``dqrelo advise``."""

import argparse
import json

from dqrelo_tools.arguments import (
    Commands,
    add_device,
    add_models,
    add_plot,
    require_device,
    size,
)


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "advise", help="measure a fine-tune and recommend options of convert"
    )
    add_models(command, "--base", "--model")
    command.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="size of all files with tensors, as for convert",
    )
    add_plot(command, "predicted error and singular values")
    command.add_argument("--json", action="store_true")
    add_device(command)
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what a fine-tune looks like, and what to run."""
    from dqrelo_tools.advise import Advice, figure, survey
    from dqrelo_tools.plot import require_plot

    if arguments.plot:
        require_plot(arguments.plot)
    require_device(arguments.device)
    found = survey(arguments.base, arguments.model, arguments.device)
    advice = Advice(found, arguments.budget)
    if arguments.plot:
        figure(advice).savefig(arguments.plot, dpi=150)
    if arguments.json:
        print(json.dumps(advice.to_dict(), indent=2))
    else:
        print(advice.to_text())
    return 0
