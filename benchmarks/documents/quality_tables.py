# SPDX-License-Identifier: Apache-2.0
"""The tables of fine-tunes and of what compression keeps of them."""

import math
import re
from collections import Counter, defaultdict
from fractions import Fraction
from statistics import correlation
from typing import Any

from benchmarks.documents.rows import read, table
from benchmarks.table import Row
from dqrelo_tools.cost import TYPICAL_KL

OURS, PAPER = "dqrelo 1/8", "dqrelo-paper 1/8"
PRESETS = ("dqrelo 1/8", "dqrelo 1/16", "dqrelo 1/32")


def fine_tunes() -> list[Row]:
    """The fine-tunes, the shortest training first."""
    return sorted(
        read("finetunes.csv"), key=lambda row: (int(row["steps"]), row["fine_tune"])
    )


def complete(rows: list[Row]) -> set[str]:
    """The fine-tunes that every method of the README's table was measured on."""
    return {row["fine_tune"] for row in rows if row["method"] == "BitDelta"}


def of_lengths(scales: list[Row]) -> set[str]:
    """The fine-tunes that differ in the length of training only."""
    names = {row["fine_tune"] for row in scales}
    return {name for name in names if re.fullmatch(r"orders-(10|30|90)", name)}


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
            *([f"{mean(found, 'cpu_seconds'):.0f}"] if seconds else []),
        ]
        for name, found in sorted(methods.items(), key=lambda pair: kl(pair[1]))
    ]
    head = ["method", "bits/weight", "relative error", "KL", "KL / paper's"]
    head += ["top-1", "exact match"] + ["CPU seconds"] * seconds
    return table(head, body)


def quality_table(rows: list[Row], scales: list[Row], fine_tunes: set[str]) -> str:
    """Bytes and KL of a few methods, for the README."""
    methods = by_method(rows, fine_tunes)
    names = (OURS, "dqrelo 1/16", PAPER, "SVD 1/8", "BitDelta")
    body = [
        [name, f"{mean(methods[name], 'bits_per_weight'):.2f}"]
        + [f"{kl(methods[name]):.2e}", f"{kl(methods[name]) / kl(methods[PAPER]):.3f}"]
        + [f"{mean(methods[name], 'exact_match'):.0%}"]
        for name in names
    ]
    own = [row for row in scales if row["fine_tune"] in fine_tunes]
    body.append(["the fine-tunes", "16", "0", "0", f"{mean(own, 'exact_match'):.0%}"])
    head = ["method", "bits per weight", "KL", "KL / the published method's"]
    return table([*head, "exact match"], body)


def fine_tune_table(rows: list[Row], scales: list[Row]) -> str:
    """One line a fine-tune: the paper's method, and ours at three sizes relative to it.

    On text of the task, and on other text.
    """
    found = {(row["fine_tune"], row["method"]): row for row in rows}
    body, ratios = [], []
    for scale in scales:
        name = scale["fine_tune"]
        own = [found[name, method] for method in (PAPER, *PRESETS)]
        cells, values = [name, f"{float(scale['exact_match']):.0%}"], []
        cells += [f"{float(row['exact_match']):.0%}" for row in own]
        for column in ("kl", "kl_off_task"):
            paper, *ours = (float(row[column]) for row in own)
            values += [value / paper for value in ours]
            cells += [f"{paper:.2e}", *(f"{value / paper:.3f}" for value in ours)]
        body.append(cells)
        ratios.append(values)
    for label, of_all in (("geometric mean", geometric_mean), ("largest", max)):
        cells = [f"{of_all(list(column)):.3f}" for column in zip(*ratios, strict=True)]
        body.append([label, *[""] * 5, "", *cells[:3], "", *cells[3:]])
    sizes = [name.removeprefix("dqrelo ") for name in PRESETS]
    head = ["fine-tune", "exact match", "paper 1/8", *sizes]
    head += ["KL, paper 1/8", *sizes, "other text: KL, paper 1/8", *sizes]
    return table(head, body)


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


