# SPDX-License-Identifier: Apache-2.0
"""Check and measure everything that needs a GPU, in one command.

    python -m benchmarks.gpu [--output DIR] [--seconds 480] [--tiny]

Correctness first. Each part is a process of its own, and writes its results as soon as
it has them. A part may take its share of the time, and what the parts before it left;
one that fails or runs out of time is recorded, and the next one goes on. ``--tiny``
rehearses the parts with tiny sizes, also on a CPU: what cannot run there is recorded as
skipped. Exit code 1: a part that shows correctness failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu.part import SKIPPED
from benchmarks.machine import machine
from benchmarks.paths import CACHE, ROOT

GRACE_S = 10  # for a process that is told to end


class Part(NamedTuple):
    """One process.

    Attributes:
        name: of the part, and of the files that it writes.
        command: arguments of Python.
        seconds: its share of 480.
        is_check: whether it shows correctness.
    """

    name: str
    command: list[str]
    seconds: int
    is_check: bool = False


def module(name: str, *arguments: str) -> list[str]:
    """The arguments of Python that run a module of this folder."""
    return ["-m", f"benchmarks.gpu.{name}", *arguments]


PARTS = (
    Part("tests", module("marked_tests"), 70, is_check=True),
    Part("models", module("models"), 40, is_check=True),
    Part("start_eager", module("start", "eager"), 45, is_check=True),
    Part("start_graphs", module("start", "graphs"), 75, is_check=True),
    Part("mixed", module("mixed"), 60, is_check=True),
    Part("tiles", module("tiles"), 50),
    Part("kernels", module("kernels"), 45),
    Part("steps", module("steps"), 80),
    Part("sanitizer", module("sanitizer"), 15, is_check=True),
)
BUDGET_S = sum(part.seconds for part in PARTS)


def run(part: Part, options: argparse.Namespace, limit_s: float) -> dict[str, object]:
    """Run one part, and say what came of it.

    Returns:
        "part"; "outcome": ok, skipped, failed or out of time; "why", the last line that
        it printed if it is not ok; "seconds".
    """
    common = ["--output", str(options.output), "--models", str(options.models)]
    command = [sys.executable, *part.command, *common, *["--tiny"] * options.tiny]
    log, start = options.output / f"{part.name}.log", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            code = process.wait(max(limit_s, 0))
            outcome = {0: "ok", SKIPPED: "skipped"}.get(code, "failed")
        except subprocess.TimeoutExpired:
            outcome = "out of time"
            end(process)
    lines = [line for line in log.read_text().splitlines() if line.strip()]
    why = "" if outcome == "ok" else (lines or ["it printed nothing"])[-1][:300]
    seconds = round(time.perf_counter() - start, 1)
    return {"part": part.name, "outcome": outcome, "why": why, "seconds": seconds}


def end(process: subprocess.Popen) -> None:
    """End a process with all that it started."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
            process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def failed(part: Part, found: dict[str, object]) -> bool:
    """Whether correctness was not shown although it could have been."""
    return part.is_check and found["outcome"] in ("failed", "out of time")


def main() -> None:
    """Run the parts, write the summary after each, and print the last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    output = Path(os.environ.get("OUT") or CACHE / "gpu")
    parser.add_argument("--output", type=Path, default=output)
    parser.add_argument(
        "--models", type=Path, default=CACHE / "gpu-models", help="made if not there"
    )
    parser.add_argument("--seconds", type=float, default=BUDGET_S)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a rehearsal")
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    options.output, options.models = options.output.resolve(), options.models.resolve()
    chosen = [part for part in PARTS if part.name in options.parts]
    share = options.seconds / sum(part.seconds for part in chosen)
    summary: dict[str, object] = {**machine(), "tiny": options.tiny, "parts": []}
    rows, start, deadline = [], time.perf_counter(), 0.0
    for part in chosen:
        deadline += share * part.seconds
        row = run(part, options, deadline - (time.perf_counter() - start))
        rows.append(row)
        print(*(f"{str(row[key]):<13}" for key in row if key != "why"), row["why"])
        sys.stdout.flush()
        summary["parts"] = rows
        path = options.output / "summary.json"
        path.write_text(json.dumps(summary, indent=2) + "\n")
    if bad := [p.name for p, row in zip(chosen, rows, strict=True) if failed(p, row)]:
        raise SystemExit(f"not shown to be right: {', '.join(bad)}")


if __name__ == "__main__":
    main()
