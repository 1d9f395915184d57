# SPDX-License-Identifier: Apache-2.0
"""An encoder whose weights are those of one model at a time; a fake model."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm")
from dqrelo_tools.compress import compress
from dqrelo_tools.method import Method
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.worker.order import REARRANGED
from vllm_dqrelo.worker.sites import Sites
from vllm_dqrelo.worker.tower import OTHER_FORM, Tower

pytestmark = pytest.mark.vllm
CPU = torch.device("cpu")
HOW = Method()


class Multimodal(torch.nn.Module):
    """A convolution, a norm, a parameter of its own, and a language model."""

    supports_multimodal = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vision = torch.nn.Module()
        self.vision.patches = torch.nn.Conv2d(3, 8, 2)
        self.vision.norm = torch.nn.LayerNorm(8)
        self.vision.projection = torch.nn.Parameter(torch.randn(8, 40))
        self.language = torch.nn.Sequential(torch.nn.LayerNorm(8))
        self.requires_grad_(False)

    def get_language_model(self):
        return self.language


@pytest.fixture
def model():
    return Multimodal()


@pytest.fixture
def start(tmp_path, model):
    """``start(**more)``: a Tower of ``model``, whose checkpoint has ``more``."""

    def start(**more):
        tensors = dict(model.state_dict())
        tensors |= {name.replace("__", "."): value for name, value in more.items()}
        save_file(
            {name: tensor.clone() for name, tensor in tensors.items()},
            tmp_path / "model.safetensors",
        )
        (tmp_path / "config.json").write_text("{}")
        base = Checkpoint(tmp_path)
        return Tower(Sites(model, base), base, CPU)

    return start


def test_weights_of_one_model_at_a_time(model, start):
    """Base + change, rounded once, and afterwards the base bit by bit."""
    tower, before = start(), {k: v.clone() for k, v in model.state_dict().items()}
    assert not tower.has("language.0.weight")
    change = compress(torch.randn(8, 40), HOW.size(8, 40, 0.5, torch.bfloat16), HOW)
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    one = {"vision.projection": change, "vision.norm.bias": tensors["vision.norm.bias"]}
    other = {"vision.patches.weight": tensors["vision.patches.weight"]}

    def expect(**changed):
        for name, tensor in model.state_dict().items():
            wanted = changed.get(name.replace(".", "__"), before[name])
            assert torch.equal(tensor, wanted), name

    merged = before["vision.projection"] + change.dense()
    own = {"vision__projection": merged, "vision__norm__bias": one["vision.norm.bias"]}
    for _ in range(2):
        tower.use("one", one)
        expect(**own)
        tower.use("other", other)
        expect(vision__patches__weight=other["vision.patches.weight"])
        tower.use(None, {})
        expect()


def test_a_write_that_failed_is_done_again(model, start, monkeypatch):
    """The weights are not taken for those that the failed write left in part."""
    tower, before = start(), {k: v.clone() for k, v in model.state_dict().items()}
    one = {"vision.norm.bias": torch.ones(8), "vision.norm.weight": torch.ones(8)}
    merged, calls = tower._merged, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return merged(*args)

    monkeypatch.setattr(tower, "_merged", fails_once)
    with pytest.raises(MemoryError):
        tower.use("one", one)
    tower.use("one", one)
    assert model.vision.norm.weight.eq(1).all() and model.vision.norm.bias.eq(1).all()
    tower.use(None, {})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_a_delta_cannot_change(model, start):
    tower = start(vision__norm__weight=torch.rand(8))
    assert tower.problem("vision.norm.weight", (8,)).endswith(REARRANGED)
    assert tower.problem("vision.norm.bias", (8,)) is None
    assert "is [9], expected [8]" in tower.problem("vision.norm.bias", (9,))
    model.vision.norm.quant_method = SimpleNamespace()
    assert start().problem("vision.norm.bias", (8,)).endswith(OTHER_FORM)


def test_what_vllm_does_not_load(model, start, tmp_path):
    """Skipped, unless it may be what a parameter of the encoder is made of."""
    tower = start(vision__post__weight=torch.ones(8))
    assert tower.has("vision.post.weight")
    assert tower.problem("vision.post.weight", (8,)) is None
    assert not tower.uses("vision.post.weight")
    model.vision.made = torch.nn.Parameter(torch.ones(8))
    base = Checkpoint(tmp_path)
    tower = Tower(Sites(model, base), base, CPU)
    assert "vision.made" in tower.problem("vision.post.weight", (8,))
