# SPDX-License-Identifier: Apache-2.0
"""The tables of servers: traffic, ways to serve, and how many fit."""

from benchmarks.documents.rows import table
from benchmarks.table import Row

TIMES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
TIME_HEADS = ["TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p99"]


def measured(row: Row) -> list[str]:
    """Tokens per second, times and goodput of a row under load."""
    cells = [f"{float(row['output_tokens_per_s']):.1f}"]
    cells += [f"{float(row[key]):.0f}" for key in TIMES]
    return [*cells, f"{float(row['goodput_per_s']):.2f}"]


def found(row: Row) -> str:
    """Share of a row's requests whose delta was resident; rows of old have none."""
    return f"{float(row['hits']):.0%}" if row.get("hits") else "-"


def serving_table(rows: list[Row]) -> str:
    """One line for each traffic; arrivals in bursts and at random for one law only."""
    body = [
        [row["popularity"], row["models"], row["arrivals"], *measured(row), found(row)]
        for row in rows
        if row["arrivals"] == "closed" or row["popularity"] in ("identical", "zipf:1")
    ]
    head = ["popularity", "models", "arrivals", "tokens/s", *TIME_HEADS, "goodput/s"]
    return table([*head, "resident"], body)


def compare_table(rows: list[Row]) -> str:
    """One line for each way to serve."""
    body = [[row["system"], row["weights_mb"], *measured(row)] for row in rows]
    return table(["system", "weights, MB", "tokens/s", *TIME_HEADS, "goodput/s"], body)


def capacity_table(rows: list[Row]) -> str:
    """One line for each number of models, and whether the memory is enough for it."""
    body = [
        [row["system"], row["models"], f"{held:.2f}", "yes" if fits else "no"]
        for row in rows
        for held in [float(row["held_gib"])]
        for fits in [held <= float(row["budget_gib"])]
    ]
    return table(["system", "models", "memory, GiB", "fits"], body)


def router_table(rows: list[Row]) -> str:
    """Where requests found their delta, behind a router."""
    body = [
        [f"`{row['policy']}`"]
        + [f"{float(row[key]):.1%}" if row[key] else "" for key in row if "hits" in key]
        + [row["copies"]]
        for row in rows
    ]
    head = ["`--policy`", "hits, counted", "`dqrelo plan`'s simulation"]
    return table([*head, "copies by each replica"], body)
