# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/reliability.md: what fuzz.py and soak.py found."""

from collections.abc import Mapping
from typing import Any

from benchmarks.documents.rows import table
from benchmarks.table import Row

WRONG = (
    "answers that were wrong, requests that were stuck, left in the server afterwards, "
    "or failed for another reason than below"
)
LARGEST = "largest difference of a logprob"
REFUSED = "refused while unloaded or replaced"
TIERS = ("deltas read", "evicted from the device", "dropped from memory")
MEMORY = "memory of all processes, median of the second and of the last quarter, MiB"


def fuzz_table(rows: list[Row]) -> str:
    """One line a kind of mutation, and what the process took."""
    keys = ("mutation", "cases", "refused", "same", "another", "faults")
    head = ["mutation", "cases", "refused", "the same", "another", "faults"]
    (total,) = (row for row in rows if row["mutation"] == "all")
    first, half_way, end = (
        total[f"memory_{when}_mib"] for when in ("first", "half_way", "end")
    )
    return (
        f"{table(head, [[row[key] for key in keys] for row in rows])}\n\n"
        f"Memory of the process: {first} MiB at first, {half_way} MiB half-way, "
        f"{end} MiB at the end.\n"
        f"Seed {total['seed']}, on {measured_on(total)}."
    )


def fuzz_server_table(rows: list[Row]) -> str:
    """One line a kind of mutation, and what the server took."""
    keys = ("mutation", "cases", "refused", "answered", "faults")
    (total,) = (row for row in rows if row["mutation"] == "all")
    half_way, end = (total[f"memory_{when}_mib"] for when in ("half_way", "end"))
    return (
        f"{table([*keys], [[row[key] for key in keys] for row in rows])}\n\n"
        f"Memory of the server's processes: {half_way} MiB half-way, {end} MiB at the "
        f"end.\nSeed {total['seed']}, on {measured_on(total)}."
    )


def versions_table(rows: list[Row]) -> str:
    """What the tests say of each release of vLLM, with each of its model runners."""
    said: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        failed = int(row["failed"]) + int(row["errors"])
        found = "refused" if failed else f"{row['passed']} tests pass"
        about = row["vllm"], row["torch"].partition("+")[0], row["transformers"]
        said.setdefault((*about, row["build"]), {})[row["runner"]] = found
    newest = sorted(said, key=lambda about: release(about[0]), reverse=True)
    body = [
        [*about, *(said[about].get(r, "") for r in ("V1", "V2"))] for about in newest
    ]
    return table(["vLLM", "torch", "transformers", "build", "V1", "V2"], body)


def release(version: str) -> tuple[int, ...]:
    """A version as numbers, to sort by."""
    return tuple(map(int, version.split(".")))


def soak_table(found: Mapping[str, Any]) -> str:
    """What its clients asked, what they got and what the server did for it."""

    def of(*keys: str) -> str:
        return ", ".join(f"{found[key]:.0f}" for key in keys)

    answers = f"{of('whole')} whole, {of('streamed')} streamed"
    body = [
        ["answers completed and compared", f"{of('completed')} ({answers})"],
        ["their tokens", of("tokens compared")],
        [WRONG, of("problems")],
        [LARGEST, f"{found[LARGEST]:.1e}"],
        ["streams cancelled by the client", of("cancelled")],
        ["requests given up within half a second", of("timed out")],
        ["clients killed, with four streams each", of("clients killed")],
        [f"{REFUSED}, with a reason", of(REFUSED)],
        ["folders replaced and loaded again", of("folders replaced")],
        ["loads, unloads over HTTP", of("loads", "unloads")],
        [", ".join(TIERS), of(*TIERS)],
        [MEMORY, of("memory_second_quarter_mib", "memory_last_quarter_mib")],
    ]
    return (
        f"{table(['', 'measured'], body)}\n\n"
        f"{found['minutes']:g} minutes on {measured_on(found)}."
    )


def measured_on(found: Mapping[str, Any]) -> str:
    """The machine and the versions of a result."""
    return (
        f"{found['cores']} cores ({found['cpu']}), torch {found['torch']}, "
        f"transformers {found['transformers']}, vLLM {found['vllm']}"
    )
