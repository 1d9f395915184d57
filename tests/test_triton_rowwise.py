# SPDX-License-Identifier: Apache-2.0
"""The Triton launchers of merged matrices, embeddings and norms against the reference.

Without a CUDA device they run in Triton's interpreter; bf16 needs a device.
"""

import pytest
import torch
from support.deltas import (
    BIASES,
    DEVICE,
    EMPTY,
    HAS_DEVICE,
    SLOTS,
    Deltas,
    groups_of,
    popularity,
)
from support.interpreter import DTYPES  # before the kernels

from dqrelo_kernels import reference
from dqrelo_kernels.gpu.device import check_rows
from dqrelo_kernels.gpu.low_rank import low_rank
from dqrelo_kernels.gpu.merge import merge
from dqrelo_kernels.gpu.rowwise import embedding, norm
from dqrelo_kernels.gpu.sign_matmul import sign_matmul
from dqrelo_kernels.table import ABSENT, FACTOR_DTYPES, Field


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("sizes", "k"), [([1], 5), ([48, 1, 70], 299)], ids=str)
def test_merge(sizes, k, has_bias, dtype):
    deltas = Deltas(sizes, k).fill()
    n, eps, unit = (
        sum(sizes),
        torch.finfo(torch.float32).eps,
        torch.finfo(dtype).eps / 2,
    )
    # B and A as bf16
    lost = 2**-8 if HAS_DEVICE and dtype != torch.float32 else 0
    weight = deltas.random(n, k + 8).to(dtype)[:, :k]
    bias = deltas.random(n).to(dtype) if has_bias else None
    for slot in range(SLOTS):
        parts = deltas.arena.cpu(), deltas.table, deltas.slices, slot
        got, want = (
            (torch.full((n, k), torch.nan, **kind), torch.full((n,), torch.nan, **kind))
            for kind in ({"dtype": dtype, "device": DEVICE}, {"dtype": torch.float32})
        )
        merge(
            *got,
            weight.to(DEVICE),
            bias if bias is None else bias.to(DEVICE),
            *(p.to(DEVICE) if isinstance(p, torch.Tensor) else p for p in parts),
        )
        wide = None if bias is None else bias.float()
        reference.merge_(*want, weight.float(), wide, *parts)
        if slot == EMPTY:
            assert torch.equal(got[0].cpu(), weight)
        start = 0
        for j, size in enumerate(sizes):
            rows, start = slice(start, start + size), start + size
            entry = deltas.table[slot, j].tolist()
            planes = reference.planes(parts[0], entry, size, k)
            terms = weight[rows].float().abs() + sum(scale.abs() for scale, _ in planes)
            slack = 4 * eps * terms
            if entry[Field.RANK_A] != ABSENT:
                a = reference.lora_a(parts[0], entry, k)
                b = reference.lora_b(parts[0], entry, size)
                product = b.float().abs() @ a.float().abs()
                slack += product * (4 * entry[Field.RANK_A] ** 0.5 * eps + lost)
            error = (got[0].cpu()[rows].float() - want[0][rows]).abs()
            assert (error <= slack + want[0][rows].abs() * unit).all()
        error = (got[1].cpu().float() - want[1]).abs()
        assert (error <= want[1].abs() * unit + 2 * eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [5, 96, 300])
@pytest.mark.parametrize("factors", FACTOR_DTYPES, ids=str)
def test_embedding(factors, k, dtype):
    deltas = Deltas([40], k).fill(ranks=(1, 52, 130), dtypes=(factors,), biases=False)
    slot_of_row = popularity("uniform", 17)
    groups = groups_of(slot_of_row)
    y = deltas.random(17, k).to(dtype).to(DEVICE)
    ids = torch.randint(0, 40, (17,), generator=deltas.generator).to(DEVICE)
    want, got, table = y.float(), y.clone(), deltas.table.to(DEVICE)
    step = (deltas.arena, table, deltas.slices.to(DEVICE), groups.rows, groups.slots)
    embedding(got, ids, *step)
    reference.delta_embedding_(want, ids, *step, groups.num_active)
    # At most 130 products of a few units each, summed in float32; y rounded once.
    torch.testing.assert_close(
        got.float(), want, rtol=torch.finfo(dtype).eps / 2 + 1e-6, atol=1e-4
    )
    base = [i for i, slot in enumerate(slot_of_row) if slot in (-1, EMPTY, BIASES)]
    assert torch.equal(got[base], y[base])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 96), (9, 3, 20)], ids=str)
