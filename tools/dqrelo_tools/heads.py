# SPDX-License-Identifier: Apache-2.0
"""The LM heads of a base and its fine-tune, of which either may be its embedding."""

import logging

from vllm_dqrelo.format.checkpoint import EMBEDDINGS, HEAD, Checkpoint, ends_with
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.part import WHOLE

logger = logging.getLogger(__name__)


def settle_heads(base: Checkpoint, model: Checkpoint) -> None:
    """Give both an LM head of their own, or neither; both are changed.

    Raises:
        DqreloError: the fine-tune lacks a head that it should have.
    """
    for checkpoint, side in ((base, "base"), (model, "fine-tune")):
        if checkpoint.model_config.tied and not checkpoint.tied:
            logger.warning(
                "%s of the %s has other values than its embedding, although its "
                "config.json ties them: it is untied, as transformers and vLLM load it",
                checkpoint.head,
                side,
            )
    theirs, ours = base.head, model.head
    if not theirs and not base.tied:
        return
    if ours and model.tied:  # the head alone is stored
        if not any(ends_with(name, EMBEDDINGS) for name in model):
            model.rename({base.embedding: (ours, WHOLE)})
        ours = None
    if not ours and not model.tied:
        if set(base) ^ set(model) <= {theirs}:
            raise DqreloError(
                f"{model.folder} has no LM head, and its config.json does not tie it "
                "to the embedding: transformers would start with random values. Save "
                "the fine-tune with its head, or set tie_word_embeddings to true where "
                "the embedding is the head"
            )
        return  # more is missing, which explains the head
    if not ours and not theirs:
        return
    if not theirs:
        base.untie()
    if not ours:
        model.untie(theirs or HEAD)
    elif ours not in base:
        model.rename({theirs or HEAD: (ours, WHOLE)})
