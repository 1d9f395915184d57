# SPDX-License-Identifier: Apache-2.0
"""The Triton launchers against the reference.

Without a CUDA device they run in Triton's interpreter; bf16 needs a device.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.deltas import (
    DEVICE,
    EMPTY,
    HAS_DEVICE,
    SLOTS,
    Deltas,
    groups_of,
    popularity,
    step,
    workers_of,
)
from support.interpreter import DTYPES, SKIPPED  # before the kernels

import dqrelo_kernels.ops  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels import reference
from dqrelo_kernels.gpu.low_rank import low_rank
from dqrelo_kernels.gpu.sign_matmul import sign_matmul
from dqrelo_kernels.rows import ExpertGroups, RowGroups
from dqrelo_kernels.table import (
    ABSENT,
    ALIGNMENT,
    FACTOR_DTYPES,
    Field,
    rebase,
)

# The interpreter multiplies tiles with BLAS, whose bits depend on the tile's shape.
TALL = pytest.param(300, marks=(pytest.mark.gpu, SKIPPED))


def linear(deltas, y, x, groups, table=None, arena=None) -> None:
    """Both launches, as ops.py makes them."""
    table = deltas.table.to(DEVICE) if table is None else table
    arena = deltas.arena if arena is None else arena
    scratch = deltas.scratch(len(x))
    step = (groups.rows, groups.starts)
    low_rank(scratch, x, arena, table, *step)
    sign_matmul(y, scratch, x, arena, table, deltas.slices.to(DEVICE), *step)


def check_linear(deltas: Deltas, y, x, got, slot_of_row: list[int]) -> None:
    """``got`` against the reference; rows of the base must not have changed."""
    groups = RowGroups(len(x), SLOTS, "cpu")
    groups.set(np.array(slot_of_row, dtype=np.int32))
    x, y, got, dtype = x.cpu().float(), y.cpu(), got.cpu(), x.dtype
    want = y.float()
    arena = deltas.arena.cpu()
    reference.delta_linear_(
        want,
        deltas.scratch(len(x)).cpu(),
        x,
        arena,
        deltas.table,
        deltas.slices,
        *groups.of_rows,
    )
    for slot in range(-1, SLOTS):
        rows = [i for i, s in enumerate(slot_of_row) if s == slot]
        if slot in (-1, EMPTY):
            assert torch.equal(got[rows].nan_to_num(), y[rows].nan_to_num())
        elif rows:
            # y itself is rounded once: to half a unit in the last place.
            rounding = want[rows].abs() * torch.finfo(dtype).eps / 2
            error = (got[rows].float() - want[rows]).abs()
            assert (error <= deltas.slack(x[rows], slot, dtype) + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "sizes", "k", "law"),
    [
        (1, [1], 5, "identical"),
        (5, [48], 64, "distinct"),
        (17, [192, 64, 64], 96, "uniform"),
        (17, [48], 272, "skewed"),
        (5, [48, 1, 70], 300, "zipf"),
        (17, [70], 576, "identical"),
        (133, [70], 96, "zipf"),
        (260, [130], 64, "skewed"),
        (9, [48], 96, "base"),
    ],
    ids=str,
)
def test_linear(rows, sizes, k, law, dtype):
    deltas = Deltas(sizes, k).fill()
    slot_of_row = popularity(law, rows)
    x, y = step(deltas, slot_of_row, dtype)
    got = y.clone()
    linear(deltas, got, x, groups_of(slot_of_row))
    check_linear(deltas, y, x, got, slot_of_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts(dtype):
    """Rows of three slots that chose one of four experts: twelve matrices a slice."""
    deltas = Deltas([48, 20], 96).fill()
    pairs = torch.arange(3 * 4) % SLOTS
    slots = torch.randint(-1, 3, (40,), generator=deltas.generator)
    experts = torch.randint(0, 4, (40,), generator=deltas.generator)
    slot_of_row = torch.where(slots < 0, -1, pairs[slots * 4 + experts]).tolist()
    x, y = step(deltas, slot_of_row, dtype)
    got = y.clone()
    groups = ExpertGroups.of(slots.int().to(DEVICE), experts.to(DEVICE), 3, 4)
    linear(deltas, got, x, groups, deltas.table[pairs].to(DEVICE))
    check_linear(deltas, y, x, got, slot_of_row)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTOR_DTYPES, ids=str)
@pytest.mark.parametrize("k", [5, 64, 299])
@pytest.mark.parametrize("ranks", [(1, 52, 130), (5, 64, 192)], ids=str)
def test_every_factor_dtype(ranks, k, factors, dtype):
    """Slice 1 finds its scratch behind ranks that are whole blocks and that are not."""
    deltas = Deltas([20, 33], k).fill(ranks=ranks, dtypes=(factors,))
    slot_of_row = [0, 1, 2, -1, 2]
    x, y = step(deltas, slot_of_row, dtype)
    got = y.clone()
    linear(deltas, got, x, groups_of(slot_of_row))
    check_linear(deltas, y, x, got, slot_of_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [5, 64, 299])
@pytest.mark.parametrize("field", [Field.LORA_A, Field.LORA_B], ids=lambda f: f.name)
def test_some_ranks_of_a_factor(field, k, dtype):
    """Each launch, of three workers that share a factor, against the reference."""
    deltas = Deltas([20, 33], k).fill()
    slot_of_row = [0, 1, 2, -1, 2]
    x, y = step(deltas, slot_of_row, dtype)
    groups, wide = groups_of(slot_of_row), x.cpu().float()
    rows = [part.cpu() for part in groups.of_rows]
    whole = torch.zeros_like(deltas.scratch(5)).cpu()
    reference.delta_shrink_(whole, wide, deltas.arena.cpu(), deltas.table, *rows)
    for table in workers_of(deltas, deltas.arena.cpu(), k, field):
        arena, on_device = deltas.arena, (table.to(DEVICE), groups.rows, groups.starts)
        if field == Field.LORA_A:
            got = deltas.scratch(5)
            want = got.cpu().clone()
            low_rank(got, x, arena, *on_device)
            reference.delta_shrink_(want, wide, arena.cpu(), table, *rows)
            assert torch.equal(got.cpu().isnan(), want.isnan())
            some = ~want.isnan()
            assert some.any()
            # float32 sums of k products in another order; on a device A is TF32, too.
            unit = 4 * k**0.5 * torch.finfo(torch.float32).eps + 2**-10 * HAS_DEVICE
            for row, slot in enumerate(slot_of_row):
                for entry in table[slot].tolist() if slot >= 0 else ():
                    a = reference.lora_a(arena.cpu(), entry, k).float()
                    first = entry[Field.FIRST_A]
                    mine = slice(first, first + len(a)) if len(a) else slice(0)
                    error = (got.cpu() - want)[row, mine].abs()
                    assert (error <= unit * (a.abs() @ wide[row].abs())).all()
            continue
        got, want = y.clone(), y.cpu().float()
        slices = deltas.slices
        sign_matmul(
            got,
            whole.to(DEVICE),
            x,
            arena,
            on_device[0],
            slices.to(DEVICE),
            *on_device[1:],
        )
        reference.delta_expand_(want, whole, wide, arena.cpu(), table, slices, *rows)
        for i, slot in enumerate(slot_of_row):
            if slot < 0:
                continue
            slack = deltas.slack(wide[i : i + 1], slot, dtype)[0]
            rounding = want[i].abs() * torch.finfo(dtype).eps / 2
            assert ((got[i].cpu().float() - want[i]).abs() <= slack + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [5, 250, 256, 272, 300])
def test_signs_are_exact(k, dtype):
    """Integers whose sums stay below 2^8 and scales of 1 leave nothing to round."""
    deltas = Deltas([20], k).fill(ranks=(0,), biases=False)
    for slot in (0, 1):
        row = deltas.table[slot, 0]
        row[Field.SCALE] = deltas.put(torch.ones(int(row[Field.PLANES]), 20))
    x = torch.randint(-2, 3, (6, k), generator=deltas.generator)
    x[:, torch.rand(k, generator=deltas.generator) > 0.4] = 0
    x[:, 0] = 1
    x = x.to(dtype).to(DEVICE)
    y = torch.zeros(6, 20, dtype=dtype, device=DEVICE)
    want = y.clone()
    groups = groups_of([0, 1, 2, 0, 1, -1])
    linear(deltas, y, x, groups)
    reference.delta_linear_(
        want,
        deltas.scratch(6),
        x,
        deltas.arena,
        deltas.table,
        deltas.slices,
        *groups.of_rows,
    )
    assert want.any()
    assert torch.equal(y, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [40, TALL])
def test_a_row_does_not_depend_on_its_neighbours(rows, dtype):
    deltas = Deltas([70], 300).fill()
    slot_of_row = popularity("zipf", rows)
    x, y = step(deltas, slot_of_row, dtype)
    together = y.clone()
    linear(deltas, together, x, groups_of(slot_of_row))
    for i in (0, 7, 22, rows - 1):
        alone = y[i : i + 1].clone()
        linear(deltas, alone, x[i : i + 1], groups_of(slot_of_row[i : i + 1]))
        assert torch.equal(alone[0], together[i])


def test_tensors_may_be_parts_of_wider_ones():
    deltas = Deltas([48, 20], 96).fill()
    slot_of_row = popularity("uniform", 9)
    x, y = step(deltas, slot_of_row, torch.float32)
    wide_x = torch.full((9, 200), torch.nan, device=DEVICE)
    wide_y = torch.full((9, 100), torch.nan, device=DEVICE)
    wide_table = torch.full((SLOTS, 5, len(Field)), 7, device=DEVICE)
    wide_x[:, 50:146], wide_y[:, 3:71], wide_table[:, 2:4] = x, y, deltas.table
    part_y, part_x = wide_y[:, 3:71], wide_x[:, 50:146]
    linear(deltas, part_y, part_x, groups_of(slot_of_row), wide_table[:, 2:4])
    check_linear(deltas, y, x, part_y, slot_of_row)
    assert wide_y[:, :3].isnan().all() and wide_y[:, 71:].isnan().all()


@pytest.mark.gpu
@SKIPPED
def test_offsets_beyond_two_gib():
    deltas = Deltas([20], 64).fill()
    x, y = step(deltas, [0, 1, 2], torch.float32)
    got = y.clone()
    start = 2**31 + ALIGNMENT
    arena = torch.zeros(start + deltas.size, dtype=torch.uint8, device=DEVICE)
    arena[start:] = deltas.arena
    entries = rebase(deltas.table.flatten(0, 1), start).view_as(deltas.table)
    linear(deltas, got, x, groups_of([0, 1, 2]), entries.to(DEVICE), arena)
    check_linear(deltas, y, x, got, [0, 1, 2])


@pytest.mark.slow
def test_kernels_compile_without_a_device(tmp_path):
    """The interpreter forgives what the compiler does not."""
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.ops.sass_report",
        "--target",
        "90",
        "--rows",
        "16",
    ]
    lines = subprocess.check_output(command, env=os.environ | variables, text=True)
    assert len(lines.splitlines()) == 5


VARIANTS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.ops.sass_report import launches
from dqrelo_kernels.gpu.merge import _merge_kernel as kernel

backend = make_backend(GPUTarget("cuda", 90, 32))
key = create_function_from_signature(kernel.signature, kernel.params, backend)
made = launches(16, torch.bfloat16, 4096, 64)[kernel]
for slot in (0, 1, 3, 16, 255):
    tensors = {n: torch.empty(16, dtype=v.dtype) for n, v in made.items()
               if isinstance(v, torch.Tensor)}
    _, variant, _ = key(**made | tensors | {"slot": slot})
    print(variant)
"""