@pytest.mark.parametrize("centred", [False, True])
def test_norm(centred, shape, dtype):
    deltas = Deltas([shape[-1]], shape[-1])
    for slot in (0, 1):
        weight = deltas.random(shape[-1])
        deltas.table[slot, 0, Field.WEIGHT] = deltas.put(weight)
    deltas.table[1, 0, Field.BIAS] = deltas.put(deltas.random(shape[-1]))
    slot_of_row = popularity("uniform", 9)
    groups = groups_of(slot_of_row)
    # x is a part of a wider tensor, as q is of the fused q/k/v.
    wide = deltas.random(*shape[:-1], 3 * shape[-1]).to(dtype).to(DEVICE)
    x = wide[..., shape[-1] : 2 * shape[-1]]
    y = deltas.random(*shape).to(dtype).to(DEVICE)
    want, got = y.float(), y.clone()
    table = deltas.table.to(DEVICE)
    arguments = (deltas.arena, table, groups.rows, groups.slots)
    norm(got, x, *arguments, 1e-5, centred)
    reference.delta_norm_(want, x, *arguments, groups.num_active, 1e-5, centred)
    # Two float32 means of 96 numbers, a square root, two products, of numbers below
    # 10; y rounded once.
    torch.testing.assert_close(
        got.float(), want, rtol=torch.finfo(dtype).eps / 2 + 2e-6, atol=2e-6
    )
    kept = ~torch.isin(torch.tensor(slot_of_row), torch.tensor([0, 1]))
    assert torch.equal(got[kept], y[kept])


def test_elements_of_a_row_that_are_apart():
    """The kernels would read others; a single column has any stride."""
    deltas, groups = Deltas([8], 8).fill(), groups_of([0, 1, 2, -1, 0, 1, 2, -1])
    site = deltas.arena, deltas.table.to(DEVICE)
    slices, scratch = deltas.slices.to(DEVICE), deltas.scratch(8)
    few, by_slot = (groups.rows, groups.slots), (groups.rows, groups.starts)
    good, bad = torch.ones(8, 8, device=DEVICE), torch.ones(8, 8, device=DEVICE).T
    line, apart = good[0], bad[0]
    ids = torch.arange(8, device=DEVICE)
    for name, launch, *arguments in (
        ("x", low_rank, scratch, bad, *site, *by_slot),
        ("scratch", low_rank, scratch[:, ::2], good, *site, *by_slot),
        ("y", sign_matmul, bad, scratch, good, *site, slices, *by_slot),
        ("x", sign_matmul, good, scratch, bad, *site, slices, *by_slot),
        ("y", embedding, bad, ids, *site, slices, *few),
        ("y", norm, bad, good, *site, *few, 1e-5, False),
        ("x", norm, good, bad, *site, *few, 1e-5, False),
        ("weight", merge, good, line, bad, None, *site, slices, 0),
        ("bias", merge, good, line, good, apart, *site, slices, 0),
        ("merged", merge, bad, line, good, None, *site, slices, 0),
        ("merged_bias", merge, good, apart, good, None, *site, slices, 0),
    ):
        with pytest.raises(ValueError, match=rf"^{name} \[.* has strides \("):
            launch(*arguments)
    column = torch.ones(2, 8, device=DEVICE).T[:, :1]
    check_rows(column=column)
