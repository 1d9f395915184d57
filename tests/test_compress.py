# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from dqrelo_tools.compress import compress, rank_of, truncated_svd

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
    got = compress(delta, ratio, torch.float16)
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
    got = compress(delta, 1 / 8, torch.bfloat16)
    assert got.scale.item() == pytest.approx(1 / 1024) and got.dense().isfinite().all()
