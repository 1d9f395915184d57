# SPDX-License-Identifier: Apache-2.0
"""Every figure in docs/figures and every table and number of README and docs.

    python -m benchmarks.documents.figures

All of them come from the files in results/: what a benchmark measured anew is in the
documents after this.
"""

import re
from collections import defaultdict

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.documents.documents import DOCUMENTS, rewritten
from benchmarks.documents.quality_tables import (
    by_method,
    detailed,
    fine_tunes,
    kl,
    mean,
    of_lengths,
)
from benchmarks.documents.rows import read
from benchmarks.documents.tables import tables
from benchmarks.paths import ROOT
from benchmarks.table import Row

FIGURES = ROOT / "docs" / "figures"


def serving_figure(rows: list[Row]) -> Figure:
    """Throughput and time to first token against models, one line a popularity law.

    A law has one colour in all panels. The point of one model has one law only,
    "identical", and all lines begin there.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    laws = dict.fromkeys(row["popularity"] for row in rows)
    laws.pop("identical", None)
    styles = {
        law: {"color": f"C{i}", "marker": marker}
        for i, (law, marker) in enumerate(zip(laws, "osD^v<>pX*hP", strict=False))
    }
    panels = zip(
        figure.subplots(1, 2),
        ("closed", "poisson"),
        ("output_tokens_per_s", "ttft_p99_ms"),
        ("output tokens per second", "time to first token, p99, ms"),
        strict=True,
    )
    shown = {}
    for axes, arrivals, key, label in panels:
        lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for row in rows:
            if row["arrivals"] == arrivals:
                point = int(row["models"]), float(row[key])
                lines[row["popularity"]].append(point)
        alone = lines.pop("identical", [])
        for law, points in lines.items():
            x, y = zip(*sorted(alone + points), strict=True)
            (shown[law],) = axes.plot(x, y, label=law, **styles[law])
        axes.set(ylabel=label, ylim=(0, None), title=f"arrivals: {arrivals}")
        count_models(axes, "models", rows)
        label_ends(axes)
    found = [shown[law] for law in laws if law in shown]
    figure.legend(handles=found, loc="outside lower center", ncols=len(found))
    return figure


def label_ends(axes: Axes) -> None:
    """Write the name of each line where it ends, one name above another."""
    left, right = axes.get_xlim()
    axes.set_xlim(right=right * (right / left) ** 0.25)  # room for the names
    height, least = 0.05 * axes.get_ylim()[1], 0.0
    for line in sorted(axes.lines, key=lambda line: line.get_ydata()[-1]):
        x, y = line.get_xydata()[-1]
        least = max(y, least + height)
        axes.annotate(
            line.get_label(),
            (x, least),
            (8, 0),
            textcoords="offset points",
            va="center",
        )


def count_models(axes: Axes, label: str, rows: list[Row]) -> None:
    """Let the x axis count models: 1, 2, 4, ... at equal distances."""
    counts = sorted({int(row["models"]) for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)


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
    lengths = sorted(steps[name] for name in of_lengths(scales))
    for (name, found), marker in zip(
        by_method(rows, of_lengths(scales)).items(), "osD^v<>pX*hP", strict=False
    ):
        at: dict[int, list[Row]] = defaultdict(list)
        for row in found:
            at[steps[row["fine_tune"]]].append(row)
        axes.plot(lengths, [kl(at[n]) for n in lengths], marker=marker, label=name)
    axes.set(xlabel="steps of training", ylabel="KL(fine-tune ‖ compressed) per token")
    axes.set_xscale("log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.set_title("Longer training, larger changes: orders")
    figure.legend(loc="outside right upper")
    return figure


def memory_figure(rows: list[Row]) -> Figure:
    """Memory and tokens per second against the number of models, a line each way."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    systems = dict.fromkeys(row["system"] for row in rows)
    for system, marker in zip(systems, "o^sD", strict=True):
        mine = [row for row in rows if row["system"] == system]
        models = [int(row["models"]) for row in mine]
        held = [float(r["memory_mb"]) / 1000 for r in mine]
        memory.plot(models, held, marker=marker, label=system)
        tokens = [1000 * int(r["models"]) / float(r["step_ms"]) for r in mine]
        speed.plot(models, tokens, marker=marker, label=system)
    for axes, label in ((memory, "weights, GB"), (speed, "tokens per second")):
        axes.set(ylabel=label, ylim=(0, None))
        count_models(axes, "fine-tunes served", rows)
    memory.legend()
    figure.suptitle(
        "SmolLM2-135M, bfloat16, two CPU cores, one sequence for each model"
    )
    return figure


def capacity_figure(rows: list[Row]) -> Figure:
    """What servers hold against the number of models, and the memory that there is."""
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        lines[row["system"]].append((int(row["models"]), float(row["held_gib"])))
    for (system, points), marker in zip(lines.items(), "os", strict=True):
        axes.plot(*zip(*points, strict=True), marker=marker, label=system)
    budget = float(rows[0]["budget_gib"])
    axes.axhline(budget, color="black", linestyle=":", label=f"{budget:g} GiB")
    axes.set(ylabel="memory, GiB", ylim=(0, None))
    count_models(axes, "fine-tunes served", rows)
    axes.set_title("SmolLM2-135M, bfloat16: what all processes of the servers hold")
    axes.legend(loc="lower right")
    return figure


def figures() -> dict[str, Figure]:
    """All of them, by name."""
    rows, scales = read("quality.csv"), fine_tunes()
    return {
        "quality": quality_figure(rows, detailed(rows)),
        "length": length_figure(rows, scales),
        "serving": serving_figure(read("serving.csv")),
        "memory": memory_figure(read("memory.csv")),
        "capacity": capacity_figure(read("capacity.csv")),
    }


def main() -> None:
    """Make all of them again."""
    found = tables()
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text(), found))
    rcParams["svg.hashsalt"] = "dqrelo"  # the same bytes every time
    FIGURES.mkdir(exist_ok=True)
    for name, figure in figures().items():
        figure.savefig(FIGURES / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
