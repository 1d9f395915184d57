# SPDX-License-Identifier: Apache-2.0
"""The halves of a linear, with each of three workers having some ranks of a factor."""

import pytest
import torch
from support.arena import (
    DELTAS,
    EPS,
    POPULARITY,
    SIZES,
    SLICES,
    Arena,
    groups_of,
    random_deltas,
)
from support.deltas import workers_of

from dqrelo_kernels import ops as _  # noqa: F401
from dqrelo_kernels.table import ABSENT, Field

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("popularity", ["mixed", "skewed", "many", "nothing"])
@pytest.mark.parametrize("k", [5, 96, 300])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("field", [Field.LORA_A, Field.LORA_B], ids=lambda f: f.name)
def test_workers_add_up(field, popularity, k, dtype, deltas):
    """They share A and have the same x, or share B and have other columns of x."""
    slot_of_row, arena = POPULARITY[popularity], Arena(3, SIZES, seed=k)
    change, bias = random_deltas(arena, deltas, k)
    tables = workers_of(arena, arena.data, k, field)
    m, groups = len(slot_of_row), groups_of(slot_of_row)
    x = torch.randn(m, k, generator=arena.generator).to(dtype)
    y = torch.randn(m, sum(SIZES), generator=arena.generator).to(dtype)
    columns = torch.arange(k) % 3
    parts = [x.where(columns == w, 0) for w in range(3)]
    if field == Field.LORA_A:
        parts, tables[1:] = [x] * 3, [table.clone() for table in tables[1:]]

    scratch = torch.zeros(m, 256)
    for table, part in zip(tables, parts, strict=True):
        mine = torch.full((m, 256), torch.nan)
        torch.ops.dqrelo.delta_shrink_(
            mine,
            part,
            arena.data,
            table,
            *groups.of_rows,
        )
        scratch += mine.nan_to_num(nan=0)

    expected, magnitude = y.double(), y.double().abs()
    for i, slot in enumerate(slot_of_row):
        expected[i] += change[slot] @ x[i].double() + bias[slot]
        magnitude[i] += change[slot].abs() @ x[i].double().abs() + bias[slot].abs()
    got = torch.zeros_like(expected)
    workers = [0] if field == Field.LORA_A else range(3)
    for w in workers:
        if w:
            tables[w][..., Field.BIAS] = ABSENT
        out = torch.zeros_like(y) if w else y.clone()
        torch.ops.dqrelo.delta_expand_(
            out,
            scratch,
            parts[w],
            arena.data,
            tables[w],
            SLICES,
            *groups.of_rows,
        )
        got += out.double()

    # As for the op in one; every worker rounds what it computes.
    eps = torch.finfo(dtype).eps
    bound = 8 * (k + 130) * EPS * magnitude
    for i, slot in enumerate(slot_of_row):
        size = change[slot].abs() @ x[i].double().abs() + bias[slot].abs()
        if dtype == torch.bfloat16:
            bound[i] += 3 * arena.lost(slot, x[i].double())
        bound[i] += eps * (y[i].double().abs() + len(workers) * size)
    assert ((got - expected).abs() <= bound).all()
