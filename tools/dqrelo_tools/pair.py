# SPDX-License-Identifier: Apache-2.0
"""A base and its fine-tune, opened as one: the same parameters under the same names."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dqrelo_tools.configs import vocabulary
from dqrelo_tools.differences import differences
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.tensors import ADDED


def fine_tune(model: str, folder: Path, base: str, before: Checkpoint) -> Checkpoint:
    """Open ``folder``; it and ``before`` have the same parameters from then on.

    But for those of added tokens, which only the fine-tune has.

    Args:
        model, base: how the two were named.

    Raises:
        DqreloError: it is no fine-tune of ``before``.
    """
    after = Checkpoint(folder)
    if before.tied != after.tied:
        (before if before.tied else after).untie()
    split_added_tokens(before, after)
    refuse(f"{model} is no fine-tune of {base}:", differences(before, after))
    return after


def split_added_tokens(base: Checkpoint, model: Checkpoint) -> None:
    """Let the rows of tokens that ``model`` added be parameters of their own.

    They are what its vocabulary matrices have beyond the base's ``vocab_size`` rows.
    """
    old, own = (vocabulary(checkpoint.config) for checkpoint in (base, model))
    if old is None or own is None or own <= old:
        return
    for name in set(base) & set(model):
        shape, base_shape = model.spec(name)[1], base.spec(name)[1]
        if len(shape) == 2 and (shape[0], base_shape[0]) == (own, old):
            model.split(name, old)


def read_ahead(
    before: Checkpoint, after: Checkpoint, names: list[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter of the fine-tune and its change; the next is read meanwhile."""

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = after.get(name)
        old = before.get(name) if name in before else torch.zeros_like(tensor)
        for side, values in (("base", old), ("fine-tune", tensor)):
            if not bool(values.isfinite().all()):
                raise DqreloError(f"{name} of the {side} has a NaN or an infinity")
        return tensor, tensor.float() - old.float()

    with ThreadPoolExecutor(1) as reader:
        coming = None
        for name in names:
            following = reader.submit(read, name)
            if coming:
                yield coming.result()
            coming = following
        if coming:
            yield coming.result()


def always_stored(name: str, before: Checkpoint) -> bool:
    """Whether it is stored even if it did not change.

    An untied LM head that is not there would be taken for the embedding, and an added
    token for one that the model does not have.
    """
    return (name == HEAD and before.tied) or name.endswith(ADDED)


def is_exact(name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter that changed is stored as it is: vectors, added tokens."""
    return tensor.ndim < 2 or name.endswith(ADDED)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit float that stands for a checkpoint's dtype."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
