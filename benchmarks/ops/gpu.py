# SPDX-License-Identifier: Apache-2.0
"""Time the delta linear on the layers of Llama-3-8B against memory and against others.

For each linear layer, number of distinct deltas in a step and rows per delta: the
median time of one ``dqrelo::delta_linear_`` (both of its kernels) with a cold L2,
beside what the device needs to copy the bytes that it must move, as a copy does it
here, what else could do the work (rivals.py), and what roofline.py predicts for this
device. An op that disagrees with the reference is not timed. A shape that the results
have is not measured again. ``--tiny`` rehearses it, in Triton's interpreter, too.

    python -m benchmarks.ops.gpu
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib import pyplot
from tqdm import tqdm

from benchmarks.machine import MACHINE, machine
from benchmarks.ops.device import (
    DEVICE,
    HAS_GPU,
    NAME,
    copy_bytes_per_s,
    median_us,
)
from benchmarks.ops.linear_site import FACTORS, LINEARS, TINY, Site
from benchmarks.ops.rivals import RIVALS, Step
from benchmarks.ops.roofline import DEVICES, predict
from benchmarks.paths import RESULTS
from benchmarks.table import Table
from dqrelo_kernels import reference

KEYS = ("device", "linear", "deltas", "rows_per_delta", "ratio", "factors")
COLUMNS = (*KEYS, "ranks", "us", "copy_us", "of_copy")
COLUMNS += tuple(f"{rival.__name__}_us" for rival in RIVALS)
COLUMNS += ("roofline_us", "roofline_base_us", "roofline_merged_us")
COLUMNS += ("smallest_kernel_us", "copy_gb_per_s", "relative_error", *MACHINE)
LARGEST = 2**32  # bytes of an output, or of what a rival keeps for each delta
OUTPUT = Path(os.environ.get("OUT") or RESULTS)


def check(arguments: dict[str, torch.Tensor]) -> float:
    """Relative RMS error of the op against the reference; raises where it is wrong.

    Rounding y to bf16 alone gives some 2^-10; a wrong delta, row or slice gives 1.
    """
    got = torch.zeros_like(arguments["y"])
    want = torch.zeros_like(got, dtype=torch.float32)
    torch.ops.dqrelo.delta_linear_(**{**arguments, "y": got})
    reference.delta_linear_(**{**arguments, "y": want})
    error = float((got.float() - want).norm() / want.norm())
    if not error < 2**-8:
        raise SystemExit(f"the op is wrong by {error:.2g} of the reference: not timed")
    return error


def rivals(site: Site, step: Step, repeats: int) -> dict[str, float | str]:
    """Microseconds of each rival; empty for those that are not there or too large."""
    found: dict[str, float | str] = {}
    whole = 2 * site.n * site.k * len(site.table)
    for rival in RIVALS:
        name = f"{rival.__name__}_us"
        found[name] = ""
        if rival.__name__ == "dense" and whole > 4 * LARGEST:
            continue
        try:
            found[name] = round(median_us(rival(site, step), repeats), 2)
        except Exception as error:  # not there, or more than the device has
            tqdm.write(f"{rival.__name__}: {error}")
    return found


def predicted(name: str, key: dict[str, object]) -> dict[str, float | str]:
    """What roofline.py says of a shape; empty for a device that it does not know."""
    known = next((DEVICES[one] for one in DEVICES if one in NAME), None)
    columns = ("roofline_us", "roofline_base_us", "roofline_merged_us")
    if known is None:
        return dict.fromkeys(columns, "")
    shape = (int(str(key["deltas"])), int(str(key["rows_per_delta"])))
    said = predict(known, name, *shape, float(str(key["ratio"])), str(key["factors"]))
    values = [round(said[one], 2) for one in ("delta_us", "base_us", "merged_us")]
    return dict(zip(columns, values, strict=True))


def measurements(
    options: argparse.Namespace, table: Table
) -> Iterator[dict[str, object]]:
    """One row per linear layer, number of deltas and rows per delta that lacks one."""
    about = {"device": NAME, "ratio": options.ratio, "factors": options.factors}
    copy = copy_bytes_per_s(options.repeats)
    one = torch.zeros(1, device=DEVICE)
    smallest = median_us(lambda: one.add_(1), options.repeats)
    linears = TINY if options.tiny else {n: LINEARS[n] for n in options.linears}
    shapes = [(name, deltas) for name in linears for deltas in options.deltas]
    for name, deltas in tqdm(shapes, unit="site"):
        sizes, k = linears[name]
        site = Site(sizes, k, deltas, options.ratio, FACTORS[options.factors])
        for rows in options.rows:
            key = {**about, "linear": name, "deltas": deltas, "rows_per_delta": rows}
            m = deltas * rows
            known = tuple(str(key[column]) for column in KEYS) in table
            if known or 2 * m * site.n > LARGEST:
                continue
            step = site.step(rows)
            error = check(step)
            us = median_us(
                lambda step=step: torch.ops.dqrelo.delta_linear_(**step),
                options.repeats,
            )
            moved = deltas * site.bytes_per_delta + 2 * m * (k + 2 * site.n)
            yield {
                **key,
                "ranks": "+".join(map(str, site.ranks)),
                "us": round(us, 2),
                "copy_us": round(moved / copy * 1e6, 2),
                "of_copy": round(moved / copy * 1e6 / us, 3),
                **rivals(site, step, options.repeats),
                **predicted(name, key),
                "smallest_kernel_us": round(smallest, 2),
                "copy_gb_per_s": round(copy / 1e9),
                "relative_error": f"{error:.2g}",
                **machine(),
            }


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """The part of a copy's speed that each layer reaches, over the distinct deltas."""
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name in LINEARS:
        points = [
            (int(str(row["deltas"])), float(str(row["of_copy"])))
            for row in rows
            if (row["linear"], str(row["rows_per_delta"])) == (name, "1")
        ]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("distinct deltas in a step, one row each")
    axes.set_ylabel("speed / speed of a copy of the same bytes")
    axes.set_ylim(0, 1)
    axes.legend()
    figure.savefig(path, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write each row, and in the end a figure.

    Args:
        arguments: of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT / "kernels.csv")
    parser.add_argument("--linears", nargs="+", choices=LINEARS, default=list(LINEARS))
    parser.add_argument(
        "--deltas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64]
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 16, 128, 1024])
    parser.add_argument("--ratio", type=float, default=1 / 8)
    parser.add_argument("--factors", choices=FACTORS, default="int4")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--tiny", action="store_true", help="tiny layers: a rehearsal")
    options = parser.parse_args(arguments)
    if not HAS_GPU and not options.tiny:
        raise SystemExit("needs a CUDA device; roofline.py predicts without one")
    torch.manual_seed(0)
    table = Table(options.output, KEYS, COLUMNS)
    for row in measurements(options, table):
        table.add(row)
        print(*(row[name] for name in (*KEYS[1:4], "us", "of_copy")), flush=True)
    plot(table.rows, options.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
