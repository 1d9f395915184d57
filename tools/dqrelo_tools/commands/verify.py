# SPDX-License-Identifier: Apache-2.0
"""``dqrelo verify``."""

import argparse
import json
from pathlib import Path

from dqrelo_tools.arguments import Commands, add_models, add_plot


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "verify", help="check a delta against its base, and measure its error"
    )
    add_models(command, "--base", "--delta")
    command.add_argument("--model", help="the fine-tune, to measure the error")
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="measure KL divergence and top-1 agreement on this text: one prompt a "
        'line, or .jsonl with "prompt", "text" or "messages"; needs 12 bytes of '
        "memory a weight",
    )
    add_plot(
        command, "the error of each layer; without --model, as convert measured it"
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check a delta and print its error."""
    from dqrelo_tools.card import read_report
    from dqrelo_tools.plot import plot, require_plot
    from dqrelo_tools.verify import verify

    if arguments.plot:
        require_plot(arguments.plot)
    report = verify(arguments.base, arguments.delta, arguments.model, arguments.prompts)
    if arguments.plot:
        shown = report if arguments.model else read_report(arguments.delta)
        plot(shown, arguments.plot)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print(f"{arguments.delta} is sound and belongs to {arguments.base}")
        if arguments.model:
            print(report.to_text())
    return 0
