# SPDX-License-Identifier: Apache-2.0
"""How a ratio is divided between embedding and LM head, and the other matrices."""

import pytest

from dqrelo_tools.method import METHODS, Method
from vllm_dqrelo.format.config import PAPER

HIDDEN, LAYERS = 640, 18
LINEAR = 5_571_840  # weights of a layer of Gemma 3 270M


def weights(vocabulary, untied=False):
    found = {f"model.layers.{i}.mlp.up_proj.weight": LINEAR for i in range(LAYERS)}
    found["model.embed_tokens.weight"] = vocabulary * HIDDEN
    return found | ({"lm_head.weight": vocabulary * HIDDEN} if untied else {})


def spent(ratios, model):
    """The shares of the bytes: of embedding and LM head, and of the others."""
    tokens = sum(r * model[n] for n, r in ratios.items() if "layers" not in n)
    return tokens, sum(ratios[name] * model[name] for name in model) - tokens


@pytest.mark.parametrize("ratio", [1 / 8, 1 / 16, 1 / 32])
@pytest.mark.parametrize(
    ("vocabulary", "untied"), [(262_144, False), (131_072, True), (200_000, False)]
)
def test_where_tokens_are_most_they_take_a_quarter(ratio, vocabulary, untied):
    model = weights(vocabulary, untied)
    ratios = Method().ratios(ratio, model)
    tokens, others = spent(ratios, model)
    assert tokens + others == pytest.approx(ratio * sum(model.values()))
    # Linear layers of a quarter of their own size have enough.
    assert tokens == pytest.approx(ratio * sum(model.values()) / 4, rel=0.01)
    assert len(set(ratios.values())) == 2


def test_most_models_have_fewer_and_keep_one_ratio():
    """Bit for bit: a delta that was made before is made again."""
    model = weights(150_000)
    assert set(Method().ratios(1 / 8, model).values()) == {1 / 8}
    assert set(Method().ratios(1 / 8, {"lm_head.weight": 7}).values()) == {1 / 8}


def test_the_published_method_has_one_ratio():
    ratios = METHODS[PAPER].ratios(1 / 8, weights(262_144))
    assert set(ratios.values()) == {1 / 8}


@pytest.mark.parametrize(("ratio", "most"), [(1 / 8, 1 / 4), (0.5, 0.5), (1, 1)])
def test_linear_layers_have_enough_at_a_quarter(ratio, most):
    """The embedding has the bytes that linear layers would gain little by."""
    model = weights(1_000_000)
    ratios = Method().ratios(ratio, model)
    assert max(ratios.values()) == most
    assert sum(spent(ratios, model)) == pytest.approx(ratio * sum(model.values()))
