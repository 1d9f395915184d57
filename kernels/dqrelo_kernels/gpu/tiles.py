# SPDX-License-Identifier: Apache-2.0
"""How large the tiles of ``sign_matmul`` are, by the name of the GPU.

``tiles.json`` has them, ``benchmarks/ops/tune_tiles.py`` measures them; "default" is
for a GPU that was not measured.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch

FILE = Path(__file__).with_name("tiles.json")
# From this many rows on a step is mostly prompts: many rows share a delta.
TALL = 257


class Tiles(NamedTuple):
    """A tile of ``block_m`` rows of x and ``block_n`` output features, of one program.

    Two warps keep Hopper on mma.sync (wgmma needs four): one instruction for both
    heights, so that a row's bits do not depend on the height of its step.
    """

    block_m: int
    block_n: int
    num_stages: int
    maxnreg: int | None
    num_warps: int = 2


# No tensor core: the tiles pass through registers.
FLOAT32 = Tiles(16, 32, num_stages=2, maxnreg=None, num_warps=8)


def are_tall(rows: int, slots: int) -> bool:
    """Whether a step is mostly prompts, from what a captured graph keeps of it.

    Args:
        rows: of the step, those of the base as well.
        slots: that rows may belong to; of a mixture, pairs of a slot and an expert.
    """
    return rows >= max(TALL, slots)


def tiles(rows: int, slots: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a step.

    Args:
        rows, slots: as for ``are_tall``.
        dtype: of the activations.
    """
    if dtype == torch.float32:
        return FLOAT32
    return _of_this_gpu()["tall" if are_tall(rows, slots) else "short"]


@functools.cache
def _of_this_gpu() -> dict[str, Tiles]:
    known = json.loads(FILE.read_text())
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "default"
    found = known.get(name, known["default"])
    return {height: Tiles(**sizes) for height, sizes in found.items()}
