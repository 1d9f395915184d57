# SPDX-License-Identifier: Apache-2.0
"""``dqrelo doctor``."""

import argparse

from dqrelo_tools.arguments import Commands


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "doctor", help="say whether this machine can serve; for bug reports, too"
    )
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one screen; 1 if this machine cannot serve."""
    from dqrelo_tools.text_table import text_table
    from vllm_dqrelo.frontend.doctor import examine

    found = list(examine())
    marks = [("" if one.serves else "PROBLEM", *one[:2]) for one in found]
    print(text_table(marks, "<"))
    wrong = [one.subject for one in found if not one.serves]
    print(
        f"\nThis machine cannot serve deltas: {', '.join(wrong)}."
        if wrong
        else "\nThis machine can serve deltas."
    )
    return int(bool(wrong))