def test_one_variant_of_merge_serves_all_slots():
    """Triton compiles a variant for 1 and for multiples of 16, if it is let."""
    variables = os.environ | {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", VARIANTS]
    found = subprocess.check_output(command, env=variables, text=True).splitlines()
    assert len(found) == 5 and len(set(found)) == 1


def op_arguments(deltas: Deltas, groups: RowGroups, rows: int) -> dict:
    """What torch.ops.dqrelo.delta_linear_ takes besides x and y."""
    return {
        "scratch": deltas.scratch(rows),
        "arena": deltas.arena,
        "table": deltas.table.to(DEVICE),
        "slices": deltas.slices.to(DEVICE),
        "rows": groups.rows,
        "slots": groups.slots,
        "starts": groups.starts,
        "num_active": groups.num_active,
    }


@pytest.mark.gpu
@SKIPPED
def test_a_graph_replays_other_deltas():
    """Captured with one delta of rank 1, replayed with four of other ranks."""
    slot_of_row = popularity("zipf", 17)
    small = Deltas([70, 48], 300).fill(ranks=(1,), biases=False)
    large = Deltas([70, 48], 300, seed=1).fill()
    groups, (x, y) = groups_of([0] * 17), step(large, slot_of_row, torch.bfloat16)
    got = torch.zeros_like(y)
    static = op_arguments(large, groups, 17)
    static["arena"][: small.size] = small.arena
    static["table"][1:] = ABSENT
    static["table"][0] = small.table[0]
    launch = torch.ops.dqrelo.delta_linear_
    launch(y=got, x=x, **static)  # compiles, which a capture must not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(y=got, x=x, **static)
    static["arena"].copy_(large.arena)
    static["table"].copy_(large.table)
    groups.set(np.array(slot_of_row, dtype=np.int32))
    got.copy_(y)
    graph.replay()
    check_linear(large, y, x, got, slot_of_row)


@pytest.mark.gpu
@SKIPPED
@pytest.mark.parametrize("rows", [17, 300])
def test_a_hundred_runs_agree_to_the_bit(rows):
    deltas = Deltas([192, 64, 64], 576).fill()
    slot_of_row = popularity("uniform", rows)
    x, y = step(deltas, slot_of_row, torch.bfloat16)
    arguments = op_arguments(deltas, groups_of(slot_of_row), rows)
    results = []
    for _ in range(100):
        results.append(y.clone())
        torch.ops.dqrelo.delta_linear_(y=results[-1], x=x, **arguments)
    bits = torch.stack(results).view(torch.int16)
    assert (bits == bits[0]).all()


@pytest.mark.gpu
@SKIPPED
def test_no_active_delta_launches_nothing():
    deltas = Deltas([48], 96).fill()
    x, y = step(deltas, [0, 1, 2], torch.bfloat16)
    arguments = op_arguments(deltas, groups_of([0, 1, 2]), 3)
    arguments["num_active"] = torch.zeros(1, dtype=torch.int32)
    before = y.clone()
    torch.ops.dqrelo.delta_linear_(y=y, x=x, **arguments)
    assert torch.equal(y, before)
