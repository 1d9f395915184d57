# SPDX-License-Identifier: Apache-2.0
"""A base and its fine-tune, opened as one: the same parameters under the same names."""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import torch

from dqrelo_tools.differences import differences, refuse_placeholders
from dqrelo_tools.heads import settle_heads
from dqrelo_tools.names import match_names
from dqrelo_tools.pieces import pieces
from dqrelo_tools.vocabulary import match_vocabularies
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.tensors import ADDED

logger = logging.getLogger(__name__)


class Parameters(Protocol):
    """The parameters of a fine-tune: a checkpoint's, or those an adapter changes.

    Attributes:
        files: parameter -> the file that it comes from.
    """

    files: dict[str, Path]

    def __iter__(self) -> Iterator[str]:
        """Their names, in order."""

    def spec(self, name: str) -> tuple[str, list[int]]:
        """dtype as safetensors spells it, and shape; reads no data."""

    def get(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""


def fine_tune(model: str, folder: Path, base: str, before: Checkpoint) -> Checkpoint:
    """The fine-tune in ``folder``, with the same parameters as ``before``.

    Added tokens are parameters that only the fine-tune has. Both are changed.

    Args:
        model, base: how the two were named.

    Raises:
        DqreloError: ``folder`` is not a fine-tune of ``before``.
    """
    after = Checkpoint(folder)
    if after.config.get("quantization_config") and not after.quantization:
        logger.warning(
            "config.json of %s says that it is quantised, but its weights are floats: "
            "quantization_config is left out",
            model,
        )
    match_names(before, after)
    refuse_placeholders(before, after)
    settle_heads(before, after)
    match_vocabularies(before, after)
    refuse(f"{model} is not a fine-tune of {base}:", differences(before, after))
    return after


def read_ahead(
    before: Checkpoint, after: Parameters, names: list[str]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Each parameter of the fine-tune and its change; reads the next one ahead.

    A matrix that is compressed is on device meta: dtype and shape, without values.
    """

    def read(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        tensor = after.get(name)
        old = before.get(name) if name in before else torch.zeros_like(tensor)
        added = name.removesuffix(ADDED)
        first = 0 if added == name else before.spec(added)[1][0]
        for side, values in (("base", old), ("fine-tune", tensor)):
            refuse_not_finite(added, side, values, first)
        change = tensor.to(torch.float32, copy=True)
        both = (pieces(torch.atleast_1d(side)) for side in (change, old))
        for rows, others in zip(*both, strict=True):
            rows -= others
        return tensor if is_exact(name, tensor) else tensor.to("meta"), change

    with ThreadPoolExecutor(1) as reader:
        coming = None
        for name in names:
            following = reader.submit(read, name)
            if coming:
                yield coming.result()
            coming = following
        if coming:
            yield coming.result()


def refuse_not_finite(
    name: str, side: str, values: torch.Tensor, first: int = 0
) -> None:
    """Raise a DqreloError that says where ``values`` are not finite.

    Args:
        name: of the parameter.
        side: whose it is.
        values: its rows from ``first`` on.
    """
    finite = torch.atleast_1d(values.isfinite())
    if bool(finite.all()):
        return
    finite = finite.reshape(len(finite), -1).all(1)
    rows = ((~finite).nonzero().flatten() + first).tolist()
    raise DqreloError(
        f"{name} of the {side} has a NaN or an infinity in {len(rows)} of its "
        f"{first + len(finite)} rows: {', '.join(map(str, rows[:5]))}"
        f"{', ...' if rows[5:] else ''}. Set rows that a trainer left "
        "uninitialised to zero. For other rows, fetch the checkpoint or train again"
    )


def always_stored(name: str, before: Checkpoint) -> bool:
    """Whether a delta has the parameter even if it did not change.

    Without an untied LM head, a server would take the embedding for the head. Without
    an added token, a server would take the token for one that the model lacks.
    """
    return (name == HEAD and before.tied) or name.endswith(ADDED)


def is_exact(name: str, tensor: torch.Tensor) -> bool:
    """Whether a parameter that changed is stored as it is: all but matrices."""
    return tensor.ndim != 2 or name.endswith(ADDED)


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit float that stands for a checkpoint's dtype."""
    return torch.float16 if dtype == torch.float16 else torch.bfloat16
