# SPDX-License-Identifier: Apache-2.0
"""Loaded weights against the checkpoint's, where activations have a static scale."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm_dqrelo.worker.order import REARRANGED, REQUANTISED, unlike
from vllm_dqrelo.worker.sites import Place, Site

N, K = 48, 80
E4M3 = torch.float8_e4m3fn


class Static:
    """A layer's method that rounds activations to multiples of the layer's scale."""

    def __init__(self, weight, dtype, zero=0):
        self.weight, self.dtype, self.zero = weight, dtype, zero

    def apply(self, layer, x):
        q = x.float() / layer.input_scale
        if self.dtype == E4M3:
            q = q.clamp(-448, 448).to(E4M3).float()
        else:
            q = (q.round() + self.zero).clamp(-128, 127) - self.zero
        return (q * layer.input_scale @ self.weight.T).to(x.dtype)


def quantised(weight, scale):
    """FP8 with one scale for the matrix."""
    return (weight / scale).to(E4M3).float() * scale


def found(stored, loaded, input_scale, activations, dtype=E4M3, zero=0):
    """What ``unlike`` says of one layer."""
    module = SimpleNamespace(
        quant_method=Static(loaded, dtype, zero),
        params_dtype=activations,
        input_scale=input_scale and torch.nn.Parameter(torch.tensor(input_scale)),
    )
    place = Place(Site("layer", module, 0, (N,), K, (N,), K), 0, "weight")
    checkpoint = {"layer.weight": stored}

    class Checkpoint(dict):
        def spec(self, name):
            return "F8_E4M3", self[name].shape

        def rows(self, name, rows):
            return [self[name][rows]]

    sites = SimpleNamespace(places=lambda name: [place])
    return unlike(sites, Checkpoint(checkpoint), torch.device("cpu"))


@pytest.fixture
def weight():
    matrix = 0.02 * torch.randn(N, K, generator=torch.Generator().manual_seed(0))
    return quantised(matrix, float(matrix.abs().max()) / 448)


SCALES = torch.logspace(-3, 1, 13, dtype=torch.float64).tolist()


@pytest.mark.parametrize("activations", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "zero"), [(E4M3, 0), (torch.int8, 0), (torch.int8, -128)]
)
def test_a_static_scale(weight, dtype, zero, activations):
    """Whatever the scale of the activations, the weight is the checkpoint's."""
    for scale in SCALES:
        assert not found(weight, weight, scale, activations, dtype, zero), scale
        flipped = found(weight, weight.flip(1), scale, activations, dtype, zero)
        assert flipped == {"layer.weight": REARRANGED}, scale


def test_a_weight_that_is_quantised_again(weight):
    """As DeepGEMM's scales are: the next power of two."""
    scale = 2.0 ** float((weight.abs().max() / 448).log2().ceil())
    assert scale > weight.abs().max() / 448
    again = quantised(weight, scale)
    for input_scale in SCALES:
        difference = found(weight, again, input_scale, torch.bfloat16)
        assert difference == {"layer.weight": REQUANTISED}
