# SPDX-License-Identifier: Apache-2.0
"""The results of the demo as one picture."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def picture(results: dict[str, Any]) -> Figure:
    """Who knows which task, what the models weigh, how fast the server answers.

    Args:
        results: as demo.py writes them to results.json.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    known, weight, speed = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    scores = results["exact_match"]
    tasks = list(scores["base"])
    shares = [[scores[model][task] for task in tasks] for model in scores]
    known.imshow(shares, cmap="Blues", vmin=0, vmax=1.3, aspect="auto")
    known.set_xticks(range(len(tasks)), tasks)
    known.set_yticks(range(len(scores)), list(scores))
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            color = "white" if share > 0.5 else "black"
            known.text(x, y, f"{share:.0%}", ha="center", va="center", color=color)
    known.set(title="exact match", xlabel="task asked", ylabel="model asked")
    megabytes = {
        f"{len(tasks) + 1} whole\nmodels": results["megabytes_of_whole_models"],
        f"base and\n{len(tasks)} deltas": results["megabytes_served"],
    }
    bars(weight, "weights, MB", megabytes)
    speeds = results["output_tokens_per_s"]
    bars(
        speed,
        "output tokens/s",
        {n.replace(" mixed", "\nmixed"): s for n, s in speeds.items()},
    )
    return figure


def bars(axes: Axes, title: str, values: dict[str, float]) -> None:
    """A bar for each value, with its number on top."""
    drawn = axes.bar(list(values), list(values.values()), width=0.6)
    axes.bar_label(drawn, fmt="{:.0f}")
    axes.set(title=title, ylim=(0, 1.15 * max(values.values())))
    axes.spines[["top", "right"]].set_visible(False)
