# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality, on three random matrices and a vector in place of a model."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import halves, strength
from benchmarks.quality.quality import ALSO, MAIN, approximated
from benchmarks.table import Table

METHODS = MAIN | ALSO
BITS = {"BitDelta": 1, "BitDelta, scale per row": 1, "2-bit Lloyd per row": 2}
SHAPES = {"model.embed_tokens.weight": (1200, 576), "a.weight": (576, 960)}
SHAPES |= {"b.weight": (960, 576), "norm.weight": (576,)}


@pytest.fixture
def model():
    """Singular values fall slowly; rows are alike, and so are columns."""
    random = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=random)

    base = {name: randn(*shape) for name, shape in SHAPES.items()}
    changes = {name: 1e-3 * randn(*shape) for name, shape in SHAPES.items()}
    for name, (n, *k) in SHAPES.items():
        if k:
            falling = torch.arange(1, 49) ** -0.5
            changes[name] += 1e-3 * (randn(n, 48) * falling) @ randn(48, *k)
    made = SimpleNamespace(name="tiny", changes=changes, asked=[])
    made.bench = SimpleNamespace(base=base)
    made.state = {name: base[name] + change for name, change in changes.items()}

    def distances(state):
        made.asked.append(state)
        ends = ("", "_off_task")
        return {f"{column}{end}": "1" for column in ("kl", "top1") for end in ends}

    made.distances = distances
    return made


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_bytes_of_its_name(model, name):
    state, numbers = approximated(model, METHODS[name])
    *_, ratio = name.rsplit(maxsplit=1)
    top, _, bottom = ratio.partition("/")
    of_name = 16 * int(top) / int(bottom) if bottom else BITS.get(name, 2)
    shapes = [shape for shape in SHAPES.values() if len(shape) == 2]
    # Bytes: two scales a row, one a column, a shape, and two ranks of 16 bits.
    slack = sum(8 * n + 4 * k + 16 + 2 * 2 * (n + k) for n, k in shapes)
    weights = sum(n * k for n, k in shapes)
    assert abs(numbers["bits_per_weight"] - of_name) <= 8 * slack / weights
    assert 0 < numbers["relative_error"] < 0.9
    torch.testing.assert_close(state["norm.weight"], model.state["norm.weight"])


def test_a_scale_for_each_column_gains_nothing_where_columns_are_alike(model):
    """It would, if its sign plane were not counted."""
    names = ("+ scale per column", "dqrelo 1/8")
    column, ours = (approximated(model, METHODS[name])[1] for name in names)
    assert column["relative_error"] > ours["relative_error"]


@pytest.mark.parametrize("script", [strength, halves])
def test_vectors_are_exact_and_matrices_are_not(model, script, tmp_path, monkeypatch):
    monkeypatch.setattr("dqrelo_tools.compress.MAX_STRENGTH", 1.05)
    keys = ("fine_tune", "ratio", script.COLUMNS[2])
    table = Table(tmp_path / "results.csv", keys, script.COLUMNS)
    script.measure(model, table)
    assert len(table.rows) == len(model.asked) > 1
    for state in model.asked:
        for name, expected in model.state.items():
            same = torch.allclose(state[name], expected, rtol=1e-6, atol=1e-7)
            assert same == (expected.ndim == 1), name
    script.measure(model, table)  # all rows are there
    assert len(table.rows) == len(model.asked)
