# SPDX-License-Identifier: Apache-2.0
"""The ops against dense float64 arithmetic, written without the packed format."""

from unittest.mock import patch

import numpy as np
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
from torch.utils._python_dispatch import TorchDispatchMode

from dqrelo_kernels import ops as kernels
from dqrelo_kernels.cpu import build as cpu
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import (
    ABSENT,
    FACTOR_DTYPES,
    INT4,
    Field,
    empty_table,
    rebase,
)

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("k", [5, 63, 96, 272, 300, 700])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_delta_linear(popularity, k, dtype, deltas):
    slot_of_row, arena = POPULARITY[popularity], Arena(3, SIZES, seed=k)
    change, bias = random_deltas(arena, deltas, k)

    m = len(slot_of_row)
    x = torch.randn(m, k, generator=arena.generator).to(dtype)
    y = torch.randn(m, sum(SIZES), generator=arena.generator).to(dtype)
    expected, magnitude = y.double(), y.double().abs()
    for i, slot in enumerate(slot_of_row):
        expected[i] += change[slot] @ x[i].double() + bias[slot]
        magnitude[i] += change[slot].abs() @ x[i].double().abs() + bias[slot].abs()
    before, groups = y.clone(), groups_of(slot_of_row)
    torch.ops.dqrelo.delta_linear_(
        y,
        torch.full((128, 256), torch.nan),
        x,
        arena.data,
        arena.table,
        SLICES,
        *groups.of_rows,
    )
    # A float32 sum of k + rank terms, then one rounding to the output dtype. Terms of
    # the low-rank part cancel in `change`, so that its size is not theirs: 130 of them.
    bound = 8 * (k + 130) * EPS * magnitude + torch.finfo(dtype).eps * expected.abs()
    if dtype == torch.bfloat16:
        for i, slot in enumerate(slot_of_row):
            bound[i] += arena.lost(slot, x[i].double())
    assert ((y.double() - expected).abs() <= bound).all()
    for i, slot in enumerate(slot_of_row):
        assert slot != -1 or torch.equal(y[i], before[i]), "a base row was touched"


