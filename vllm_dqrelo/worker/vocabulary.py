# SPDX-License-Identifier: Apache-2.0
"""Tokens that only some models of a server have.

vLLM gives all requests of a server one vocabulary. So the engine appends
``added_tokens`` rows to the base's V rows when it starts. These rows are zero in the
base; each delta has its own rows, exactly. A fine-tune may also lack the base's last
tokens. A request is answered with tokens of its own model only: the logits of all
others are -inf.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_dqrelo.worker.step import Step


class EnlargedEmbedding(UnquantizedEmbeddingMethod):
    """Loads the base's V rows into a layer with more rows.

    Args:
        added_tokens: rows of zeros, appended to the checkpoint's rows.
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
        slots: the most resident deltas.
        shape: E, the most rows of a delta, and K.
        dtype: of the matrix.
        device: of the matrix.

    Attributes:
        rows: [slots + 1, E, K]; the last slot is the base's, all zero.
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

    def set(self, slot: int, rows: torch.Tensor | None) -> None:
        """Give a slot its rows [at most E, K]; None for a delta without added rows."""
        self.rows[slot].zero_()
        if rows is not None:
            self.rows[slot, : len(rows)] = rows

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
        """``y[m, V + e] = rows[slots[m], e] x[m]``.

        Args:
            y: [M, at least V + E], logits. Mutated.
            x: [M, K], hidden states.
            slots: int32 [M], the slot of each row, -1 for the base.
        """
        total, room, _ = self.rows.shape
        of_all = (x @ self.rows.flatten(0, 1).T).view(-1, total, room)
        row = torch.arange(len(x), device=y.device)
        y[:, self.start : self.start + room] = of_all[row, slots.long()]


class Vocabularies:
    """The number of tokens of each resident delta's model.

    Args:
        base: V, the base's tokens.
        slots: the most resident deltas.
        device: of the model.

    Attributes:
        sizes: int64 [slots + 1] on the device; the last slot is the base's.
    """

    def __init__(self, base: int, slots: int, device: torch.device) -> None:
        self.base = base
        self.sizes = torch.full((slots + 1,), base, device=device)
        self._of_slots = [base] * (slots + 1)  # ``sizes`` on the host

    def set(self, slot: int, size: int | None) -> None:
        """Give a slot the vocabulary of its delta; None for the base's."""
        self._of_slots[slot] = self.base if size is None else size
        self.sizes[slot].fill_(self._of_slots[slot])  # no copy that is waited for

    def mask(self, model: Any, step: Step) -> Callable[..., Any]:
        """``model.compute_logits`` with ``y[m, v] = -inf`` where ``v >= sizes[m]``.

        The mask applies to complete logits: gathered from all workers, and capped. A
        cap after the mask would turn -inf into a finite number.

        Args:
            model: vLLM's.
            step: gives the slot of each sampled row.
        """
        compute = model.compute_logits

        @functools.wraps(compute)
        def compute_logits(hidden_states: torch.Tensor, *args: Any) -> Any:
            y = compute(hidden_states, *args)
            first = min(self._of_slots)  # of the columns that some model lacks
            if y is None or first >= y.shape[1]:
                return y
            slots = step.head_rows(hidden_states).by_row[: len(y)]
            columns = torch.arange(first, y.shape[1], device=y.device)
            absent = columns >= self.sizes[slots][:, None]
            y[:, first:].masked_fill_(absent, -torch.inf)
            return y

        return compute_logits
