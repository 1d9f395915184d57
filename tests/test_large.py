# SPDX-License-Identifier: Apache-2.0
"""Conversions that are large or interrupted."""

import json
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file
from support.killed import killed

from dqrelo_tools import cli
from dqrelo_tools.svd import EXACT_SVD, truncated_svd
from vllm_dqrelo.format.delta import Delta


def synthetic(folder, seed, matrices, shape, dtype=torch.bfloat16):
    """A checkpoint of random matrices, one file each; and its index."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.Generator().manual_seed(0)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weight_map = {}
    for i in range(matrices):
        tensor = torch.randn(shape, generator=base)
        tensor += 0.01 * torch.randn(shape, generator=generator)
        name, file = f"layers.{i}.weight", f"model-{i + 1:05d}-of-{matrices:05d}"
        save_file({name: tensor.to(dtype)}, folder / f"{file}.safetensors")
        weight_map[name] = f"{file}.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_and_writes_the_same_bytes(tmp_path):
    base = synthetic(tmp_path / "base", 1, 30, (96, 300))
    model = synthetic(tmp_path / "model", 2, 30, (96, 300))
    options = ["--base", str(base), "--model", str(model), "--max-shard-size", "40KB"]
    whole, output = tmp_path / "whole", tmp_path / "delta"
    assert cli.main(["convert", *options, "--output", str(whole)]) == 0
    parts = tmp_path / ".delta.parts"
    for pieces in (1, 9, 30):  # killed when so many parameters are done
        killed(pieces, [*options, "--output", str(output)])
        assert not output.exists()
        # A file that was being written is no piece.
        (parts / "scratch").write_bytes(b"half")
        assert len(list(parts.glob("0*"))) == pieces
    assert cli.main(["convert", *options, "--output", str(output)]) == 0
    assert contents(output) == contents(whole)
    assert len(list(output.glob("*.safetensors"))) > 2
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    Delta(output)


def test_finished_pieces_are_not_computed_again(tmp_path, monkeypatch):
    base = synthetic(tmp_path / "base", 1, 6, (32, 48))
    model = synthetic(tmp_path / "model", 2, 6, (32, 48))
    command = ["convert", "--base", str(base), "--model", str(model)]
    command += ["--output", str(tmp_path / "delta")]
    computed, lock = [], threading.Lock()
    from dqrelo_tools import convert

    compress = convert.compress

    def counted(*args):
        with lock:  # small matrices are converted at the same time
            if len(computed) == 4 and stop:
                raise KeyboardInterrupt
            computed.append(1)
        return compress(*args)

    monkeypatch.setattr(convert, "compress", counted)
    stop = True
    assert cli.main(command) == 130
    stop = False
    assert cli.main(command) == 0
    assert len(computed) == 6
    # Another ratio is another conversion: nothing of the old one is used.
    command[-1] += "-2"
    stop, computed[:] = True, []
    assert cli.main(command) == 130
    stop = False
    assert cli.main([*command, "--ratio", "0.25"]) == 0
    assert len(computed) == 4 + 6


MEASURE = """
import re, sys
from dqrelo_tools import cli
def convert(base, model, output):
    command = ["convert", "--base", base, "--model", model, "--output", output]
    assert cli.main(command) == 0
    with open("/proc/self/status") as status:
        # ru_maxrss would count the memory of who started this process, too.
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read())[1])
small = convert(*sys.argv[1:4])
print(convert(*sys.argv[4:7]) - small)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """Against a conversion of the same matrix, alone, in the same process."""
    shape, matrices = (512, 1024), 96
    paths = []
    for label, count in (("small", 2), ("large", matrices)):
        for side, seed in (("base", 1), ("model", 2)):
            folder = tmp_path / f"{label}-{side}"
            paths.append(str(synthetic(folder, seed, count, shape)))
        paths.append(str(tmp_path / f"{label}-delta"))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *paths],
        capture_output=True,
        text=True,
        check=True,
    )
    growth = int(done.stdout.splitlines()[-1]) * 1024
    checkpoint = 2 * matrices * shape[0] * shape[1]
    largest_fp32 = 4 * shape[0] * shape[1]
    # The tensors of the delta (an eighth of the checkpoint) are in one shard here.
    assert growth < 8 * largest_fp32 + checkpoint / 8
    assert growth < checkpoint / 2, "the bound would not notice a model in memory"


@pytest.mark.parametrize("shape", [(1500, 1100), (1030, 1200)])
@pytest.mark.parametrize("spectrum", ["flat", "decaying", "adapter", "rows"])
def test_iterated_svd_is_within_one_percent_of_the_exact_one(shape, spectrum):
    assert min(shape) > EXACT_SVD
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    if spectrum == "decaying":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(s * torch.arange(1, len(s) + 1) ** -0.8) @ vt
    elif spectrum == "adapter":  # rank 16, 200 times above the rounding of a checkpoint
        left, right = (torch.randn(n, 16, generator=generator) for n in shape)
        matrix += 10 * left @ right.T
    elif spectrum == "rows":  # fewer ranks than are asked for
        matrix[9:] = 0
    singular = torch.linalg.svdvals(matrix.double())
    # Where nothing is left: float32's rounding of the largest.
    slack = 1e-5 * singular[0] if spectrum == "rows" else 0
    for rank in (1, 40, 400):
        b, a = truncated_svd(matrix, rank)
        error = (matrix.double() - b.double() @ a.double()).norm()
        best = singular[rank:].square().sum().sqrt()
        assert best <= error * (1 + 1e-9) + slack and error <= 1.01 * best + slack
        again = truncated_svd(matrix, rank)
        assert torch.equal(b, again[0]) and torch.equal(a, again[1])


def test_an_index_that_names_a_tensor_its_file_does_not_have(tmp_path, capsys):
    base = synthetic(tmp_path / "base", 1, 2, (32, 48))
    model = synthetic(tmp_path / "model", 2, 2, (32, 48))
    for folder in (base, model):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"]["ghost"] = index["weight_map"]["layers.0.weight"]
        path.write_text(json.dumps(index))
    command = ["convert", "--base", str(base), "--model", str(model)]
    assert cli.main([*command, "--output", str(tmp_path / "delta")]) == 1
    assert "has no ghost" in capsys.readouterr().err
