# SPDX-License-Identifier: Apache-2.0
"""The layers that a drafter shares with the base.

An EAGLE head has the embedding and the LM head of the target, and calls them with rows
that are not the rows of the step. A drafter drafts for every model as the base: the
drafter gets these layers without deltas.
"""

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_dqrelo.worker.step import TESTED, Step


def give_base_layers(drafter: torch.nn.Module, step: Step) -> None:
    """Exchange the layers of a drafter that have deltas for layers of the base.

    A layer of the base is a copy that shares the parameters: it takes no memory.

    Args:
        drafter: vLLM's draft model, which was loaded and has not run. Mutated.
        step: knows the layers that have deltas.
    """
    for parent in list(drafter.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, VocabParallelEmbedding) and step.changes(layer):
                setattr(parent, name, step.as_base(layer))


def refuse_deltas(drafter: torch.nn.Module, step: Step) -> None:
    """See that a drafter has no layer with deltas.

    Raises:
        RuntimeError: the drafter has such a layer.
    """
    found = [name for name, layer in drafter.named_modules() if step.changes(layer)]
    if found:
        raise RuntimeError(
            f"vLLM's drafter {type(drafter).__name__} shares {', '.join(found[:5])} "
            "with the base in a way that vllm-dqrelo does not know: drafts would get "
            f"deltas of other rows; {TESTED}, or leave --speculative-config out"
        )
