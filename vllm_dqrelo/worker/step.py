# SPDX-License-Identifier: Apache-2.0
"""Which rows of the running step belong to which delta slot."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from dqrelo_kernels.rows import RowGroups


class Step:
    """The rows of one forward pass, as its layers see them.

    Attributes:
        tokens: all scheduled tokens, for every layer but the LM head.
        samples: the rows that are sampled from, for the LM head.
        scratch: float32 [max_tokens, ranks], for dqrelo::delta_linear_.
        merges: whether a delta with many rows has its matrices made whole.
        is_ready: whether operators may be left out of a step without deltas; not where
            a graph is captured, which is to serve later steps, or coverage probed.
        skips: whether they are left out of this step, which has rows of the base alone.
            They would do nothing, but to call them takes time.
    """

    def __init__(
        self,
        max_tokens: int,
        slots: int,
        ranks: int,
        device: torch.device | str,
        merge_rows: int | None = None,
    ) -> None:
        self.scratch = torch.empty(max_tokens, ranks, device=device)
        self.merges = merge_rows is not None
        self.tokens = RowGroups(max_tokens, slots, device, merge_rows)
        self.samples = RowGroups(max_tokens, slots, device)
        self._prompt = RowGroups(max_tokens, slots, device)
        self._token_slots = np.empty(0, dtype=np.int32)
        self._prompt_hidden: torch.Tensor | None = None
        self._put: list[tuple[torch.nn.Module, str, Any, Any]] = []
        self.is_ready = False
        self.skips = False

    def put(self, module: torch.nn.Module, name: str, value: Any) -> None:
        """Set an attribute of a layer; it is vLLM's own in steps that are skipped."""
        self._put.append((module, name, getattr(module, name), value))
        object.__setattr__(module, name, value)

    def set(self, token_slots: np.ndarray, sample_slots: np.ndarray) -> None:
        """Start a step: the slot of each token and of each sampled row."""
        self._token_slots = token_slots
        self.tokens.set(token_slots)
        self.samples.set(sample_slots)
        skips = self.is_ready and not int(self.tokens.num_active)
        if skips != self.skips:
            for module, name, own, value in self._put:
                object.__setattr__(module, name, own if skips else value)
            self.skips = skips

    @contextmanager
    def prompt_rows(self, hidden_states: torch.Tensor) -> Iterator[None]:
        """Within it the LM head is called with slices of ``hidden_states`` [M, K]."""
        self._prompt_hidden = hidden_states
        try:
            yield
        finally:
            self._prompt_hidden = None

    def head_rows(self, x: torch.Tensor) -> RowGroups:
        """The rows that the LM head sees: the sampled ones, or a slice of a prompt."""
        hidden = self._prompt_hidden
        if hidden is None:
            return self.samples
        first, rest = divmod(x.data_ptr() - hidden.data_ptr(), hidden[:1].nbytes)
        if rest or not 0 <= first <= first + len(x) <= len(hidden):
            raise RuntimeError(
                "prompt logprobs are computed from rows that are no slice of the "
                "hidden states: this vLLM is not one that vllm-dqrelo is tested with"
            )
        self._prompt.set(self._token_slots[first : first + len(x)])
        return self._prompt
