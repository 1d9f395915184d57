# SPDX-License-Identifier: Apache-2.0
"""Spectra and what they predict, and how a budget is divided among matrices."""

import itertools

import numpy as np
import pytest
import torch

from dqrelo_tools.allocate import allocate, files_bytes, hull, options
from dqrelo_tools.compress import compress
from dqrelo_tools.method import Method, Size
from dqrelo_tools.spectrum import EPS, RHO, TOP, Spectrum
from dqrelo_tools.svd import EXACT_SVD
from vllm_dqrelo.format.tensors import INT4

MB = 10**6


def change(n: int, k: int, kind: str = "flat", seed: int = 0) -> torch.Tensor:
    """Noise, with singular values that decay or with something of low rank."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator)
    if kind == "decaying":
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        matrix = u @ torch.diag(s * torch.arange(1, len(s) + 1) ** -0.5) @ vt
    if kind == "low":
        left = torch.randn(n, 4, generator=generator)
        matrix += left @ torch.randn(4, k, generator=generator)
    return 1e-3 * matrix


# The spectrum and its prediction.


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (1, 40), (40, 1)])
def test_a_small_spectrum_is_numpys(shape):
    matrix = change(*shape, "decaying")
    singular = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    spectrum = Spectrum.of(matrix)
    squares = singular**2
    assert np.allclose(spectrum.squares, squares, rtol=1e-9, atol=1e-15 * squares[0])
    assert spectrum.total == pytest.approx(squares.sum())
    assert spectrum.largest == pytest.approx(singular[0])
    assert spectrum.mean == pytest.approx(singular.mean())
    for share in (0.5, 0.9, 1e-9):
        rank = spectrum.rank_holding(share)
        assert squares[:rank].sum() >= share * squares.sum() > squares[: rank - 1].sum()


def test_a_large_spectrum_has_its_top_and_its_norm():
    """The rest is flat, so that no rank is said to hold more than it does."""
    matrix = change(1200, EXACT_SVD + 6)
    spectrum = Spectrum.of(matrix)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    heads, exact = spectrum.heads.numpy(), np.cumsum([0, *squares])
    assert heads.shape == exact.shape
    assert heads[-1] == pytest.approx(exact[-1])
    assert (heads <= exact * (1 + 1e-6)).all()
    assert heads[:TOP] == pytest.approx(exact[:TOP], rel=0.03)
    assert len(set(spectrum.squares[TOP:].tolist())) == 1


@pytest.mark.parametrize("kind", ["flat", "decaying", "low"])
@pytest.mark.parametrize("shape", [(300, 200), (256, 512)])
def test_the_prediction_is_near_what_compress_leaves(kind, shape):
    """Up to a tenth of the full rank; beyond, the sweeps do better than it says."""
    delta = change(*shape, kind)
    spectrum = Spectrum.of(delta)
    for planes, rank in itertools.product((0, 1, 2), (8, 20)):
        size = Size(planes, rank, INT4)
        got = compress(delta, size, Method()).dense()
        measured = (delta - got).square().sum(dtype=torch.float64)
        assert 0.97 < spectrum.error(size) / measured < 1.25
    assert spectrum.error(Size(0, 0, INT4)) == spectrum.total


# A budget and how it is divided.

TINY = {f"m{i}": shape for i, shape in enumerate([(12, 20), (24, 8), (10, 10)])}


def tiny_spectra() -> dict[str, Spectrum]:
    kinds = ("flat", "decaying", "low")
    pairs = zip(TINY.items(), kinds, strict=True)
    return {name: Spectrum.of(change(*shape, kind)) for (name, shape), kind in pairs}


def objective(spectra, sizes) -> float:
    """The sum that docs call weights times relative squared error, spelt out."""
    total = 0.0
    for name, size in sizes.items():
        n, k = spectra[name].shape
        squares = spectra[name].squares.numpy()
        missed = squares[size.rank :].sum() + EPS * squares[: size.rank].sum()
        total += n * k * RHO[size.planes] * missed / squares.sum()
    return total


def test_as_good_as_brute_force_but_for_one_step():
    spectra = tiny_spectra()
    found = {name: options(name, spectrum) for name, spectrum in spectra.items()}
    all_of_them = [
        (sum(o.bytes for o in some), sum(o.error for o in some))
        for some in itertools.product(*found.values())
    ]
    costs, errors = (np.array(column) for column in zip(*all_of_them, strict=True))
    step = max(
        there.bytes - here.bytes
        for some in found.values()
        for here, there in itertools.pairwise(hull(some))
    )
    prices = {
        name: {option.size: option.bytes for option in some}
        for name, some in found.items()
    }
    tight = 0
    for content in range(costs.min(), costs.max() + 40, 7):
        chosen = allocate(spectra, {}, files_bytes(int(content), MB), MB)
        got = objective(spectra, chosen)
        spent = sum(prices[name][size] for name, size in chosen.items())
        assert spent <= content
        least = errors[costs <= content - step].min(initial=np.inf)
        assert errors[costs <= content].min() - 1e-9 <= got <= least + 1e-9
        tight += bool(np.isclose(got, errors[costs <= spent].min(), rtol=1e-9))
    # Those along the hulls are the best there are for what they take.
    assert tight > 0.5 * len(range(costs.min(), costs.max() + 40, 7))


@pytest.mark.parametrize("kind", ["flat", "decaying", "low"])
def test_one_matrix_has_the_best_that_fits(kind):
    """Not only of those on the hull, which are far apart where a plane begins."""
    spectra = {"m": Spectrum.of(change(40, 60, kind))}
    found = options("m", spectra["m"])
    for content in range(found[0].bytes, 2500, 11):
        size = allocate(spectra, {}, files_bytes(content, MB), MB)["m"]
        best = min(o.error for o in found if o.bytes <= content)
        assert objective(spectra, {"m": size}) == pytest.approx(best)


def test_more_budget_is_never_worse():
    spectra = tiny_spectra()
    errors = [
        objective(spectra, allocate(spectra, {"norm": 96}, budget, MB))
        for budget in range(2600, 6000, 3)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_planes_only_beside_a_bit_of_low_rank():
    sizes = [option.size for option in options("m", Spectrum.of(change(200, 300)))]
    beside = [size.rank for size in sizes if size.planes]
    # Four bits for each of n + k numbers, and 32 for a scale.
    assert min(beside) == 2 * -(-(200 * 300) // (500 * 4 + 32) // 2)
    assert {size.rank for size in sizes} == {1, *range(2, 201, 2)}
    assert {size.planes for size in sizes} == {0, 1, 2}


def test_a_matrix_counts_by_its_relative_error():
    """A change a thousand times as small gets as much."""
    spectra = {
        "a": Spectrum.of(change(40, 60)),
        "b": Spectrum.of(change(40, 60, "low")),
    }
    small = Spectrum((40, 60), spectra["b"].squares / 2**20)
    for budget in range(1500, 5000, 100):
        sizes = allocate(spectra, {}, budget, MB)
        assert sizes == allocate(spectra | {"b": small}, {}, budget, MB)
