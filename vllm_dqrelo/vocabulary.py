# SPDX-License-Identifier: Apache-2.0
"""Tokens that fine-tunes have and their base has not.

vLLM gives all requests of a server one vocabulary, so room for ``added_tokens`` rows
is made behind the base's V when the engine starts. The base's own rows there are zero;
each delta brings its rows, exactly. A request can only be answered with tokens of its
own model: the logits of the others are -inf.
"""

from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_dqrelo.compat import ModelConfig


def enlarge(model_config: ModelConfig, added_tokens: int) -> None:
    """Let vLLM build the model with ``added_tokens`` rows more than the checkpoint."""
    model_config.hf_text_config.vocab_size += added_tokens
    model_config.model_arch_config.vocab_size += added_tokens


class EnlargedEmbedding(UnquantizedEmbeddingMethod):
    """Loads the base's V rows into a layer with more of them.

    Args:
        added_tokens: rows of zeros that come after the checkpoint's.
    """

    def __init__(self, added_tokens: int) -> None:
        self.added_tokens = added_tokens

    def create_weights(self, *args: Any, weight_loader: Any, **attributes: Any) -> None:
        def load(parameter: torch.nn.Parameter, loaded: torch.Tensor) -> None:
            padding = (0, 0, 0, self.added_tokens)
            weight_loader(parameter, torch.nn.functional.pad(loaded, padding))

        super().create_weights(*args, weight_loader=load, **attributes)


class AddedRows:
    """The rows that the resident deltas add to one matrix, embedding or LM head.

    Args:
        start: V, the first token that is not the base's.
        slots: of deltas.
        shape: E, the room for rows, and K.
        dtype: of the matrix.
        device: where it is.

    Attributes:
        rows: [slots + 1, E, K]; the last is the base's, all zero.
        counts: int64 [slots + 1], how many of them there are.
    """

    def __init__(
        self,
        start: int,
        slots: int,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.start = start
        self.rows = torch.zeros(slots + 1, *shape, dtype=dtype, device=device)
        self.counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)

    def set(self, slot: int, rows: torch.Tensor | None) -> None:
        """Give a slot its rows [at most E, K]; None for a delta that adds none."""
        self.rows[slot].zero_()
        self.counts[slot] = 0
        if rows is not None:
            self.rows[slot, : len(rows)] = rows
            self.counts[slot] = len(rows)

    def embed_(self, y: torch.Tensor, ids: torch.Tensor, slots: torch.Tensor) -> None:
        """``y[m] = rows[slots[m], ids[m] - V]`` where ``ids[m] >= V``.

        Args:
            y: [M, K]. Mutated.
            ids: int [M], tokens.
            slots: int32 [M], the slot of each row, -1 for the base.
        """
        own = self.rows[slots, (ids - self.start).clamp_min(0)]
        y.copy_(torch.where((ids >= self.start)[:, None], own, y))

    def logits_(self, y: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> None:
        """``y[m, V + e] = rows[slots[m], e] x[m]``; -inf for tokens that are not there.

        Args:
            y: [M, at least V + E], logits. Mutated.
            x: [M, K], hidden states.
            slots: int32 [M], the slot of each row, -1 for the base.
        """
        total, room, _ = self.rows.shape
        of_all = (x @ self.rows.flatten(0, 1).T).view(-1, total, room)
        row, column = (torch.arange(n, device=y.device) for n in (len(x), room))
        there = column < self.counts[slots][:, None]
        own = of_all[row, slots.long()].masked_fill(~there, -torch.inf)
        y[:, self.start : self.start + room] = own
