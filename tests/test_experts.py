# SPDX-License-Identifier: Apache-2.0
"""Products of rows with the matrices of their experts, as vLLM packs them."""

import pytest
import torch

from dqrelo_kernels import ops as _  # noqa: F401
from dqrelo_kernels.cpu import build as cpu
from dqrelo_kernels.layout import unpack_experts

# Rows of each expert: none, few, whole tiles, more than are in work at a time.
POPULARITY = {
    "one": [0, 1, 0],
    "few": [2, 0, 1, 5, 3],
    "tiles": [16, 17, 8, 15, 33],
    "many": [3, 300, 0, 260, 1],
}
PACKED = {
    "float32": (torch.float32, False),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
    "pairs": (torch.bfloat16, True),
}


def pack(weight, in_pairs):
    """The layout in a plain loop, number by number."""
    count, rows, columns = weight.shape
    width = 2 if in_pairs else 1
    packed = torch.empty(count, weight[0].numel(), dtype=weight.dtype)
    at = 0
    for n in range(0, rows, 16):
        for k in range(0, columns, width):
            for row in range(16):
                for column in range(width):
                    packed[:, at] = weight[:, n + row, k + column]
                    at += 1
    return packed.view_as(weight)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("columns", [32, 416])
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("has_floats", [False, True])
@pytest.mark.parametrize("packed", PACKED)
def test_expert_linear(packed, has_floats, popularity, columns):
    """Rows of the matrices' dtype and of float32, which take another way."""
    stored, in_pairs = PACKED[packed]
    dtype = torch.float32 if has_floats else stored
    counts = POPULARITY[popularity]
    torch.manual_seed(columns)
    weight = torch.randn(len(counts), 96, columns).to(stored)
    x = torch.randn(sum(counts), columns).to(dtype)
    y = torch.full((sum(counts) + 1, 96), torch.nan, dtype=dtype)
    ends = torch.tensor(counts).cumsum(0).int()
    torch.ops.dqrelo.expert_linear_(y, x, pack(weight, in_pairs), ends, in_pairs)
    experts = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for m, expert in enumerate(experts.tolist()):
        terms = weight[expert].double() * x[m].double()
        expected, size = terms.sum(1), terms.abs().sum(1)
        # A float32 sum, rounded once.
        bound = columns * 2**-24 * size + torch.finfo(dtype).eps / 2 * expected.abs()
        assert ((y[m].double() - expected).abs() <= bound).all()
    assert y[-1].isnan().all(), "a row of no expert was written"


@pytest.mark.usefixtures("path")
def test_a_row_does_not_depend_on_its_neighbours():
    """The same bits among 1, 7, 20 and 300 rows of its expert."""
    torch.manual_seed(0)
    weight = torch.randn(2, 64, 416).bfloat16()
    x = torch.randn(300, 416).bfloat16()
    found = []
    for count in (1, 7, 20, 300):
        y = torch.full((count, 64), torch.nan, dtype=x.dtype)
        ends = torch.tensor([0, count], dtype=torch.int32)
        torch.ops.dqrelo.expert_linear_(y, x[-count:].contiguous(), weight, ends, False)
        found.append(y[-1])
    assert all(torch.equal(one, found[0]) for one in found)


def test_native_code_refuses_what_it_would_misread():
    if not cpu.library():
        pytest.skip("no C++ compiler: there is no native code to test")
    y, x, weight = torch.empty(1, 16), torch.empty(1, 32), torch.empty(1, 16, 32)
    ends = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="multiples of 32 rows and columns"):
        torch.ops.dqrelo.expert_linear_(y, x, weight, ends, False)


@pytest.mark.vllm
@pytest.mark.parametrize("packed", PACKED)
def test_what_vllm_packs(packed):
    pytest.importorskip("vllm")
    from vllm._custom_ops import cpu_prepack_moe_weight

    dtype, in_pairs = PACKED[packed]
    if in_pairs and not torch.cpu.get_capabilities().get("amx_tile"):
        pytest.skip("vLLM packs in pairs for a CPU with AMX")
    weight = torch.randn(3, 64, 96).to(dtype)
    found = cpu_prepack_moe_weight(weight, "amx" if in_pairs else "vec")
    assert torch.equal(found, pack(weight, in_pairs))
    assert torch.equal(unpack_experts(found, in_pairs), weight)
