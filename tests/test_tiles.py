# SPDX-License-Identifier: Apache-2.0
"""Sizes of the GPU kernel's tiles: by the GPU's name, and how they are found."""

import importlib
import json
import sys

import pytest
import torch

from dqrelo_kernels.gpu import tiles
from dqrelo_kernels.gpu.tiles import TALL, Tiles

TUNED = {
    "short": {"block_m": 16, "block_n": 32, "num_stages": 4, "maxnreg": None},
    "tall": {"block_m": 128, "block_n": 64, "num_stages": 2, "maxnreg": 128},
}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with a GPU of this name, and a tiles.json of its own."""
    copy = tmp_path / "tiles.json"
    copy.write_text(tiles.FILE.read_text())
    monkeypatch.setattr(tiles, "FILE", copy)

    def gpu(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        tiles._of_this_gpu.cache_clear()

    yield gpu
    tiles._of_this_gpu.cache_clear()


@pytest.fixture
def tune_tiles(monkeypatch):
    yield importlib.import_module("benchmarks.ops.tune_tiles")
    sys.modules.pop("benchmarks.ops.tune_tiles")


def test_tiles_are_those_of_the_gpu(gpu, tune_tiles, monkeypatch):
    monkeypatch.setattr(tune_tiles, "FILE", tiles.FILE)
    tune_tiles.write("GPU X", TUNED)
    default = json.loads(tiles.FILE.read_text())["default"]
    for name, sizes in (("GPU X", TUNED), ("GPU Y", default)):
        gpu(name)
        for rows, height in ((1, "short"), (TALL - 1, "short"), (TALL, "tall")):
            assert tiles.tiles(rows, 64, torch.bfloat16) == Tiles(**sizes[height])
        assert tiles.tiles(TALL, 64, torch.float32) == tiles.FLOAT32


def test_many_rows_of_a_mixture_are_no_prompt():
    """64 rows that chose 8 of 128 experts each: hardly two belong together."""
    assert not tiles.are_tall(64 * 8, slots=16 * 128)
    assert tiles.are_tall(2048 * 8, slots=16 * 128)


def test_the_fastest_tiles_are_found(tune_tiles):
    """All candidates can be launched, and infinity stands for those that are wrong."""
    for height, (block_m, *_) in tune_tiles.HEIGHTS.items():
        among = tune_tiles.candidates(height)
        assert len(set(among)) == len(among)
        wanted = Tiles(block_m, 128, num_stages=3, maxnreg=128)
        times = {tile: float("inf") for tile in among} | {wanted: 5.0, among[0]: 6.0}
        assert tune_tiles.fastest(among, times.__getitem__) == wanted
