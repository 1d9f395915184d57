# SPDX-License-Identifier: Apache-2.0
"""The command ``dqrelo``: from a fine-tune to a delta, a server, a fleet."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from tqdm import tqdm

from dqrelo_tools.arguments import add_plot, folder, require_device, size
from dqrelo_tools.plan_command import add_plan
from vllm_dqrelo.format.errors import DqreloError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0, or 1 after an error that one line on stderr explains. argparse exits
        with 2 when the command line itself is wrong.
    """
    log_to_stderr()
    given = sys.argv[1:] if argv is None else argv
    arguments, rest = parser().parse_known_args(split_values(given))
    if rest and arguments.run is not serve:
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
    root = argparse.ArgumentParser(prog="dqrelo", description=__doc__)
    version = metadata.version("vllm-dqrelo")
    root.add_argument("--version", action="version", version=version)
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "advise", help="look at a fine-tune and say what to convert it with"
    )
    add_models(command, "--base", "--model")
    command.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="of the files with the tensors, as for convert",
    )
    add_plot(command, "predicted error and singular values")
    command.add_argument("--json", action="store_true")
    add_device(command)
    command.set_defaults(run=advise)

    command = commands.add_parser(
        "convert", help="write the delta from a base to its fine-tune"
    )
    add_models(command, "--base", "--model")
    command.add_argument(
        "--base-quantized",
        metavar="MODEL",
        help="a quantised copy of the base: the delta is served with it, and repairs "
        "its quantisation error as well",
    )
    command.add_argument(
        "--output", type=Path, required=True, metavar="DELTA", help="a new folder"
    )
    either = command.add_mutually_exclusive_group()
    either.add_argument(
        "--ratio",
        type=float,
        default=0.125,
        help="size as a fraction of 16 bits per weight (default: 0.125)",
    )
    either.add_argument(
        "--budget",
        type=size,
        metavar="SIZE",
        help="of the files with the tensors, such as 1.2GB: divided among the "
        "matrices by predicted error; reads the models twice",
    )
    command.add_argument(
        "--method",
        choices=("dqrelo", "dqrelo-paper"),
        default="dqrelo",
        help="dqrelo (default), or dqrelo-paper: arXiv 2604.16940 as it was published",
    )
    command.add_argument(
        "--max-shard-size",
        type=size,
        default="1GB",
        metavar="SIZE",
        help="of the files with the tensors; one is in memory (default: 1GB)",
    )
    add_device(command)
    command.add_argument(
        "--push-to-hub", metavar="REPO_ID", help="upload the delta to the Hub as well"
    )
    command.add_argument(
        "--private", action="store_true", help="make the repository a private one"
    )
    command.set_defaults(run=convert)

    command = commands.add_parser("inspect", help="show what a delta folder holds")
    command.add_argument("delta", type=folder, metavar="DELTA")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=inspect)

    command = commands.add_parser(
        "verify", help="check a delta against its base, and its error"
    )
    add_models(command, "--base", "--delta")
    command.add_argument("--model", help="the fine-tune, to measure the error")
    command.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="measure KL divergence and top-1 agreement on this text: one prompt a "
        'line, or .jsonl with "prompt", "text" or "messages"; takes 12 bytes of '
        "memory a weight",
    )
    add_plot(
        command, "the error of each layer, without --model as the conversion found it"
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=verify)

    command = commands.add_parser(
        "export", help="write base + delta as an ordinary checkpoint"
    )
    add_models(command, "--base", "--delta")
    command.add_argument("--output", type=Path, required=True, help="a new folder")
    command.set_defaults(run=export)

    add_plan(commands)

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
        help="add /v1/dqrelo/deltas, which dqrelo deltas uses",
    )
    command.set_defaults(run=serve)

    command = commands.add_parser(
        "deltas", help="list, load, unload or pin the deltas of a running server"
    )
    command.add_argument("action", choices=("list", "load", "unload", "pin"))
    command.add_argument("name", nargs="?", metavar="NAME", help="but for list")
    command.add_argument("--url", default="http://localhost:8000")
    command.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        help="the server's (default: VLLM_API_KEY)",
    )
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=deltas)
    return root


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


def advise(arguments: argparse.Namespace) -> int:
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


def convert(arguments: argparse.Namespace) -> int:
    """Write a delta and print what it cost."""
    from dqrelo_tools.convert import convert
    from dqrelo_tools.hub import push, require_access

    require_device(arguments.device)
    repo_id = arguments.push_to_hub
    if repo_id:
        require_access(repo_id)
    elif arguments.private:
        raise DqreloError("--private is of the repository: it needs --push-to-hub")
    report = convert(
        arguments.base,
        arguments.model,
        arguments.output,
        arguments.ratio,
        arguments.max_shard_size,
        arguments.device,
        arguments.method,
        arguments.budget,
        arguments.base_quantized,
    )
    print(report.to_text())
    print(f"written to {arguments.output}")
    if repo_id:
        print(f"pushed to {push(arguments.output, repo_id, arguments.private)}")
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """Print configuration and contents of a delta."""
    from dqrelo_tools.describe import describe, to_text

    description = describe(arguments.delta)
    text = json.dumps(description, indent=2) if arguments.json else to_text(description)
    print(text)
    return 0


def verify(arguments: argparse.Namespace) -> int:
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


def export(arguments: argparse.Namespace) -> int:
    """Write the merged checkpoint."""
    from dqrelo_tools.export import export

    size = export(arguments.base, arguments.delta, arguments.output)
    print(f"{size:,} bytes of tensors written to {arguments.output}")
    return 0


def serve(arguments: argparse.Namespace) -> int:
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


def deltas(arguments: argparse.Namespace) -> int:
    """Print what a server says of its deltas."""
    from dqrelo_tools.remote import Server, to_text

    if (arguments.action == "list") == bool(arguments.name):
        raise DqreloError(
            "deltas list takes no NAME"
            if arguments.name
            else f"deltas {arguments.action} takes the NAME of a delta"
        )
    server = Server(arguments.url, arguments.api_key)
    if arguments.action == "list":
        listed = server.list()
        print(json.dumps(listed, indent=2) if arguments.json else to_text(listed))
        return 0
    found = server.do(arguments.action, arguments.name)
    said = f"{arguments.name} is now on {found['tier']}"
    print(json.dumps(found, indent=2) if arguments.json else said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
