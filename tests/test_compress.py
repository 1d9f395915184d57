# SPDX-License-Identifier: Apache-2.0
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dqrelo_kernels.layout import pack_int4, unpack_int4
from dqrelo_tools import pieces
from dqrelo_tools.compress import (
    Factors,
    Planes,
    compress,
    four_levels,
    squared_norm,
    strength,
)
from dqrelo_tools.convert import convert_parameter
from dqrelo_tools.method import METHODS, PAPER, Method, Size, rank_of
from dqrelo_tools.spectrum import Spectrum
from dqrelo_tools.svd import truncated_svd
from vllm_dqrelo.format import tensors
from vllm_dqrelo.format.tensors import INT4

SHAPES = [(48, 80), (80, 48), (33, 33), (1, 40), (40, 1)]


def paper(delta: np.ndarray, ratio: float) -> np.ndarray:
    """Section 3.3 of arXiv 2604.16940 in numpy, float64, before any rounding."""
    n, m = delta.shape
    alpha = np.abs(delta).sum() / (n * m)
    quantised = alpha * np.where(delta > 0, 1.0, -1.0)
    u, s, vt = np.linalg.svd(delta - quantised, full_matrices=False)
    r = math.ceil(n * m * (ratio - 1 / 16) / (n + m))
    return quantised + u[:, :r] @ np.diag(s[:r]) @ vt[:r]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [1 / 16, 3 / 32, 1 / 8, 1 / 2])
def test_compress_is_the_paper(shape, ratio):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 2e-3
    delta[0, 0] = 0.0  # sign(0) is -1
    expected = paper(delta.double().numpy(), ratio)
    got = compress(delta, PAPER.size(*shape, ratio, torch.float16), PAPER)
    # Each factor element is rounded to 11 bits; sum |b||a| over the rank bounds it.
    rounding = got.lora_b.double().abs() @ got.lora_a.double().abs() * 2**-10
    bound = rounding + 4 * torch.finfo(torch.float32).eps * delta.abs().max()
    assert ((got.dense().double() - torch.tensor(expected)).abs() <= bound).all()


@pytest.mark.parametrize(
    ("n", "k", "rank"),
    [(4096, 4096, 128), (1024, 4096, 52), (14336, 4096, 200), (128256, 4096, 249)],
)
def test_rank_of_the_papers_models(n, k, rank):
    assert rank_of(n, k, 1 / 8) == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_truncated_svd_is_the_best_approximation(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    singular = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    for rank in range(min(shape) + 1):
        b, a = truncated_svd(matrix, rank)
        error = (matrix.double() - b @ a).square().sum()
        assert error == pytest.approx((singular[rank:] ** 2).sum(), abs=1e-9)


def test_a_matrix_of_rank_one_and_a_change_of_one_element():
    outer = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))
    b, a = truncated_svd(outer, 3)
    assert torch.allclose(b @ a, outer.double(), atol=1e-9)
    delta = torch.zeros(32, 32)
    delta[3, 4] = 1.0
    got = compress(delta, PAPER.size(32, 32, 1 / 8, torch.bfloat16), PAPER)
    assert got.scale.item() == pytest.approx(1 / 1024) and got.dense().isfinite().all()


