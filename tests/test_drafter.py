# SPDX-License-Identifier: Apache-2.0
"""A drafter has the base's layers, and the target keeps the layers with deltas."""

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from vllm.model_executor.layers.layernorm import RMSNorm  # noqa: E402
from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: E402
    ParallelLMHead,
    VocabParallelEmbedding,
)

from vllm_dqrelo.worker.drafter import give_base_layers, refuse_deltas  # noqa: E402
from vllm_dqrelo.worker.step import Step  # noqa: E402


class Deltas:
    """A method that answers otherwise than the base's."""

    def embedding(self, layer, ids):
        return torch.full((len(ids), 4), 7.0)


@pytest.fixture
def target(monkeypatch):
    """An embedding, an LM head and a norm, of one worker."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import vocab_parallel_embedding as module

    for name, value in (("rank", 0), ("world_size", 1)):
        full = f"get_tensor_model_parallel_{name}"
        monkeypatch.setattr(module, full, lambda value=value: value)
    target = torch.nn.Module()
    with set_current_vllm_config(VllmConfig()):
        target.embed_tokens = VocabParallelEmbedding(64, 4)
        target.lm_head = ParallelLMHead(64, 4)
        target.norm = RMSNorm(4)
    torch.nn.init.normal_(target.embed_tokens.weight)
    return target


@pytest.fixture
def step(target):
    """With deltas on every layer of the target."""
    step = Step(8, 2, 4, "cpu")
    for layer in target.children():
        if layer is not target.norm:
            step.put(layer, "quant_method", Deltas())
    step.put(target.norm, "__class__", type("DeltaNorm", (RMSNorm,), {}))
    return step


@pytest.mark.parametrize("skipping", [False, True])
def test_the_layers_of_a_drafter(target, step, skipping):
    """Also inside a layer of the drafter, as MTP has the LM head."""
    step.may_skip = skipping
    step.set(torch.zeros(0, dtype=torch.int32).numpy())
    drafter = torch.nn.Sequential(torch.nn.Module(), torch.nn.Module())
    drafter[0].embed_tokens = target.embed_tokens
    drafter[0].own = torch.nn.Linear(4, 4)
    drafter[1].head, own = target.lm_head, drafter[0].own
    with pytest.raises(RuntimeError, match="shares 0.embed_tokens, 1.head with the"):
        refuse_deltas(drafter, step)
    give_base_layers(drafter, step)
    refuse_deltas(drafter, step)
    assert drafter[0].own is own
    assert drafter[1].head.weight is target.lm_head.weight
    step.may_skip = False
    step.set(torch.zeros(1, dtype=torch.int32).numpy())
    ids = torch.tensor([3, 5])
    embedded = torch.nn.functional.embedding(ids, target.embed_tokens.weight)
    assert torch.equal(drafter[0].embed_tokens(ids), embedded)
    assert (target.embed_tokens(ids) == 7).all()
    assert isinstance(target.lm_head.quant_method, Deltas)
    assert not isinstance(drafter[1].head.quant_method, Deltas)


def test_another_shared_layer_is_an_error(target, step):
    """A norm calls the method that the norm was made with."""
    drafter = torch.nn.Module()
    drafter.norm = target.norm
    give_base_layers(drafter, step)
    with pytest.raises(RuntimeError, match="drafter Module shares norm with the base"):
        refuse_deltas(drafter, step)
