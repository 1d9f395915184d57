# SPDX-License-Identifier: Apache-2.0
"""A delta of each kind of parts: neither its digest nor its answers may change.

Its values are whole numbers times powers of two, so that every sum is exact in float32
and no machine may answer differently.
"""

import hashlib

import pytest
import torch

from dqrelo_kernels.layout import pack_int4, pack_signs
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta, write_delta
from vllm_dqrelo.format.tensors import INT4, MatrixDelta

N, K = 19, 45
# Name -> sign planes, rank, dtype of the factors, and of the answers' SHA-256 the first
# 16 digits.
MATRICES = {
    "signs": (1, 0, INT4, "c1a9cfb3f881dd24"),
    "signs_and_int4": (1, 6, INT4, "e7784d5b93141fa4"),
    "int4_of_an_odd_rank": (0, 7, INT4, "d2310231b6a42885"),
    "two_planes_and_int8": (2, 3, torch.int8, "ccda998eb382b120"),
    "bfloat16": (1, 2, torch.bfloat16, "508296a932908b25"),
    "float32": (0, 1, torch.float32, "e3e2dd9a5cb3cbc2"),
}
DIGEST = "sha256:fe839e4848a6513857209830f237a89245137b4a18bbd0d0ebb3db1aa1fcb1f3"


def whole(*shape: int, seed: int) -> torch.Tensor:
    """Whole numbers from -7 to 7, int8: a linear congruential generator's."""
    values, state = [], seed
    for _ in range(torch.Size(shape).numel()):
        state = (1103515245 * state + 12345) % 2**31
        values.append((state >> 16) % 15 - 7)
    return torch.tensor(values, dtype=torch.int8).reshape(shape)


def powers(*shape: int, seed: int) -> torch.Tensor:
    """Powers of two from 1/128 to 1, float32."""
    return 2.0 ** (-whole(*shape, seed=seed).abs().float())


def matrix(planes: int, rank: int, dtype: torch.dtype, seed: int) -> MatrixDelta:
    a, b = whole(rank, K, seed=seed), whole(N, rank, seed=seed + 1)
    positive = whole(planes, N, K, seed=seed + 2) > 0
    signs = [pack_signs(plane) for plane in positive]
    return MatrixDelta(
        (N, K),
        torch.stack(signs) if signs else torch.empty(0, N, 3, dtype=torch.int16),
        powers(planes, N, seed=seed + 3),
        pack_int4(a) if dtype == INT4 else a.to(dtype),
        pack_int4(b) if dtype == INT4 else b.to(dtype),
        None if dtype.is_floating_point else powers(rank, seed=seed + 4),
    )


@pytest.fixture(scope="module")
def delta(tmp_path_factory) -> Delta:
    folder = tmp_path_factory.mktemp("golden")
    tensors = {"norm.weight": whole(N, seed=1).float()}
    for number, (name, (planes, rank, dtype, _)) in enumerate(MATRICES.items()):
        tensors |= matrix(planes, rank, dtype, 10 * number).tensors(f"{name}.weight")
    config = DeltaConfig("base", "sha256:00", "", "dqrelo", 0.125)
    write_delta(folder, config, tensors)
    return Delta(folder)


def test_the_digest(delta):
    assert delta.config.digest == DIGEST


@pytest.mark.parametrize("name", MATRICES)
def test_the_answers(delta, name):
    x = whole(K, 5, seed=99).float()
    answers = delta.matrix(f"{name}.weight").dense() @ x
    exact = delta.matrix(f"{name}.weight").dense().double() @ x.double()
    assert torch.equal(answers.double(), exact)
    answers += 0.0  # no negative zeros
    found = hashlib.sha256(answers.numpy().astype("<f4").tobytes()).hexdigest()
    assert found[:16] == MATRICES[name][-1]
