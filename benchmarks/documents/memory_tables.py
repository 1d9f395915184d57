# SPDX-License-Identifier: Apache-2.0
"""The tables of memory: what was measured, and what ``dqrelo plan`` counts."""

from typing import Any

from benchmarks.documents.rows import table
from benchmarks.table import Row


def memory_table(rows: list[Row]) -> str:
    """The paper's Table 4: memory and a step, by the number of models."""
    steps = {(row["system"], row["models"]): float(row["step_ms"]) for row in rows}
    body = []
    for row in rows:
        step = steps[row["system"], row["models"]]
        whole = steps["full copies", row["models"]]
        body.append(
            [
                row["system"],
                row["models"],
                f"{float(row['memory_mb']):.0f}",
                f"{step:.0f}",
            ]
            + [f"{step / whole:.2f}"]
        )
    head = ["way", "models", "memory, MB", "step, ms", "step / full copies'"]
    return table(head, body)


def bytes_table(rows: list[Row]) -> str:
    """What the deltas took, and what ``dqrelo plan`` counts for them."""
    body = []
    for row in rows:
        if row["system"] == "deltas":
            expected = float(row["predicted_mb"])
            places = [float(row[f"{tier}_mb"]) for tier in ("disk", "host", "device")]
            worst = max(abs(place / expected - 1) for place in places)
            body.append(
                [row["models"], f"{expected:.1f}"]
                + [f"{place:.1f}" for place in places]
                + [f"{worst:.1%}"]
            )
    head = ["deltas", "predicted, MB", "on disk", "in host memory", "on the device"]
    return table([*head, "largest difference"], body)


def bases_table(rows: list[Row]) -> str:
    """What bases took on the CPU, and what ``dqrelo plan`` counts for them."""
    keys, body = ("weights_mb", "predicted_mb", "measured_mb"), []
    for row in rows:
        weights, predicted, measured = (float(row[key]) for key in keys)
        sizes = (f"{size:.1f}" for size in (weights, predicted, measured))
        body.append([row["base"], *sizes, f"{abs(measured / predicted - 1):.1%}"])
    head = ["base", "weights, MB", "predicted", "in the process", "difference"]
    return table(head, body)


def workers_table(rows: list[Row]) -> str:
    """What one worker holds, alone and beside another."""
    keys = ("base_mb", "base_of_one", "delta_mb", "delta_of_one")
    body = [[row["workers"], *(row[key] for key in keys)] for row in rows]
    head = ["workers", "base, MB", "/ one worker's", "a delta, MB", "/ one worker's"]
    return table(head, body)


def cards_table(rows: list[Row]) -> str:
    """How many models one card holds, by ``dqrelo plan``."""
    body = [
        [row["stored_as"], f"{float(row['model_gb']):.2f}", row["models"]]
        for row in rows
    ]
    return table(
        ["fine-tunes of an 8B model as", "GB each", "on a card of 80 GB"], body
    )


def plan_table(found: dict[str, Any]) -> str:
    """What ``dqrelo plan --json`` said."""
    cases = list(found["cases"].values())
    rows = {
        "resident_per_gpu": ("resident on each GPU", "{}"),
        "device": ("requests that find theirs on the device", "{:.1%}"),
        "gpus_for_hit_rate": (f"GPUs for {found['fleet']['hit_rate']:.0%}", "{}"),
        "gpus_for_all": ("GPUs that hold all models", "{}"),
    }
    body = [
        [label, *("-" if c[key] is None else form.format(c[key]) for c in cases)]
        for key, (label, form) in rows.items()
    ]
    return table(["", *found["cases"]], body)
