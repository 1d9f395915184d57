# SPDX-License-Identifier: Apache-2.0
"""Which rows of the running step belong to which delta slot."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dqrelo_kernels.rows import RowGroups

NO_ROWS = np.empty(0, dtype=np.int32)
TESTED = "use a version of vLLM that vllm-dqrelo is tested with"


class Step:
    """The rows of one forward pass, as its layers see them.

    Every layer but the LM head sees the rows of all tokens. Only the caller of the LM
    head knows which rows the LM head sees. The caller opens ``sampled_rows`` or
    ``prompt_rows`` (runner.py); there is no default.

    Attributes:
        tokens: all scheduled tokens, for every layer but the LM head.
        embedded: the tokens that an embedding is called with: ``tokens``, but for a
            scope of ``embedded_rows``.
        scratch: float32 [max_tokens, ranks], for dqrelo::delta_linear_.
        merges: whether a delta with many rows has its matrices made whole.
        whole: uint8, where dqrelo::linear makes such a matrix; never moves.
        may_skip: whether a step without deltas may skip the operators of deltas. It may
            not where a graph is captured, which serves later steps, too, nor where
            coverage is probed.
        skipping: whether this step, which has rows of the base alone, skips them. They
            would do nothing, but to call them takes time.
    """

    def __init__(
        self,
        max_tokens: int,
        slots: int,
        ranks: int,
        device: torch.device | str,
        merge_rows: int | None = None,
        whole_bytes: int = 0,
    ) -> None:
        # Allocated before vLLM measures the memory left for the KV cache.
        self.scratch = torch.empty(max_tokens, ranks, device=device)
        self.whole = torch.empty(whole_bytes, dtype=torch.uint8, device=device)
        self.merges = merge_rows is not None
        self.tokens = RowGroups(max_tokens, slots, device, merge_rows)
        self.embedded = self.tokens
        self._some = RowGroups(max_tokens, slots, device)
        self._head = RowGroups(max_tokens, slots, device)
        self._slots_of_head: Callable[[torch.Tensor], np.ndarray] | None = None
        self._put: list[tuple[torch.nn.Module, str, Any, Any]] = []
        self.may_skip = False
        self.skipping = False
        self.set(NO_ROWS)

    @property
    def is_base(self) -> bool:
        """Whether the step has rows of the base alone."""
        return self.tokens.is_base

    def put(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a layer; steps that are skipped restore vLLM's."""
        self._put.append((module, name, getattr(module, name), value))
        object.__setattr__(module, name, value)

    def changes(self, module: torch.nn.Module) -> bool:
        """Whether an attribute of a layer was ``put``."""
        return any(layer is module for layer, *_ in self._put)

    def as_base(self, module: torch.nn.Module) -> torch.nn.Module:
        """A copy of a layer with the same parameters, and with vLLM's attributes."""
        base = copy.copy(module)
        for layer, name, own, _ in self._put:
            if layer is module:
                object.__setattr__(base, name, own)
        return base

    def set(self, slots: np.ndarray, tokens: np.ndarray | int = 1) -> None:
        """Start a step.

        Args:
            slots: int32 [R], the slot of each request; BASE for the base.
            tokens: int [R], how many tokens each request has.
        """
        self._slots = slots
        self._token_slots = slots.repeat(tokens)
        self.tokens.set(self._token_slots)
        skipping = self.may_skip and self.is_base
        if skipping != self.skipping:
            for module, name, own, value in self._put:
                object.__setattr__(module, name, own if skipping else value)
            self.skipping = skipping

    @contextmanager
    def embedded_rows(self, has_id: np.ndarray) -> Iterator[None]:
        """A scope in which an embedding sees the tokens that have an id, in order.

        Args:
            has_id: bool [M], whether a token of the step has an id, not an embedding.
        """
        if not self.is_base and not has_id.all():
            self._some.set(self._token_slots[has_id])
            self.embedded = self._some
        try:
            yield
        finally:
            self.embedded = self.tokens

    @contextmanager
    def sampled_rows(self, counts: np.ndarray) -> Iterator[None]:
        """A scope in which the LM head sees the rows that are sampled from.

        Args:
            counts: int [R], how many rows each request has: one, and one a draft.
        """
        slots = self._slots
        with self._called_with(lambda x: slots.repeat(counts)):
            yield

    @contextmanager
    def prompt_rows(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """A scope in which the LM head sees slices of ``hidden_states`` [M, K].

        Args:
            hidden_states: a row for each token of the step.
        """

        def slots_of(x: torch.Tensor) -> np.ndarray:
            offset = x.data_ptr() - hidden_states.data_ptr()
            first, rest = divmod(offset, hidden_states[:1].nbytes)
            if rest or first < 0:
                raise RuntimeError(
                    "vLLM computes prompt logprobs from rows that are not a slice of "
                    f"the hidden states; {TESTED}"
                )
            return self._token_slots[first : first + len(x)]

        with self._called_with(slots_of):
            yield

    @contextmanager
    def _called_with(
        self, slots_of: Callable[[torch.Tensor], np.ndarray]
    ) -> Iterator[None]:
        self._slots_of_head = slots_of
        try:
            yield
        finally:
            self._slots_of_head = None

    def head_rows(self, x: torch.Tensor) -> RowGroups:
        """The rows ``x`` [M, K] that the LM head is called with.

        Raises:
            RuntimeError: the step has deltas, and the caller has opened no scope, or a
                scope of another number of rows.
        """
        if self.is_base:
            return self.tokens
        if self._slots_of_head is None:
            raise RuntimeError(
                "vLLM calls the LM head in a place where vllm-dqrelo does not know the "
                f"delta of each row; {TESTED}"
            )
        slots = self._slots_of_head(x)
        if len(slots) != len(x):
            raise RuntimeError(
                f"vLLM calls the LM head with {len(x)} rows, expected {len(slots)}; "
                f"{TESTED}"
            )
        self._head.set(slots)
        return self._head
