# SPDX-License-Identifier: Apache-2.0
"""How many fine-tunes fit into one memory: a server for each, or deltas on one server.

    python -m benchmarks.serving.capacity --memory-gib 8

SmolLM2-135M in bfloat16. vLLM servers without the plugin, each of one whole fine-tune,
are started one after another, and servers of ours with 1, 8, 16 ... deltas, until one
no longer fits, or there are 64 fine-tunes. All of them run with --enforce-eager and
have a KV cache for 8 requests of full length, more than which are never in flight. Each
time all models are asked, and memory is what the processes of the servers hold
afterwards. Rows that the results have are not measured again.
"""

import argparse
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from benchmarks.machine import MACHINE, machine
from benchmarks.models.smollm import base, delta, merged
from benchmarks.paths import RESULTS
from benchmarks.serving.load import Load, drive
from benchmarks.serving.rivals import (
    LOG,
    WARM_UP,
    at_once,
    in_turn,
    ours,
    part_of,
    stock,
)
from benchmarks.serving.server import metric
from benchmarks.table import Table

MOST = 64
DELTAS = (1, 8, 16, 32, MOST)
# 8,192 tokens on a CPU, whose blocks are of 128: 8 times --max-model-len.
SMALL = ("--enforce-eager", "--num-gpu-blocks-override=64")
LOAD = Load("closed", "32:16", MOST, request_rate=0, max_concurrency=8, seed=0)
COLUMNS = ("system", "models", "budget_gib", "held_gib", "output_tokens_per_s")
COLUMNS += MACHINE
# Number of models, the client's results, and the seconds that they took together.
Asked = tuple[int, list[dict[str, Any]], float]


def separate(known: set[int]) -> Iterator[Asked]:
    """A server for each fine-tune as a whole model; all of them stay."""
    addresses: list[str] = []
    with ExitStack() as stack:
        for count in range(1, MOST + 1):
            log = LOG.with_name(f"server-{count - 1}.log")
            one = stock(merged(count - 1), *SMALL, log=log)
            addresses.append(stack.enter_context(one))
            at_once(addresses[-1:], WARM_UP)
            if count not in known:
                yield count, *at_once(addresses, part_of(LOAD, count))


def together(known: set[int]) -> Iterator[Asked]:
    """One server of ours, all deltas resident."""
    for count in sorted({*DELTAS} - known):
        deltas = {f"m{i}": delta(i) for i in tqdm(range(count), "deltas")}
        names = [*deltas]
        with ours(deltas, count, *SMALL) as address:
            drive(address, base(), names, replace(WARM_UP, num_prompts=count))
            result = drive(address, base(), in_turn(names, LOAD), LOAD)
            resident = int(metric(address, "dqrelo:num_deltas_resident"))
            if resident != count:
                raise SystemExit(f"{resident} of {count} deltas are resident")
            yield count, [result], result["duration"]


SYSTEMS: dict[str, Callable[[set[int]], Iterator[Asked]]] = {
    "a server for each model": separate,
    "ours": together,
}


def held() -> int:
    """Bytes that the processes below this one hold.

    Semantics:
        sum of anonymous and shared memory, a page of n processes 1/n in each
        + the largest of what a process has of files that it maps: they are libraries,
        the same ones in all servers, and the rest of the machine may have them, too.
    """
    own = files = 0
    for process in psutil.Process().children(recursive=True):
        found = Path(f"/proc/{process.pid}")
        own += kib(found / "smaps_rollup", "Pss_Anon", "Pss_Shmem")
        files = max(files, kib(found / "status", "RssFile"))
    return 1024 * (own + files)


def kib(path: Path, *names: str) -> int:
    """Sum of these entries of a file of /proc, each in kB."""
    entries = dict(re.findall(r"^(\w+):\s+(\d+) kB$", path.read_text(), re.MULTILINE))
    return sum(int(entries[name]) for name in names)


def measure(table: Table, system: str, budget_gib: float) -> None:
    """Add the rows of a system that the table lacks."""
    rows = [row for row in table.rows if row["system"] == system]
    known = {int(str(row["models"])) for row in rows}
    if MOST in known or any(float(str(r["held_gib"])) > budget_gib for r in rows):
        return
    with closing(SYSTEMS[system](known)) as found:
        for count, results, seconds in found:
            tokens = sum(sum(result["output_lens"]) for result in results)
            row = {"system": system, "models": count, "budget_gib": budget_gib}
            row["held_gib"] = gib = round(held() / 2**30, 3)
            row["output_tokens_per_s"] = round(tokens / seconds, 1)
            table.add({**row, **machine()})
            tqdm.write("  ".join(map(str, row.values())))
            if gib > budget_gib:
                break


def main() -> None:
    """Measure both systems, one after the other."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end too
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--memory-gib", type=float, default=8)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output_dir / "capacity.csv"
    table = Table(path, ("system", "models"), COLUMNS)
    for system in SYSTEMS:
        measure(table, system, arguments.memory_gib)


if __name__ == "__main__":
    main()
