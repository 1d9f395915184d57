# SPDX-License-Identifier: Apache-2.0
"""What holds for every matrix, every size and every damage."""

import contextlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dqrelo_tools.compress import compress
from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from dqrelo_tools.method import METHODS, Method, Size
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensors import INT4, matrix_problems

sizes = st.integers(1, 150)
shapes = st.tuples(sizes, sizes)
ratios = st.floats(1 / 64, 1)
methods = st.builds(
    Method,
    planes=st.sampled_from([None, 0, 1, 2]),
    by_row=st.booleans(),
    dtype=st.sampled_from([INT4, torch.int8, None]),
    low_rank_first=st.booleans(),
    sweeps=st.integers(0, 2),
)
slow = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random(shape, seed, sparse=False) -> torch.Tensor:
    """A change; a sparse one has rows and single elements of exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    change = 1e-3 * torch.randn(shape, generator=generator)
    if sparse:
        change[torch.rand(shape, generator=generator) < 0.7] = 0
        change[torch.rand(shape[0], generator=generator) < 0.5] = 0
    return change


@slow
@given(shapes, ratios, methods, st.integers(0, 9), st.booleans())
def test_what_is_stored_is_what_it_means(decode, shape, ratio, method, seed, sparse):
    delta = random(shape, seed, sparse)
    size = method.size(*shape, ratio, torch.bfloat16)
    matrix = compress(delta, size, method)
    stored = matrix.tensors("P")
    if matrix.rank != size.rank:  # a change of few ranks
        assert size.dtype == INT4
        size = replace(size, rank=size.rank // 2, dtype=torch.int8)
    assert matrix.rank == size.rank
    assert sum(tensor.nbytes for tensor in stored.values()) == size.bytes(*shape)
    dense = matrix.dense()
    assert dense.isfinite().all()
    # Sums of at most 150 terms; none is larger than a few times the largest change.
    slack = 150 * torch.finfo(torch.float32).eps * 10 * delta.abs().max()
    assert (dense - torch.tensor(decode(stored, "P"))).abs().max() <= slack


@slow
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 800)),
    methods,
    st.sampled_from([1, 64, 256]),
    st.data(),
)
def test_a_part_of_a_matrix_is_the_part_of_what_it_means(shape, method, block, data):
    """Runs of whole blocks, which are cut out, and others, which are packed again."""
    n, k = shape
    size = Size(1, min(4, *shape), method.dtype or torch.bfloat16, method.by_row)
    matrix = compress(random(shape, 1), size, method)
    rows = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n))
    first = block * data.draw(st.integers(0, (k - 1) // block))
    end = first + block * data.draw(st.integers(1, 1 + (k - 1 - first) // block))
    end = min(end, k)
    part = matrix.part(torch.tensor(rows), torch.arange(first, end))
    assert part.shape == (len(rows), end - first)
    # The same products, summed in another order.
    torch.testing.assert_close(part.dense(), matrix.dense()[rows, first:end])
    stored = {name.removeprefix("P"): t for name, t in part.tensors("P").items()}
    assert not matrix_problems("", set(stored), stored)


@given(shapes, ratios, methods)
def test_the_ratio_is_never_exceeded(shape, ratio, method):
    size = method.size(*shape, ratio, torch.bfloat16)
    n, k = shape
    least = Size(size.planes, 0 if size.planes else 1, size.dtype, size.by_row)
    assert size.bytes(n, k) <= max(ratio * 2 * n * k, least.bytes(n, k))
    assert size.planes + size.rank >= 1 and size.rank <= min(n, k)
    if method.planes is None and size.planes:
        assert size.bytes(n, k) <= ratio * 2 * n * k


@slow
@given(shapes, methods, st.integers(0, 9))
def test_a_sweep_never_makes_it_worse(shape, method, seed):
    delta = random(shape, seed)
    size = Size(1, min(4, *shape), method.dtype or torch.bfloat16, method.by_row)
    errors = []
    for sweeps in range(3):
        way = Method(low_rank_first=method.low_rank_first, sweeps=sweeps)
        errors.append((delta - compress(delta, size, way).dense()).double().norm())
    assert errors[0] * (1 + 1e-5) >= errors[1] and errors[1] * (1 + 1e-5) >= errors[2]


@slow
@given(shapes, ratios, st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_convert_and_export_are_the_formula(
    tmp_path, decode, shape, ratio, method, seed
):
    if method == "dqrelo-paper":
        ratio = max(ratio, 1 / 16)
    folders = [tmp_path / name for name in ("base", "model", "delta", "merged")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    base, model, delta, merged = folders
    before = {"w": random(shape, seed + 10), "v": torch.randn(shape[0])}
    after = {"w": before["w"] + random(shape, seed), "v": before["v"] + 1}
    for folder, tensors in ((base, before), (model, after)):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({}))
        save_file(tensors, folder / "model.safetensors")
    convert(str(base), str(model), delta, ratio, method=method)
    export(str(base), delta, merged)
    got = load_file(merged / "model.safetensors")
    change = decode(load_file(delta / "delta_model.safetensors"), "w")
    assert torch.equal(got["v"], after["v"])
    assert (got["w"] - (before["w"].double() + torch.tensor(change))).abs().max() < 1e-7


@pytest.fixture(scope="module")
def sound(family):
    """A delta of a real converter, its files and what they mean."""
    folder = family("llama-tied").deltas[0]
    names = ("delta_config.json", "delta_model.safetensors")
    return {name: (folder / name).read_bytes() for name in names}, meaning(folder)


def meaning(folder) -> dict:
    """Everything that a server would take from a folder."""
    delta = Delta(folder)
    known = {name: delta.matrix(name).tensors(name) for name in delta.matrices}
    known |= {name: {"": delta.parameter(name)} for name in delta.exact}
    return {"config": delta.config, **known}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(
        one[k] == other[k]
        if k == "config"
        else one[k].keys() == other[k].keys()
        and all(torch.equal(one[k][t], other[k][t]) for t in one[k])
        for k in one
    )


@settings(slow, max_examples=150)
@given(st.data())
def test_a_damaged_folder_is_refused_or_means_the_same(tmp_path, sound, data):
    files, known = sound
    name = data.draw(st.sampled_from(sorted(files)))
    raw = bytearray(files[name])
    # Half of the damage falls into the header, which is where meaning is.
    end = data.draw(st.sampled_from([min(len(raw), 2000), len(raw)])) - 1
    place, kind = data.draw(st.integers(0, end)), data.draw(st.sampled_from("xid"))
    if kind == "x":
        raw[place] ^= data.draw(st.integers(1, 255))
    elif kind == "i":
        raw[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        del raw[place : place + data.draw(st.integers(1, 99))]
    for other, content in files.items():
        (tmp_path / other).write_bytes(raw if other == name else content)
    with contextlib.suppress(DqreloError, OSError, UnicodeDecodeError):
        assert same(meaning(tmp_path), known)
