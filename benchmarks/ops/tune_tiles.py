# SPDX-License-Identifier: Apache-2.0
"""The fastest tiles of ``sign_matmul`` on this GPU, into dqrelo_kernels/gpu/tiles.json.

    python -m benchmarks.ops.tune_tiles

Short tiles by 16 deltas of one row each, tall ones by 4 deltas of 256, over all linear
layers of a layer of Llama-3-8B; tiles that disagree with the reference are left out.
"""

import itertools
import json
from collections.abc import Callable, Iterable
from unittest.mock import patch

import torch
from tqdm import tqdm

from benchmarks.ops.gpu import check, median_us
from benchmarks.ops.linear_site import FACTORS, LINEARS, Site
from dqrelo_kernels.gpu import sign_matmul
from dqrelo_kernels.gpu.tiles import FILE, Tiles

STEPS = {"short": (16, 1), "tall": (4, 256)}  # deltas, and rows of each
HEIGHTS = {"short": (16,), "tall": (32, 64, 128)}
REPEATS = 30


def candidates(height: str) -> list[Tiles]:
    """All that could be fastest."""
    sizes = itertools.product(HEIGHTS[height], (32, 64, 128), (2, 3, 4), (None, 128))
    return [Tiles(*size) for size in sizes]


def fastest(among: Iterable[Tiles], time: Callable[[Tiles], float]) -> Tiles:
    """The tiles that take the least time."""
    return min(among, key=time)


def layer_us(tiles: Tiles, steps: list[dict[str, torch.Tensor]]) -> float:
    """Microseconds of the deltas of one layer; infinite if they are wrong."""

    def run() -> None:
        for step in steps:
            torch.ops.dqrelo.delta_linear_(**step)

    with patch.object(sign_matmul, "tiles", lambda *_: tiles):
        try:
            for step in steps:
                check(step)
            return median_us(run, REPEATS)
        except (SystemExit, RuntimeError) as error:  # wrong, or more than the GPU has
            tqdm.write(f"{tiles}: {error}")
            return float("inf")


def main() -> None:
    """Measure both heights and write the file."""
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device")
    torch.manual_seed(0)
    found = {}
    for height, (deltas, rows) in STEPS.items():
        layers = [LINEARS[name] for name in LINEARS if name != "lm_head"]
        sites = [Site(*layer, deltas, 1 / 8, FACTORS["int4"]) for layer in layers]
        steps = [site.step(rows) for site in sites]
        among = tqdm(candidates(height), height)
        best = fastest(among, lambda tiles, steps=steps: layer_us(tiles, steps))
        found[height] = best._asdict()
        print(height, best)
    write(torch.cuda.get_device_name(), found)


def write(name: str, found: dict[str, dict[str, int | None]]) -> None:
    """Put the tiles of one GPU into the file, in place of what it had."""
    known = json.loads(FILE.read_text())
    FILE.write_text(json.dumps({**known, name: found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