def change(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Noise of rows of different sizes, and something of low rank."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, k, generator=generator)
    noise *= torch.rand(n, 1, generator=generator) + 0.5
    low = torch.randn(n, 3, generator=generator) @ torch.randn(
        3, k, generator=generator
    )
    return 1e-3 * (noise + low)


def error_of(delta: torch.Tensor, method: Method, ratio: float) -> float:
    size = method.size(*delta.shape, ratio, torch.bfloat16)
    got = compress(delta, size, method)
    missed = delta.double() - got.dense().double()
    spent = sum(tensor.nbytes for tensor in got.tensors("P").values())
    assert spent <= size.bytes(*delta.shape)
    if got.rank != size.rank:  # a change of few ranks
        size = replace(size, rank=size.rank // 2, dtype=torch.int8)
    assert spent == size.bytes(*delta.shape)
    return float(missed.square().sum() / delta.double().square().sum())


@pytest.mark.parametrize("ratio", [1 / 16, 3 / 32, 1 / 8, 1 / 4])
def test_better_than_the_paper_in_no_more_bytes(ratio):
    delta = change(300, 200)
    ours, paper = (METHODS[m].size(300, 200, ratio, torch.bfloat16) for m in METHODS)
    assert ours.bytes(300, 200) <= paper.bytes(300, 200)
    errors = [error_of(delta, METHODS[m], ratio) for m in METHODS]
    assert errors[0] < 0.75 * errors[1]


def test_more_sweeps_are_never_worse():
    delta = change(90, 130)
    for first in (True, False):
        errors = [
            error_of(delta, Method(low_rank_first=first, sweeps=sweeps), 1 / 8)
            for sweeps in range(5)
        ]
        assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


def test_more_bytes_are_never_worse():
    delta = change(128, 96)
    errors = [error_of(delta, Method(planes=1), r / 32) for r in (3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)


def test_two_planes_are_lloyds_quantiser():
    matrix = change(5, 400)
    planes = Planes.of(matrix, Size(2, 0, INT4)).dense()
    for row, got in zip(matrix, planes, strict=True):
        low, high, _ = (v[0] for v in four_levels(row.abs()[None]))
        nearest = torch.where(
            (row.abs() - low).abs() < (row.abs() - high).abs(), low, high
        )
        assert torch.allclose(got, torch.where(row > 0, nearest, -nearest), atol=1e-9)
    # A Gaussian's best four levels leave 0.1175 of its variance.
    gauss = torch.randn(4, 20000, generator=torch.Generator().manual_seed(1))
    left = (gauss - Planes.of(gauss, Size(2, 0, INT4)).dense()).square().mean()
    assert left == pytest.approx(0.1175, rel=0.03)


@pytest.mark.parametrize("dtype", [INT4, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_integer_factors(shape, dtype):
    """They lose what rounding a Gaussian to so many bits loses, twice, or less."""
    matrix = change(*shape)
    rank = min(shape)
    part = Factors.of(matrix, rank, dtype)
    largest = 7 if dtype == INT4 else 127
    assert part.a.dtype == torch.int8 and part.a.abs().max() <= largest
    assert part.b.abs().max() <= largest
    left = (matrix - part.dense()).square().sum() / matrix.square().sum()
    assert left < (0.03 if dtype == INT4 else 2e-4)


@pytest.mark.parametrize("dtype", [INT4, torch.int8])
@pytest.mark.parametrize("shape", SHAPES)
def test_refitted_factors_are_least_squares_of_rounded_ones(shape, dtype):
    """First A to the integers of B, then B to the integers of A."""
    first, second = change(*shape).double(), change(*shape, seed=7).double()
    start = Factors.of(first.float(), max(min(shape) // 3, 1), dtype, refit=False)
    matrix = first + 0.3 * second
    got = start.refitted(matrix.float())
    a = rounded(torch.linalg.lstsq(start.b.double(), matrix).solution, dtype)
    b = rounded(torch.linalg.lstsq(a.T, matrix.T).solution, dtype).T
    # Two ridges of 1e-6, times the condition of a Gram matrix, which is at most 5 here.
    assert torch.linalg.cond(start.b.double()) ** 2 < 5
    missed = (got.dense() - b @ a).norm() / (b @ a).norm()
    assert missed < 2 * 1e-6 * 5
    errors = [float((matrix - f.dense()).square().sum()) for f in (start, got)]
    assert errors[1] < errors[0]


def rounded(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Each row in the integers of the best of a few scales, by a plain loop."""
    largest = 7 if dtype == INT4 else 127
    out = []
    for row in rows:
        steps = [c * row.abs().max() / largest for c in (1, 0.85, 0.72, 0.6, 0.5)]
        steps = steps if dtype == INT4 else steps[:1]
        tries = [(row / s).round().clamp(-largest, largest) * s for s in steps]
        out.append(min(tries, key=lambda one: float((row - one).square().sum())))
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [INT4, torch.int8])
@pytest.mark.parametrize("rank", [1, 2, 7, 8])
def test_halves_are_fitted_one_to_what_the_other_leaves(rank, dtype):
    matrix = change(60, 90)
    first = Factors.of(matrix, rank - rank // 2, dtype)
    second = Factors.of(matrix - first.dense(), rank // 2, dtype)
    both = Factors.in_halves(matrix, rank, dtype)
    assert both.a.shape == (rank, 90) and both.b.shape == (60, rank)
    assert both.a.dtype == both.b.dtype == torch.int8 and both.scale.shape == (rank,)
    torch.testing.assert_close(both.dense(), first.dense() + second.dense())


def test_halves_keep_the_rows_that_differ_from_a_drift_of_all_rows():
    """Rounding a large drift to four bits would cost more than what differs."""
    generator = torch.Generator().manual_seed(3)
    drift = torch.randn(1, 64, generator=generator) * (
        1 + torch.rand(512, 1, generator=generator)
    )
    own = torch.randn(512, 4, generator=generator)
    own = 0.2 * own @ torch.randn(4, 64, generator=generator)
    lost = [
        float((drift + own - fit(drift + own, 12, INT4).dense()).square().sum())
        for fit in (Factors.of, Factors.in_halves)
    ]
    assert lost[1] < 0.3 * lost[0] and lost[1] < 0.01 * own.square().sum()


def test_a_matrix_of_zeros_and_more_rank_than_there_is():
    for dtype in (INT4, torch.int8, torch.bfloat16):
        assert not Factors.of(torch.zeros(8, 6), 4, dtype).dense().any()
    for dtype in (INT4, torch.int8):
        assert not Factors.in_halves(torch.zeros(8, 6), 4, dtype).dense().any()
    for dtype in (INT4, torch.int8, torch.bfloat16):
        outer = torch.outer(torch.arange(1.0, 9), torch.arange(1.0, 5))
        got = Factors.of(outer, 4, dtype).dense()
        assert (got - outer).square().sum() < 0.01 * outer.square().sum()


def test_int4_golden_bytes():
    values = torch.tensor([[-8, 7, 0, 1, -1]], dtype=torch.int8)
    packed = pack_int4(values)  # a block of 5 columns is 3 bytes; spare bits clear
    assert packed.tolist() == [[0x90, 0x7F, 0x08]]
    assert torch.equal(unpack_int4(packed, 5), values)


@pytest.mark.parametrize("ratio", [1 / 32, 1 / 16, 3 / 32, 1 / 8, 1])
def test_a_low_rank_part_alone_has_the_length_of_the_change_up_to_a_twentieth(ratio):
    # Singular values that fall slowly, as a full fine-tune's do.
    u, values, v = torch.linalg.svd(randn(5, 300, 200), full_matrices=False)
    delta = 1e-3 * u @ torch.diag(values**2) @ v
    method = METHODS["dqrelo"]
    size = replace(method.size(300, 200, ratio, torch.bfloat16), planes=0)
    fitted = Factors.of(delta, size.rank, INT4).dense().double()
    got = compress(delta, size, method).dense().double()
    factor = min(float(delta.double().norm() / fitted.norm()), 1.05)
    # The same float32 sums of rank terms, of which each is rounded in another place.
    slack = 8 * torch.finfo(torch.float32).eps * float(delta.abs().max())
    torch.testing.assert_close(got, factor * fitted, rtol=1e-6, atol=slack)
    assert factor == pytest.approx(strength(delta, delta - fitted))
    assert factor == 1.05 if ratio <= 1 / 16 else 1 < factor <= 1.05
    assert ratio < 1 or factor < 1.05


@pytest.mark.parametrize("ratio", [1 / 16, 1 / 8])
@pytest.mark.parametrize("method", METHODS)
def test_an_embedding_and_an_lm_head_without_signs_are_in_halves(method, ratio):
    """No other matrix is, and none with sign planes, nor one of the paper's."""
    delta = change(300, 64)
    size = METHODS[method].size(300, 64, ratio, torch.bfloat16)
    halves = compress(delta, size, METHODS[method], of_tokens=True)
    at_once = compress(delta, size, METHODS[method])
    for name, expected in {
        "model.embed_tokens.weight": halves,
        "lm_head.weight": halves,
        "transformer.wte.weight": halves,
        "model.layers.0.mlp.up_proj.weight": at_once,
        "model.other_lm_head.weight": at_once,
    }.items():
        tuned = delta.to(torch.bfloat16)
        _, got = convert_parameter(name, tuned, delta, ratio, METHODS[method])
        want = expected.tensors(name)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) for key in want), name
    alone = method == "dqrelo" and ratio < 1 / 8
    assert torch.equal(halves.dense(), at_once.dense()) == (not alone)


def test_signs_and_floats_and_the_paper_are_as_long_as_they_were_fitted():
    delta = change(60, 90)
    for method, planes in ((Method(planes=1), 1), (Method(planes=0, dtype=None), 0)):
        size = method.size(60, 90, 1 / 4, torch.bfloat16)
        assert size.planes == planes
        got = compress(delta, size, replace(method, sweeps=0))
        part = Factors.of(delta, size.rank, size.dtype)
        planes_of_rest = Planes.of(delta - part.dense(), size)
        torch.testing.assert_close(got.dense(), part.dense() + planes_of_rest.dense())


def test_strength_of_nothing_and_of_more_than_the_change():
    one = torch.ones(2, 2)
    assert strength(one, one) == strength(one, -one) == 1
    assert strength(one, 0 * one) == 1
    assert strength(1.01 * one, 0.01 * one) == pytest.approx(1.01)


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 16, 1 / 32])
def test_the_change_of_a_merged_adapter_keeps_its_few_ranks(ratio):
    """What bfloat16 rounds of the merged weights is not taken for the change."""
    base = (0.05 * randn(1, 400, 256)).bfloat16().float()
    change = 3e-4 * randn(2, 400, 8) @ randn(3, 8, 256)
    delta = (base + change).bfloat16().float() - base
    size = METHODS["dqrelo"].size(400, 256, ratio, torch.bfloat16)
    matrix = compress(delta, size, METHODS["dqrelo"])
    assert matrix.lora_a.dtype == torch.int8 and matrix.rank == size.rank // 2
    tensors = matrix.tensors("w").values()
    assert sum(tensor.nbytes for tensor in tensors) <= size.bytes(400, 256)
    kept = matrix.lora_b.float() @ (matrix.lora_scale[:, None] * matrix.lora_a.float())
    # Neither longer nor shorter than the change, and its directions.
    along = float((kept * change).sum() / change.square().sum())
    assert along == pytest.approx(1, abs=0.01)
    noise = float((delta - change).norm() / change.norm())
    assert float((kept - change).norm() / change.norm()) < noise
    flat = compress(1e-3 * randn(4, 400, 256), size, METHODS["dqrelo"])
    assert flat.lora_a.dtype == torch.uint8 and flat.rank == size.rank
    spectrum = Spectrum.of(delta)
    assert spectrum.taken(size) == replace(size, rank=matrix.rank, dtype=torch.int8)
    left = squared_norm(delta - matrix.dense())
    assert 0.8 < spectrum.error(size) / left < 1.25


@pytest.mark.parametrize("ratio", [1 / 16, 1 / 8, 1 / 4])
@pytest.mark.parametrize("method", ["dqrelo", "dqrelo-paper"])
def test_a_matrix_in_pieces_is_the_matrix_at_once(method, ratio, monkeypatch):
    """The last piece has fewer rows. Sums of float64 are rounded in another order."""
    delta = change(70, 90)
    size = METHODS[method].size(70, 90, ratio, torch.bfloat16)
    whole = compress(delta, size, METHODS[method])
    dense, spectrum = whole.dense(), Spectrum.of(delta)
    monkeypatch.setattr(tensors, "ROWS", 16)
    assert torch.equal(whole.dense(), dense)
    monkeypatch.setattr(pieces, "ELEMENTS", 16 * 90)
    assert len(pieces.pieces(delta)) == 5
    cut = compress(delta, size, METHODS[method])
    slack = 8 * torch.finfo(torch.float32).eps * float(delta.abs().max())
    torch.testing.assert_close(cut.dense(), dense, rtol=1e-6, atol=slack)
    assert torch.equal(cut.signs, whole.signs)
    torch.testing.assert_close(Spectrum.of(delta).squares, spectrum.squares)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