@pytest.mark.parametrize("deltas", DELTAS.values(), ids=DELTAS)
@pytest.mark.parametrize("k", [5, 96, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("merge_rows", [1, 20, 21, None])
def test_linear(merge_rows, has_bias, dtype, k, deltas):
    """The base's product and the deltas; behind the step's rows there is padding."""
    slot_of_row, arena = POPULARITY["many"] + [-1, -1], Arena(3, SIZES, seed=k)
    change, bias = random_deltas(arena, deltas, k)
    weight = torch.randn(56, k, generator=arena.generator).to(dtype)
    base_bias = torch.randn(56, generator=arena.generator).to(dtype)
    x = torch.randn(len(slot_of_row), k, generator=arena.generator).to(dtype)
    groups = RowGroups(128, 3, "cpu", merge_rows)
    groups.set(np.array(slot_of_row[:-2], dtype=np.int32))
    got = torch.ops.dqrelo.linear(
        x,
        weight,
        base_bias if has_bias else None,
        torch.full((kernels.whole_bytes(weight),), 255, dtype=torch.uint8),
        torch.full((128, 512), torch.nan),
        arena.data,
        arena.table,
        SLICES,
        *groups.of_rows,
        groups.unmerged,
        groups.merged,
    )
    for i, slot in enumerate(slot_of_row):
        whole = weight.double() + change[slot]
        add = bias[slot] + base_bias.double() * has_bias
        expected = whole @ x[i].double() + add
        magnitude = (weight.double().abs() + change[slot].abs()) @ x[i].double().abs()
        magnitude += bias[slot].abs() + base_bias.double().abs()
        # float32 sums as above; a merged weight and bias are rounded to the dtype, and
        # y is, with a base row's before its delta is added.
        eps = torch.finfo(dtype).eps
        bound = (8 * (k + 130) * EPS + eps) * magnitude + eps * expected.abs()
        assert ((got[i].double() - expected).abs() <= bound).all()


class Allocations(TorchDispatchMode):
    """Notes the elements of each new tensor that an operator returns."""

    def __init__(self):
        super().__init__()
        self.elements = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or func._schema.is_mutable):
            self.elements.append(out.numel())
        return out


def test_a_merged_matrix_is_made_in_place(monkeypatch):
    """Beside y, a step with merged slots allocates a few rows at a time."""
    monkeypatch.setattr(kernels, "PRODUCT_ROWS", 2)
    arena, n, k = Arena(3, [96], seed=0), 96, 80
    arena.matrix(1, 0, k, 5)
    x, weight, groups = torch.ones(8, k), torch.randn(n, k), RowGroups(8, 3, "cpu", 2)
    groups.set(np.array([1, 1, -1, 1, -1, -1, 1, 1], dtype=np.int32))
    whole = torch.zeros(kernels.whole_bytes(weight), dtype=torch.uint8)
    ends = torch.tensor([0, n], dtype=torch.int32)
    site = torch.full((8, 16), torch.nan), arena.data, arena.table, ends
    rows = *groups.of_rows, groups.unmerged, groups.merged
    # The operators of merge_ are the reference's; a GPU has one launch.
    with (
        patch.object(torch.ops.dqrelo, "merge_", lambda made, *_: made.fill_(1)),
        Allocations() as allocations,
    ):
        y = kernels.linear(x, weight, None, whole, *site, *rows)
    assert torch.equal(y[:2], torch.full((2, n), float(k)))
    *_, most, of_y = sorted(allocations.elements)
    assert whole.any() and most <= 2 * max(n, k) and of_y == y.numel()


@pytest.mark.parametrize("dtype", FACTOR_DTYPES, ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("k", [80, 301])
def test_embedding(popularity, k, dtype):
    slot_of_row, n = POPULARITY[popularity], 33
    arena = Arena(3, [n], seed=1)
    change = {-1: torch.zeros(n, k).double(), 2: torch.zeros(n, k).double()}
    change[0] = arena.matrix(0, 0, k, 5, dtype, planes=2)
    change[1] = arena.matrix(1, 0, k, 0)  # slot 2 leaves the embedding alone
    m = len(slot_of_row)
    ids = torch.randint(0, n, (m,), generator=arena.generator)
    y = torch.randn(m, k, generator=arena.generator)
    rows = [change[slot][ids[i]] for i, slot in enumerate(slot_of_row)]
    expected = y.double() + (torch.stack(rows) if rows else 0)
    groups = groups_of(slot_of_row)
    torch.ops.dqrelo.delta_embedding_(
        y,
        ids,
        arena.data,
        arena.table,
        torch.tensor([0, n], dtype=torch.int32),
        groups.rows,
        groups.slots,
        groups.num_active,
    )
    # 8 terms, each at most about 10.
    assert ((y.double() - expected).abs() <= 8 * EPS * 10).all()


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("heads", [None, 4])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("k", [48, 75])
def test_norm(popularity, heads, centred, k):
    slot_of_row = POPULARITY[popularity]
    arena = Arena(3, [k], seed=2)
    weight = {s: arena.vector(s, 0, Field.WEIGHT, k) for s in (0, 2)}  # 1 has none
    bias = {2: arena.vector(2, 0, Field.BIAS, k)}
    m = len(slot_of_row)
    shape = (m, k) if heads is None else (m, heads, k)
    x = torch.randn(shape, generator=arena.generator)
    y = torch.randn(shape, generator=arena.generator)
    expected = y.double().clone()
    for i, slot in enumerate(slot_of_row):
        if slot in weight:
            z = x[i].double()
            z = z - z.mean(-1, keepdim=True) if centred else z
            rms = z.square().mean(-1, keepdim=True).add(1e-5).sqrt()
            expected[i] = z / rms * weight[slot] + bias.get(slot, 0)
    groups = groups_of(slot_of_row)
    torch.ops.dqrelo.delta_norm_(
        y,
        x,
        arena.data,
        arena.table,
        groups.rows,
        groups.slots,
        groups.num_active,
        1e-5,
        centred,
    )
    # Two means of k numbers, a square root and two products, of numbers below 20.
    assert ((y.double() - expected).abs() <= (2 * k + 4) * EPS * 20).all()


@pytest.mark.parametrize("slot_of_row", [[0, 1, 2, -1, 1], [-1] * 5], ids=str)
def test_schemas_and_fakes(slot_of_row):
    """What torch.compile relies on: only the mutated arguments change; shapes."""
    arena, n, k = Arena(3, SIZES, seed=0), sum(SIZES), 96
    random_deltas(arena, DELTAS["integers"], k)
    arena.vector(0, 0, Field.WEIGHT, k)
    groups = RowGroups(8, 3, "cpu", 2)  # slot 1 is merged
    groups.set(np.array(slot_of_row, dtype=np.int32))
    site, ops = (arena.data, arena.table), torch.ops.dqrelo
    by_row, merged = groups.of_rows, (groups.unmerged, groups.merged)
    few = (groups.rows, groups.slots, groups.num_active)
    ids, vocab = torch.arange(5), torch.tensor([0, 7], dtype=torch.int32)
    x, y, weight = torch.randn(5, k), torch.randn(5, n), torch.randn(n, k)
    whole = torch.zeros(kernels.whole_bytes(weight), dtype=torch.uint8)
    experts, ends = torch.randn(2, k, k), torch.tensor([1, 5], dtype=torch.int32)
    for op, *arguments in (
        (ops.delta_linear_, y, torch.zeros(8, 256), x, *site, SLICES, *by_row),
        (ops.delta_shrink_, torch.zeros(8, 256), x, *site, *by_row),
        (ops.delta_expand_, y, torch.ones(8, 256), x, *site, SLICES, *by_row),
        (ops.linear, x, weight, None, whole, torch.zeros(8, 256), *site, SLICES)
        + (*by_row, *merged),
        (ops.merge_, y.new_empty(n, k), y.new_empty(n), weight, None, *site, SLICES, 1),
        (ops.expert_linear_, x.clone(), x, experts, ends, False),
        (ops.delta_embedding_, x.clone(), ids, *site, vocab, *few),
        (ops.delta_norm_, x.clone(), x, *site, *few, 1e-5, False),
    ):
        torch.library.opcheck(op.default, arguments)


def test_rebase_moves_offsets_and_nothing_else():
    entries = empty_table(1, 2, "cpu")[0]
    entries[0, Field.SIGNS], entries[0, Field.RANK_A] = 64, 5
    entries[0, Field.FACTOR_DTYPE], entries[1, Field.BIAS] = 1, 0
    moved = rebase(entries, 1 << 33)
    assert moved[0, Field.SIGNS] == (1 << 33) + 64 and moved[1, Field.BIAS] == 1 << 33
    assert moved[0, Field.RANK_A] == 5 and moved[0, Field.FACTOR_DTYPE] == 1
    assert (moved == ABSENT).sum() == (entries == ABSENT).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [96, 576])
def test_a_row_alone_and_in_a_mixed_batch(path, dtype, k):
    """Bit by bit: neither rows of other deltas nor the number of threads matter, nor
    how many rows the delta itself has, but for few (up to 4) or many."""
    sizes = [192, 64]
    arena = Arena(3, sizes, seed=9)
    for slot in range(3):
        for index in range(2):
            arena.matrix(slot, index, k, 9 + slot, (INT4, INT4, torch.bfloat16)[slot])
    x = torch.randn(300, k, generator=arena.generator).to(dtype)
    y = torch.randn(300, 256, generator=arena.generator).to(dtype)
    slot_of_row = [i % 4 - 1 for i in range(300)]

    def run(rows, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out, groups = y[rows].clone(), RowGroups(512, 3, "cpu")
        groups.set(np.array([slot_of_row[i] for i in rows], dtype=np.int32))
        torch.ops.dqrelo.delta_linear_(
            out,
            torch.full((512, 64), torch.nan),
            x[rows].contiguous(),
            arena.data,
            arena.table,
            torch.tensor([0, 192, 256], dtype=torch.int32),
            *groups.of_rows,
        )
        torch.set_num_threads(before)
        return out

    whole = run(list(range(300)), 2)
    assert torch.equal(whole, run(list(range(300)), 1))
    if cpu.library() is None:
        return  # torch's own products depend on the shape
    assert torch.equal(run(list(range(100, 140)), 2), whole[100:140])
    few = list(range(16))  # four of each delta
    some = run(few, 2)
    assert torch.equal(some, run(few, 1))
    for rows in ([5], [0, 1, 2, 3], [15, 7], [2, 6, 10, 1, 5]):
        assert torch.equal(run(rows, 2), some[rows]), rows
    # Another delta with many rows changes nothing for one with few.
    mixed = run([1, 2, 5, 6, *range(3, 300, 4)], 2)
    assert torch.equal(mixed[:4], some[[1, 2, 5, 6]])


def test_activations_that_native_code_cannot_read():
    if cpu.library() is None:
        pytest.skip("torch reads them")
    arena, groups = Arena(3, [1], seed=0), groups_of([0, 1])
    step = (groups.rows, groups.slots, groups.num_active)
    for x in (torch.zeros(4, 4).T, torch.zeros(4, 4, dtype=torch.float64)):
        with pytest.raises(ValueError, match="must be float32, bfloat16 or float16"):
            torch.ops.dqrelo.delta_norm_(
                x, x, arena.data, arena.table, *step, 1e-5, False
            )


def test_without_a_compiler_one_warning_and_plain_torch(path, monkeypatch, caplog):
    monkeypatch.setenv("DQRELO_NATIVE", "1")
    monkeypatch.setattr("shutil.which", lambda name: None)
    cpu.reset()
    assert cpu.library() is None and cpu.library() is None
    (record,) = caplog.records
    assert "install g++ or set CXX" in record.getMessage()
