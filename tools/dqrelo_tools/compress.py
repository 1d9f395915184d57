# SPDX-License-Identifier: Apache-2.0
"""The mathematics of one matrix (arXiv 2604.16940, section 3.3). No I/O."""

import math

import torch

from dqrelo_kernels.layout import pack_signs
from vllm_dqrelo.format.tensors import MatrixDelta

BITS = 16  # of a full-precision weight; the sign plane is 1/BITS of it
MIN_RATIO = 1 / BITS
METHOD = "dqrelo-paper"

EXACT_SVD = 1024  # smaller side up to which the SVD is exact
OVERSAMPLING = 32
POWER_ITERATIONS = 4


def rank_of(n: int, k: int, ratio: float) -> int:
    """The rank that fills what the sign plane leaves of the ratio.

    Semantics: ``ceil(n k p1 / (n + k))`` with ``p1 = ratio - 1/16`` (equations 12
    and 16).
    """
    return math.ceil(n * k * (ratio - MIN_RATIO) / (n + k))


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation ``B A`` of rank at most ``rank`` (equations 11 to 14).

    Semantics: ``B = U_r sqrt(S_r), A = sqrt(S_r) V_r^T`` of ``matrix = U S V^T``.
    The right singular vectors are those of the largest eigenvalues of the smaller
    Gram matrix in float64: exact where it is small, by subspace iteration (Halko,
    Martinsson and Tropp, arXiv 0909.4061, algorithm 4.4) where it is large.

    Args:
        matrix: [N, K] float32.
        rank: at most min(N, K).

    Returns:
        B [N, rank] and A [rank, K], float64 (float32 where iterated).
    """
    tall = matrix.shape[0] >= matrix.shape[1]
    m = matrix if tall else matrix.T
    if m.shape[1] <= EXACT_SVD:
        m = m.double()
        _, vectors = torch.linalg.eigh(m.T @ m)  # ascending
        v = vectors[:, -rank:].flip(1) if rank else vectors[:, :0]
    else:
        v = top_right_singular_vectors(m, rank)
    us = m @ v
    singular = us.norm(dim=0)
    root = singular.sqrt()
    left = us / root.clamp_min(torch.finfo(root.dtype).tiny)
    right = (v * root).T
    return (left, right) if tall else (right.T, left.T)


def top_right_singular_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """V_r [K, rank] of a tall ``matrix`` [N, K], seeded: the same every time."""
    generator = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLING, matrix.shape[1])
    start = torch.randn(matrix.shape[0], width, generator=generator)
    v = torch.linalg.qr(matrix.T @ start.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        u = torch.linalg.qr(matrix @ v).Q
        v = torch.linalg.qr(matrix.T @ u).Q
    small = (matrix @ v).double()  # [N, width], its right vectors turn v into V
    _, turns = torch.linalg.eigh(small.T @ small)
    return v @ turns[:, -rank:].flip(1).to(v.dtype) if rank else v[:, :0]


def compress(
    delta: torch.Tensor, ratio: float, factor_dtype: torch.dtype
) -> MatrixDelta:
    """One pass of D-QRELO.

    Semantics: ``delta ~ alpha sign(delta) + B A`` with ``alpha = mean |delta|``,
    ``sign(0) = -1`` and ``B A`` the truncated SVD of the remainder (equations 6 to 15).

    Args:
        delta: [N, K] float32, fine-tune minus base.
        ratio: total size as a fraction of 16 bits per weight, 1/16 to 1.
        factor_dtype: bfloat16 or float16, what B and A are rounded to.
    """
    n, k = delta.shape
    positive = delta > 0
    alpha = delta.abs().mean(dtype=torch.float64).to(torch.float32)
    residual = delta - torch.where(positive, alpha, -alpha)
    b, a = truncated_svd(residual, rank_of(n, k, ratio))
    return MatrixDelta(
        shape=(n, k),
        signs=pack_signs(positive),
        scale=alpha.reshape(1),
        lora_a=a.to(factor_dtype).contiguous(),
        lora_b=b.to(factor_dtype).contiguous(),
    )
