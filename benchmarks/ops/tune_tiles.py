# SPDX-License-Identifier: Apache-2.0
"""The fastest tiles of ``sign_matmul`` on this GPU, into dqrelo_kernels/gpu/tiles.json.

    python -m benchmarks.ops.tune_tiles [--output FILE]

Short tiles by 16 deltas of one row each, tall ones by 4 deltas of 256, over all linear
layers of a layer of Llama-3-8B; tiles that disagree with the reference are left out.
All are compiled first, on all cores. ``--tiny`` rehearses it, in Triton's interpreter,
too.
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.ops.device import HAS_GPU, NAME, median_us
from benchmarks.ops.gpu import check
from benchmarks.ops.linear_site import FACTORS, LINEARS, TINY, Site
from dqrelo_kernels.gpu import sign_matmul
from dqrelo_kernels.gpu.tiles import FILE, TALL, Tiles

STEPS = {"short": (16, 1), "tall": (4, 256)}  # deltas, and rows of each
HEIGHTS = {"short": (16,), "tall": (32, 64, 128)}
REPEATS = 30
Steps = list[dict[str, torch.Tensor]]


def candidates(height: str) -> list[Tiles]:
    """All that could be fastest."""
    sizes = itertools.product(HEIGHTS[height], (32, 64, 128), (2, 3, 4), (None, 128))
    return [Tiles(*size) for size in sizes]


def fastest(among: Iterable[Tiles], time: Callable[[Tiles], float]) -> Tiles:
    """The tiles that take the least time."""
    return min(among, key=time)


def steps_of(height: str, tiny: bool) -> Steps:
    """A step of each linear layer of one layer."""
    deltas, rows = STEPS[height]
    if tiny:
        deltas, rows = 2, 1 if height == "short" else TALL // 2 + 1
    linears = TINY if tiny else LINEARS
    layers = [linears[name] for name in linears if name != "lm_head"]
    factors = FACTORS["bfloat16" if tiny else "int4"]
    sites = [Site(*layer, deltas, 1 / 8, factors) for layer in layers]
    return [site.step(rows) for site in sites]


def run(tiles: Tiles, steps: Steps) -> None:
    """The deltas of one layer, with these tiles."""
    with patch.object(sign_matmul, "tiles", lambda *_: tiles):
        for step in steps:
            torch.ops.dqrelo.delta_linear_(**step)


def layer_us(tiles: Tiles, steps: Steps) -> float:
    """Microseconds of the deltas of one layer; infinite if they are wrong."""
    try:
        with patch.object(sign_matmul, "tiles", lambda *_: tiles):
            for step in steps:
                check(step)
        return median_us(lambda: run(tiles, steps), REPEATS if HAS_GPU else 1)
    except (SystemExit, RuntimeError) as error:  # wrong, or more than the GPU has
        tqdm.write(f"{tiles}: {error}")
        return float("inf")


def compile_all(among: list[tuple[str, Tiles]]) -> None:
    """Put the kernels of all tiles into Triton's cache."""
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        for done in tqdm(pool.map(compiled, among), "compile", len(among)):
            if done:
                tqdm.write(done)


def compiled(one: tuple[str, Tiles]) -> str | None:
    """Run one pair of height and tiles once; the error, if there is one."""
    height, tiles = one
    try:
        run(tiles, steps_of(height, tiny=False))
        torch.cuda.synchronize()
    except RuntimeError as error:
        return f"{tiles}: {error}"
    return None


def main(arguments: list[str] | None = None) -> None:
    """Measure both heights, and write the file.

    Args:
        arguments: of the command line; None: those of this process.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, help="not the kernels' own file")
    parser.add_argument("--tiny", action="store_true", help="few tiles: a rehearsal")
    options = parser.parse_args(arguments)
    if not HAS_GPU and not options.tiny:
        raise SystemExit("needs a CUDA device")
    torch.manual_seed(0)
    chosen = {h: candidates(h)[: 2 if options.tiny else None] for h in STEPS}
    if HAS_GPU:
        compile_all([(height, one) for height in chosen for one in chosen[height]])
    found = {}
    for height, among in chosen.items():
        steps = steps_of(height, options.tiny)
        best = fastest(
            tqdm(among, height), lambda tiles, steps=steps: layer_us(tiles, steps)
        )
        found[height] = best._asdict()
        print(height, best)
    write(NAME, found, options.output)


def write(
    name: str, found: dict[str, dict[str, int | None]], path: Path = FILE
) -> None:
    """Put the tiles of one GPU into a file, in place of what it had."""
    path = path or FILE
    known = json.loads((path if path.exists() else FILE).read_text())
    path.write_text(json.dumps({**known, name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