def kl_prediction_table(rows: list[Row], scales: list[Row]) -> str:
    """Shares of the base's KL that ``dqrelo advise`` expects, and measured ones."""
    of_base = {row["fine_tune"]: float(row["kl_of_base"]) for row in scales}
    body, everything = [], []
    for method in PRESETS:
        expected = TYPICAL_KL[float(Fraction(method.removeprefix("dqrelo ")))]
        found = [
            float(row["kl"]) / of_base[row["fine_tune"]]
            for row in rows
            if row["method"] == method and not row["fine_tune"].endswith("-lora")
        ]
        everything += [(math.log(expected), math.log(share)) for share in found]
        cells = [geometric_mean(found), min(found), max(found)]
        body.append(
            [method, str(len(found)), *(f"{one:.3%}" for one in (expected, *cells))]
        )
    head = ["ratio", "full fine-tunes", "predicted", "measured", "least", "most"]
    value = correlation(*zip(*everything, strict=True))
    text = table(head, body)
    return f"{text}\n\nCorrelation of the logarithms of all pairs: {value:.2f}."


def strength_table(rows: list[Row]) -> str:
    """KL of low-rank parts as fitted, and with limits of strength."""
    limits = dict.fromkeys(row["limit"] for row in rows if row["limit"] != "1")
    heads = {limit: f"at most {limit}" for limit in limits}
    return relative_table(rows, "limit", "1", heads)


def halves_table(rows: list[Row]) -> str:
    """KL of low-rank parts fitted at once, and of others in halves."""
    heads = {which: f"{which} in halves" for which in ("embedding", "all")}
    return relative_table(rows, "in_halves", "none", heads)


def shares_table(rows: list[Row]) -> str:
    """KL at one ratio for all matrices, and with shares for embedding and LM head."""
    shares = sorted({row["most_of_tokens"] for row in rows} - {"1"}, reverse=True)
    heads = {share: f"share {float(share):.0%}" for share in shares}
    return relative_table(rows, "most_of_tokens", "1", heads, means=False)


def relative_table(
    rows: list[Row], choice: str, first: str, heads: dict[str, str], means: bool = True
) -> str:
    """KL on the task and on other text: of one choice, and of others relative to it.

    Args:
        choice: the column that names a row's choice.
        first: the choice that the others are relative to.
        heads: the other choices -> what stands above them.
        means: whether the fine-tunes of a ratio have their geometric mean below them.
    """
    found: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["ratio"], row["fine_tune"]][row[choice]] = row
    body: list[list[str]] = []
    values: dict[str, list[list[float]]] = defaultdict(list)
    for (ratio, name), some in sorted(found.items(), key=lambda one: -float(one[0][0])):
        numbers, cells = [], []
        for column in ("kl", "kl_off_task"):
            same = float(some[first][column])
            less = {o: float(some[o][column]) / same for o in heads if o in some}
            numbers += [same, *less.values()]
            cells += [
                f"{same:.2e}",
                *(f"{less[o]:.2f}" if o in less else "" for o in heads),
            ]
        body.append([ratio, name, *cells])
        values[ratio].append(numbers)
    for ratio, some_values in values.items() if means else ():
        mean = [geometric_mean(list(v)) for v in zip(*some_values, strict=True)]
        cells = [
            f"{v:.2f}" if i % (len(heads) + 1) else f"{v:.2e}"
            for i, v in enumerate(mean)
        ]
        body.append([ratio, "geometric mean", *cells])
    head = ["ratio", "fine-tune", "KL, task", *heads.values()]
    return table([*head, "KL, other text", *heads.values()], body)


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
    head = ["model", "by", "method", "ratio", "seconds", "peak memory, MiB"]
    body = []
    for row in rows:
        ratio = str(Fraction(float(row["ratio"])))
        case = [row["model"], f"`{row['way']}`", row["method"], ratio]
        body.append([*case, row["seconds"], row["peak_mib"]])
    return table(head, body)


def demo_table(found: dict[str, Any]) -> str:
    """Exact match of every model on every task, and how long it took."""
    scores, sizes = found["exact_match"], found["megabytes_of_fine_tune_and_delta"]
    tasks = list(scores["base"])
    body = []
    for model, score in scores.items():
        cells = [f"{score[task]:.0%}" for task in tasks]
        if model in sizes:
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
