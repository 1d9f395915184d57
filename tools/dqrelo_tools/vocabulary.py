# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes whose vocabulary is larger or smaller than the base's."""

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.errors import DqreloError


def match_vocabularies(base: Checkpoint, model: Checkpoint) -> None:
    """Give every parameter of ``model`` that has a row for each token the base's rows.

    Semantics: the rows that the fine-tune has beyond the base's are a parameter of
    their own, ``Checkpoint.split``; the rows that it lacks are filled with the
    base's, ``Checkpoint.fill``, which makes their change zero.

    Args:
        base: the base.
        model: the fine-tune. Mutated.

    Raises:
        DqreloError: only some of these parameters were resized, config.json has
            another vocab_size than they have rows, which transformers does not load,
            or tokens were added where an LM head has a bias.
    """
    tokens, sizes = [], _sizes(base, model)
    for name in sorted(set(base) & set(model)):
        shape, base_shape = model.spec(name)[1], base.spec(name)[1]
        resized = shape[1:] == base_shape[1:] and shape[:1] != base_shape[:1]
        of_tokens = base_shape[:1] == [sizes[0]] or shape[:1] == [sizes[1]]
        if resized and of_tokens and _has_no_layer(name):  # no learnt positions
            tokens.append(name)
    if not tokens and sizes[0] != sizes[1]:
        tokens = [
            name
            for name in vocabulary_parameters(base, sizes[0] or 0)
            if name in model and model.spec(name)[1] == base.spec(name)[1]
        ]
    if not tokens:
        return
    own, old = (side.spec(tokens[0])[1][0] for side in (model, base))
    rows = {
        name: model.spec(name)[1][0]
        for name in vocabulary_parameters(base, old)
        if name in model
    }
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{name} has {count}" for name, count in rows.items())
        raise DqreloError(
            f"{model.folder} has a vocabulary that is resized in part: of the base's "
            f"{old} rows {found}. Call resize_token_embeddings({own}) of transformers, "
            "which resizes all of them, and save the model again"
        )
    for side, size, count in ((base, sizes[0], old), (model, sizes[1], own)):
        if size != count:
            raise DqreloError(
                f"config.json of {side.folder} says vocab_size {size}, but "
                f"{tokens[0]} has {count} rows, and transformers would not load it. "
                f"Set vocab_size to {count}, or save the model again with "
                "save_pretrained"
            )
    vectors = [name for name in rows if len(model.spec(name)[1]) == 1]
    if own > old and vectors:
        raise DqreloError(
            f"{model.folder} has {own - old} tokens more than the base, and "
            f"{vectors[0]} has an element for each token: a delta holds added rows of "
            "matrices only. Train without added tokens, or serve the fine-tune itself"
        )
    for name in rows:
        if own < old:
            model.fill(name, base)
        else:
            model.split(name, old)


def smaller_vocabulary(base: Checkpoint, model: Checkpoint) -> int | None:
    """The tokens of a fine-tune that has fewer than the base; None for another."""
    old, own = _sizes(base, model)
    return own if old is not None and own is not None and own < old else None


def vocabulary_parameters(base: Checkpoint, size: int) -> list[str]:
    """The parameters of a base that have a row for each of its ``size`` tokens.

    Embedding, LM head and the LM head's bias, whatever a model calls them: not
    a parameter of a layer, which has the layer's number in its name.
    """
    return [
        name
        for name in base
        if base.spec(name)[1][:1] == [size] and _has_no_layer(name)
    ]


def _has_no_layer(name: str) -> bool:
    return not any(part.isdigit() for part in name.split("."))


def _sizes(base: Checkpoint, model: Checkpoint) -> tuple[int | None, int | None]:
    """The vocab_size of either config.json."""
    return base.model_config.vocab_size, model.model_config.vocab_size
