# SPDX-License-Identifier: Apache-2.0
"""The figures in docs/figures and the tables of docs/benchmarks.md, from results/.

    python benchmarks/figures.py

A table stands between two comments that name it and is replaced as a whole.
"""

import csv
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from statistics import correlation

from matplotlib import rcParams
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
OURS, PAPER = "dqrelo 1/8", "dqrelo-paper 1/8"

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of a results file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def geometric_mean(values: list[float]) -> float:
    """exp of the mean logarithm."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def put(name: str, text: str) -> None:
    """Replace the table ``name`` of docs/benchmarks.md."""
    path = DOCS / "benchmarks.md"
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    old = path.read_text()
    if not pattern.search(old):
        raise SystemExit(f"{path} has no table {name}")
    path.write_text(pattern.sub(f"{begin}\n{text}\n{end}", old))


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


def convert_table(rows: list[Row]) -> str:
    """Seconds and memory of conversions."""
    keys = ("model", "method", "seconds", "peak_mib")
    head = ["model", "method", "seconds", "peak memory, MiB"]
    return table(head, [[row[key] for key in keys] for row in rows])


def cpu_table(rows: list[Row]) -> str:
    """Milliseconds of a step, and how they compare."""
    body = [
        [
            row["method"],
            row["rows"].replace("+", " + "),
            *(row[key] for key in ("native_ms", "torch_ms", "lora_ms", "copy_ms")),
            f"{float(row['native_ms']) / float(row['lora_ms']):.2f}",
            f"{float(row['native_ms']) / float(row['copy_ms']):.1f}",
        ]
        for row in rows
    ]
    head = ["method", "rows of each delta", "native", "torch", "LoRA", "copy"]
    return table([*head, "native / LoRA", "native / copy"], body)


TIMES = ("ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms")
TIME_HEADS = ["TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "ITL p99"]


def measured(row: Row) -> list[str]:
    """Tokens per second, times and goodput of a row under load."""
    cells = [f"{float(row['output_tokens_per_s']):.1f}"]
    cells += [f"{float(row[key]):.0f}" for key in TIMES]
    return [*cells, f"{float(row['goodput_per_s']):.2f}"]


def serving_table(rows: list[Row]) -> str:
    """One line for each traffic."""
    body = [
        [row["popularity"], row["models"], row["arrivals"], *measured(row)]
        for row in rows
    ]
    head = ["popularity", "models", "arrivals", "tokens/s", *TIME_HEADS, "goodput/s"]
    return table(head, body)


def compare_table(rows: list[Row]) -> str:
    """One line for each way to serve."""
    body = [[row["system"], row["weights_mb"], *measured(row)] for row in rows]
    return table(["system", "weights, MB", "tokens/s", *TIME_HEADS, "goodput/s"], body)


def serving_figure(rows: list[Row]) -> Figure:
    """Throughput and time to first token against models, one line a popularity law."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = zip(
        figure.subplots(1, 2),
        ("closed", "poisson"),
        ("output_tokens_per_s", "ttft_p99_ms"),
        ("output tokens per second", "time to first token, p99, ms"),
        strict=True,
    )
    for axes, arrivals, key, label in panels:
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            if row["arrivals"] == arrivals:
                point = int(row["models"]), float(row[key])
                lines[row["popularity"]].append(point)
        (alone,) = lines.pop("identical", [None])
        for (law, points), marker in zip(lines.items(), "osD^v<>pX*hP", strict=False):
            shown = sorted([*([alone] if alone else []), *points])
            axes.plot(*zip(*shown, strict=True), marker=marker, label=law)
        axes.set(
            xlabel="models", ylabel=label, ylim=(0, None), title=f"arrivals: {arrivals}"
        )
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    axes.legend()
    return figure


def quality_figure(rows: list[Row], fine_tunes: set[str]) -> Figure:
    """KL against bits a weight; a line for each method with several sizes."""
    methods = by_method(rows, fine_tunes)
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, found in methods.items():
        family = re.sub(r" \d+/\d+$", "", name)
        lines[family].append((mean(found, "bits_per_weight"), kl(found)))
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    markers = iter("osD^v<>pX*hP+x1234|_" * 2)
    shown = {"dqrelo", "dqrelo-paper", "SVD", "BitDelta", "BitDelta, scale per row"}
    shown |= {"mixed-precision SVD", "2-bit Lloyd per row", "low-rank int4 alone"}
    for family, points in sorted(lines.items(), key=lambda pair: -len(pair[1])):
        if family in shown:
            points.sort()
            axes.plot(*zip(*points, strict=True), marker=next(markers), label=family)
    axes.set(xlabel="bits per weight", ylabel="KL(fine-tune ‖ compressed) per token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_title(f"Quality against bytes: {', '.join(sorted(fine_tunes))}")
    figure.legend(loc="outside right upper")
    return figure


def length_figure(rows: list[Row], scales: list[Row]) -> Figure:
    """KL against the length of training, one line a method."""
    steps = {row["fine_tune"]: int(row["steps"]) for row in scales}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for (name, found), marker in zip(
        by_method(rows, set(steps)).items(), "osD^v<>pX*hP", strict=False
    ):
        at: dict[int, list[Row]] = defaultdict(list)
        for row in found:
            at[steps[row["fine_tune"]]].append(row)
        lengths = sorted(at)
        axes.plot(lengths, [kl(at[n]) for n in lengths], marker=marker, label=name)
    axes.set(xlabel="steps of training", ylabel="KL(fine-tune ‖ compressed) per token")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_title("Longer training, larger changes: geometric mean over three tasks")
    figure.legend(loc="outside right upper")
    return figure


def main() -> None:
    """Make all of them again."""
    rcParams["svg.hashsalt"] = "dqrelo"  # the same bytes every time
    scales = read("finetunes.csv")
    scales.sort(key=lambda row: (int(row["steps"]), row["fine_tune"]))
    rows = read("quality.csv")
    fine_tunes = {row["fine_tune"] for row in scales}
    counts = Counter(row["fine_tune"] for row in rows)
    detailed = {name for name in fine_tunes if counts[name] == max(counts.values())}
    put("scale", scale_table(scales))
    put("fine-tunes", fine_tune_table(rows, scales))
    put("methods", method_table(rows, fine_tunes))
    put("sizes", method_table(rows, detailed, seconds=True))
    put("convert", convert_table(read("convert.csv")))
    put("cpu", cpu_table(read("cpu.csv")))
    put("predictions", prediction_table(rows, read("predicted.csv")))
    put("serving", serving_table(read("serving.csv")))
    put("serving-compare", compare_table(read("serving_compare.csv")))
    folder = DOCS / "figures"
    folder.mkdir(exist_ok=True)
    metadata = {"Date": None}
    quality_figure(rows, detailed).savefig(folder / "quality.svg", metadata=metadata)
    length_figure(rows, scales).savefig(folder / "length.svg", metadata=metadata)
    serving = serving_figure(read("serving.csv"))
    serving.savefig(folder / "serving.svg", metadata=metadata)


if __name__ == "__main__":
    main()
