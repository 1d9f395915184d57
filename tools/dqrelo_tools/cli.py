# SPDX-License-Identifier: Apache-2.0
"""The command ``dqrelo``: from a fine-tune to a delta, a server, a fleet."""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import metadata

from tqdm import tqdm

from dqrelo_tools.commands import (
    advise,
    convert,
    deltas,
    doctor,
    export,
    inspect,
    plan,
    serve,
    verify,
)
from vllm_dqrelo.format.errors import DqreloError

DESCRIPTION = "Serve full fine-tunes of one base as deltas of an eighth of their size."
# Most users need the first three only.
COMMANDS = (convert, verify, serve, advise, inspect, export, plan, deltas, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0, or 1 after an error that stderr explains. argparse exits
        with 2 when the command line itself is wrong.
    """
    log_to_stderr()
    given = sys.argv[1:] if argv is None else argv
    arguments, rest = parser().parse_known_args(split_values(given))
    if rest and arguments.run is not serve.run:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.vllm_arguments = rest
    try:
        return arguments.run(arguments)
    except (DqreloError, OSError) as error:
        print(f"dqrelo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dqrelo: interrupted", file=sys.stderr)
        return 130


def split_values(argv: Sequence[str]) -> list[str]:
    """``--option=VALUE`` as two arguments, where VALUE has a space, such as JSON.

    argparse takes an option that it does not know for a value then, and gives it to the
    option before.
    """
    parts: list[str] = []
    for argument in argv:
        is_option = argument.startswith("--") and " " in argument
        parts += argument.split("=", 1) if is_option else [argument]
    return parts


class Stderr(logging.Handler):
    """Writes ``dqrelo: note: ...`` or ``dqrelo: warning: ...``, past progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        kind = "warning" if record.levelno >= logging.WARNING else "note"
        tqdm.write(f"dqrelo: {kind}: {record.getMessage()}", file=sys.stderr)


def log_to_stderr() -> None:
    """Show what the tools note about their input. Safe to call again."""
    logger = logging.getLogger("dqrelo_tools")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, Stderr) for handler in logger.handlers):
        logger.addHandler(Stderr())


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="dqrelo", description=DESCRIPTION)
    version = metadata.version("vllm-dqrelo")
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return root


if __name__ == "__main__":
    sys.exit(main())
