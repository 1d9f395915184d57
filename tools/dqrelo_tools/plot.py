# SPDX-License-Identifier: Apache-2.0
"""The error of each layer, as a picture."""

import os
import re
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from dqrelo_tools.extras import require
from dqrelo_tools.report import Entry, Report, relative_error
from vllm_dqrelo.format.errors import DqreloError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
MARKERS = "osD^v<>pX*"


def require_plot(path: Path) -> None:
    """Refuse what would fail when the picture is saved, before the work."""
    require("matplotlib", "--plot")
    if path.suffix not in SUFFIXES:
        raise DqreloError(f"--plot {path}: expected a name in {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise DqreloError(f"--plot {path}: {path.parent} is not a folder")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DqreloError(f"--plot {path} cannot be written; choose another name")


def plot(report: Report, path: Path) -> None:
    """Save the picture of ``report``; see :func:`figure`."""
    figure(report).savefig(path, dpi=150)


def figure(report: Report) -> "Figure":
    """Relative error over layers, one line for each type of module.

    Matrices that belong to no layer, such as embeddings, are points with their names
    to the right of the last layer.
    """
    from matplotlib.figure import Figure

    matrices = [entry for entry in report.entries if entry.kind == "matrix"]
    lines: dict[str, dict[int, float]] = {}
    points: dict[str, float] = {}
    for entry in matrices:
        layer, error = layer_of(entry), relative_error([entry])
        if layer is None:
            points[entry.module] = error
        else:
            lines.setdefault(entry.module, {})[layer] = error
    drawn = Figure(figsize=(10, 5), layout="constrained")
    axes = drawn.subplots()
    for (module, line), marker in zip(lines.items(), cycle(MARKERS), strict=False):
        layers = sorted(line)
        errors = [line[layer] for layer in layers]
        axes.plot(layers, errors, marker=marker, markersize=5, label=module)
    count = 1 + max((max(line) for line in lines.values()), default=-1)
    step = 1 + count // 20
    for x, (module, error) in enumerate(points.items()):
        place = (count + (x + 1) * step, error)
        axes.plot(*place, "kd")
        axes.annotate(f"{module}  ", place, rotation=90, ha="center", va="top")
    axes.set_xticks(range(0, count, step))
    axes.set(xlabel="layer", ylabel="‖change − delta‖ / ‖change‖", ylim=(0, None))
    axes.grid(alpha=0.3)
    overall = relative_error(matrices)
    axes.set_title(f"Relative error of each matrix; {overall:.3f} over all")
    if lines:
        drawn.legend(loc="outside right upper")
    return drawn


def layer_of(entry: Entry) -> int | None:
    """3 of ``model.layers.3.self_attn.q_proj.weight``; None outside the layers."""
    found = re.search(r"\.(\d+)\.", entry.name)
    return int(found[1]) if found else None
