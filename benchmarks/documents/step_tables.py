# SPDX-License-Identifier: Apache-2.0
"""The tables of a step's milliseconds."""

from benchmarks.documents.rows import table
from benchmarks.table import Row


def cpu_table(rows: list[Row]) -> str:
    """Milliseconds of a step, and how they compare."""
    times = ("native", "torch", "base", "lora", "copy")
    body = [
        [
            row["method"],
            row["rows"].replace("+", " + "),
            *(row[f"{key}_ms"] for key in times),
            f"{float(row['native_ms']) / float(row['base_ms']):.2f}",
            f"{float(row['native_ms']) / float(row['lora_ms']):.2f}",
            f"{float(row['native_ms']) / float(row['copy_ms']):.1f}",
        ]
        for row in rows
    ]
    head = ["method", "rows of each delta", "native", "torch", "base", "LoRA", "copy"]
    return table([*head, "native / base", "native / LoRA", "native / copy"], body)


def lanes_table(rows: list[Row]) -> str:
    """The CPU's ways to compute, and the build before, as parts of one another."""
    body = [
        [row["rows"].replace("+", " + ")]
        + [
            f"{float(row['now_ms']) / float(row[other]):.2f}"
            for other in ("amx_ms", "before_ms")
        ]
        for row in rows
    ]
    return table(["rows of each delta", "now / by AMX", "now / before"], body)


def vectors_table(rows: list[Row]) -> str:
    """The build without a matrix unit as a part of the one before."""
    body = [
        [row["rows"].replace("+", " + ")]
        + [f"{float(row['now_ms']) / float(row['before_ms']):.2f}"]
        for row in rows
    ]
    return table(["rows of each delta", "now / before"], body)


def amx_table(rows: list[Row]) -> str:
    """The time by AMX as a part of that by tiles, the two by turns."""
    ratios = [
        [row["rows"].replace("+", " + ")]
        + [f"{float(row['amx_ms']) / float(row['tiles_ms']):.2f}"]
        for row in rows
    ]
    return table(["rows of each delta", "time by AMX / by tiles"], ratios)


def roofline_table(rows: list[Row]) -> str:
    """What roofline.py predicts of the linear layers of a step."""
    shape = ("device", "deltas", "rows_per_delta")
    half = {
        tuple(row[key] for key in shape): row
        for row in rows
        if float(row["ratio"]) == 1 / 16
    }
    body = []
    for row in rows:
        prompt = int(row["rows_per_delta"]) > 16
        if float(row["ratio"]) != 1 / 8 or (prompt and row["device"] != "H100"):
            continue
        case = tuple(row[key] for key in shape)
        both = [half[case], row]
        body.append(
            [*case, row["base_ms"], *(r["delta_ms"] for r in both)]
            + [r["merged_ms"] if prompt else "" for r in both]
        )
    head = ["device", "deltas", "rows of each", "base, ms", "deltas of 1/16, ms"]
    head += ["of 1/8, ms", "both, merged, at 1/16, ms", "at 1/8, ms"]
    return table(head, body)
