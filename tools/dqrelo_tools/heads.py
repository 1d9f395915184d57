# SPDX-License-Identifier: Apache-2.0
"""The LM heads of a base and its fine-tune, of which either may be its embedding."""

import logging

import torch

from vllm_dqrelo.format.checkpoint import EMBEDDINGS, HEAD, Checkpoint, SafetensorsFiles
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.part import WHOLE

logger = logging.getLogger(__name__)

LM_HEADS = {"lm_head", "embed_out"}  # the module before ".weight"


def settle_heads(base: Checkpoint, model: Checkpoint) -> None:
    """Give both an LM head of their own, or neither; both are changed.

    A fine-tune is what transformers loads: a head that is stored beside a tied
    embedding is the head where its values are others. A base is what vLLM serves: tied,
    whatever is stored.

    Raises:
        DqreloError: the fine-tune lacks a head that it should have.
    """
    warn_of_second_head(base)
    theirs, ours = head_of(base), head_of(model)
    if ours and model.tied and not has_embedding(model):
        model.rename({base.embedding: (ours, WHOLE)})
        ours = None
    if ours and model.tied and is_embedding(model, model.get(ours)):
        model.drop(ours)
        ours = None
    elif ours and model.tied:
        logger.warning(
            "%s has other values than the embedding, although config.json ties them: "
            "the fine-tune is untied, as transformers loads it",
            ours,
        )
    if not theirs and not base.tied:
        return
    if not ours and not model.tied and set(base) ^ set(model) > {theirs} - {None}:
        return  # more is missing, which explains the head
    if not ours and not model.tied:
        raise DqreloError(
            f"{model.folder} has no LM head, and its config.json does not tie it to "
            "the embedding: transformers would start with random values. Save the "
            "fine-tune with its head, or set tie_word_embeddings to true where the "
            "embedding is the head"
        )
    if not ours and not theirs:
        return
    if not theirs:
        base.untie()
    if not ours:
        model.untie(theirs or HEAD)
    elif ours not in base:
        model.rename({theirs or HEAD: (ours, WHOLE)})


def warn_of_second_head(base: Checkpoint) -> None:
    """Say so where vLLM and transformers make two models of one base."""
    if not base.second_head:
        return
    stored = SafetensorsFiles({HEAD: base.second_head}).get(HEAD)
    if not is_embedding(base, stored):
        logger.warning(
            "%s of the base has other values than its embedding, although config.json "
            "ties them: the embedding is the head, as vLLM serves it",
            HEAD,
        )


def head_of(checkpoint: Checkpoint) -> str | None:
    """The name of the matrix of the LM head, if it is a parameter of its own."""
    names = [name for name in checkpoint if name.endswith(".weight")]
    heads = [name for name in names if name.split(".")[-2] in LM_HEADS]
    return HEAD if HEAD in heads else heads[0] if len(heads) == 1 else None


def has_embedding(checkpoint: Checkpoint) -> bool:
    """Whether the matrix is stored that the LM head is tied to."""
    return any(name.endswith(EMBEDDINGS) for name in checkpoint)


def is_embedding(checkpoint: Checkpoint, head: torch.Tensor) -> bool:
    """Whether a stored LM head has the values of the embedding."""
    return torch.equal(head, checkpoint.get(checkpoint.embedding))
