# SPDX-License-Identifier: Apache-2.0
"""Servers under load, through the OpenAI API, by vLLM's own benchmark client.

    python -m benchmarks.serving.serving             # how traffic changes our numbers
    python -m benchmarks.serving.serving --compare   # beside other ways to serve

Rows that the results have already are not measured again. Popularity laws are those of
``dqrelo plan``; a trace brings its own number of models. One model, and requests that
are all for one model, are the same and measured once, as ``identical``. ``hits`` is the
share of requests whose delta was not copied to the device for them.
"""

import argparse
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks.machine import MACHINE, machine
from benchmarks.models.smollm import base, delta
from benchmarks.paths import RESULTS
from benchmarks.serving.load import ARRIVALS, SUMMARY, Goal, Load, drive, summary
from benchmarks.serving.rivals import SYSTEMS, WARM_UP, ours
from benchmarks.serving.server import copies
from benchmarks.table import Table
from dqrelo_tools.popularity import Popularity

LAWS = ("identical", "distinct", "uniform", "zipf:1", "geometric:1.5")
MODELS = (1, 2, 4, 8, 16, 32)
LOAD, GOAL = (tuple(field.name for field in fields(one)) for one in (Load, Goal))
KEYS = ("models", "popularity", *LOAD, "max_loras")
COLUMNS = (*KEYS, *GOAL, *SUMMARY, "hits", *MACHINE)
COMPARE_KEYS = ("system", "models", *LOAD)
COMPARE_COLUMNS = (*COMPARE_KEYS, "weights_mb", *GOAL, *SUMMARY, *MACHINE)


def cells(laws: list[str], models: list[int]) -> Iterator[tuple[Popularity, int]]:
    """Law and number of models of each row, those that differ."""
    for law in map(Popularity.parse, laws):
        if law.law == "trace":
            yield law, law.models(None)
        elif law.law == "identical":
            yield law, 1
        else:
            yield from ((law, count) for count in models if count > 1)


def loads(arguments: argparse.Namespace) -> list[Load]:
    """All arrivals at all lengths."""
    return [
        Load(
            arrivals,
            lengths,
            arguments.num_prompts,
            arguments.request_rate,
            arguments.max_concurrency,
            arguments.seed,
        )
        for lengths in arguments.lengths
        for arrivals in arguments.arrivals
    ]


def grid(arguments: argparse.Namespace) -> Table:
    """One server with as many deltas as any row asks for, and every row."""
    table = Table(arguments.output_dir / "serving.csv", KEYS, COLUMNS)
    missing = []
    for law, count in cells(arguments.popularity, arguments.models):
        for load in loads(arguments):
            row = {"models": count, "popularity": law.text, **asdict(load)}
            row["max_loras"] = arguments.max_loras
            if tuple(str(row[key]) for key in KEYS) not in table:
                missing.append((law, load, row))
    if not missing:
        return table
    names = [f"m{i}" for i in range(max(row["models"] for *_, row in missing))]
    deltas = {name: delta(i) for i, name in enumerate(tqdm(names, "deltas"))}
    with ours(deltas, arguments.max_loras) as address:
        drive(address, base(), names, replace(WARM_UP, num_prompts=len(names)))
        for law, load, row in tqdm(missing, "measure", unit="row"):
            rng = np.random.default_rng(load.seed)
            drawn = law.draw(row["models"], load.num_prompts, rng)
            before = copies(address)
            result = drive(address, base(), [names[i] for i in drawn], load)
            time.sleep(1)  # the last step's statistics come after its answer
            made = copies(address) - before
            found = summary([result], result["duration"], arguments.goodput)
            found["hits"] = round(1 - made / load.num_prompts, 3)
            table.add({**row, **asdict(arguments.goodput), **found, **machine()})
    return table


def compare(arguments: argparse.Namespace) -> Table:
    """Every way to serve ``--models`` models, one after another on this machine."""
    (count,) = arguments.models
    path = arguments.output_dir / "serving_compare.csv"
    table = Table(path, COMPARE_KEYS, COMPARE_COLUMNS)
    for load in loads(arguments):
        for names, system in tqdm(SYSTEMS.items(), "compare", unit="system"):
            about = {"models": count, **asdict(load)}
            rows = [{"system": name, **about} for name in names]
            known = [tuple(str(r[key]) for key in COMPARE_KEYS) in table for r in rows]
            if all(known):
                continue
            found = system(count, load)
            for row, old, measured in zip(rows, known, found, strict=True):
                if old:
                    continue
                results, seconds, weights = measured
                row |= {"weights_mb": round(weights / 1e6, 1)}
                row |= asdict(arguments.goodput)
                row |= summary(results, seconds, arguments.goodput)
                table.add({**row, **machine()})
    return table


def parser() -> argparse.ArgumentParser:
    """The command line; options of ``vllm bench serve`` have its names."""
    found = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    found.add_argument("--compare", action="store_true", help="needs one --models")
    found.add_argument("--models", type=int, nargs="+", default=MODELS)
    found.add_argument("--popularity", nargs="+", default=LAWS, metavar="LAW")
    found.add_argument("--arrivals", nargs="+", choices=ARRIVALS, default=ARRIVALS)
    found.add_argument("--lengths", nargs="+", default=["64:64"], metavar="IN:OUT")
    found.add_argument("--num-prompts", type=int, default=32)
    found.add_argument("--request-rate", type=float, default=1.0)
    found.add_argument("--max-concurrency", type=int, default=8)
    found.add_argument("--max-loras", type=int, default=8)
    found.add_argument(
        "--goodput",
        type=lambda text: Goal(*map(float, text.split(":"))),
        default="2000:200",
        metavar="TTFT:TPOT",
        help="limits of a good answer in ms (default: 2000:200)",
    )
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--output-dir", type=Path, default=RESULTS)
    return found


def main() -> None:
    """Measure what is missing and print all rows."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server ends too
    arguments = parser().parse_args()
    if arguments.compare and len(arguments.models) != 1:
        raise SystemExit("--compare needs one number of --models, such as 4")
    table = compare(arguments) if arguments.compare else grid(arguments)
    text = json.dumps(table.rows, indent=1, default=str)
    table.path.with_suffix(".json").write_text(text + "\n")
    shown = (*table.keys[:3], "output_tokens_per_s", "ttft_p50_ms", "tpot_p50_ms")
    for row in table.rows:
        print("  ".join(str(row[key]) for key in shown))


if __name__ == "__main__":
    main()
