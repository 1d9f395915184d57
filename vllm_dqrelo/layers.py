# SPDX-License-Identifier: Apache-2.0
"""Where a request meets its delta: the base's layers with the ops behind them."""

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.rows import RowGroups
from vllm_dqrelo.sites import Site
from vllm_dqrelo.step import Step
from vllm_dqrelo.vocabulary import AddedRows


class DeltaMethod(QuantizeMethodBase):
    """A layer's own method, and then the deltas of its rows.

    It wraps whatever method the layer has, so that it does not matter how the base
    stores its weights.

    Args:
        inner: the layer's method.
        site: the layer as a site.
        arena: uint8 [bytes], see dqrelo_kernels.ops.
        table: int64 [slots, slices, Field] of this site.
        step: which rows belong to which delta.
        added: rows of tokens that are not the base's, in a vocabulary matrix.
    """

    def __init__(
        self,
        inner: QuantizeMethodBase,
        site: Site,
        arena: torch.Tensor,
        table: torch.Tensor,
        step: Step,
        added: AddedRows | None = None,
    ) -> None:
        self.inner = inner
        self.arena = arena
        self.table = table
        self.slices = site.slices(arena.device)
        self.step = step
        self.added = added
        self.is_head = isinstance(site.module, ParallelLMHead)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("deltas are put on a model that has its weights")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(
        self,
        layer: torch.nn.Module,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = self.inner.apply(layer, x, bias)
        groups = self.step.head_rows(x) if self.is_head else self.step.tokens
        torch.ops.dqrelo.delta_linear_(
            y.view(-1, y.shape[-1]),
            self.step.scratch,
            x.reshape(-1, x.shape[-1]),
            self.arena,
            self.table,
            self.slices,
            groups.rows,
            groups.slots,
            groups.starts,
            groups.num_active,
        )
        if self.added is not None:
            self.added.logits_(y, x, groups.by_row[: len(x)])
        return y

    def embedding(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        y = self.inner.embedding(layer, ids)
        groups = self.step.tokens
        torch.ops.dqrelo.delta_embedding_(
            y,
            ids if self.added is None else ids.clamp_max(self.added.start - 1),
            self.arena,
            self.table,
            self.slices,
            groups.rows,
            groups.slots,
            groups.num_active,
        )
        if self.added is not None:
            self.added.embed_(y, ids, groups.by_row[: len(ids)])
        return y


class DeltaNorm(torch.nn.Module):
    """A norm of the base, redone for the rows whose delta has its own weight.

    Args:
        base_layer: an RMS norm with a weight.
        arena, table, step: as for DeltaMethod.
    """

    def __init__(
        self,
        base_layer: torch.nn.Module,
        arena: torch.Tensor,
        table: torch.Tensor,
        step: Step,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.arena = arena
        self.table = table
        self.groups: RowGroups = step.tokens

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight."""
        return self.base_layer.get_parameter("weight")

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            y = self.base_layer(x)
            return self._redo(y, x)
        # The base returns the sum that it normalised as the new residual.
        y, residual = self.base_layer(x, residual)
        return self._redo(y, residual), residual

    def _redo(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        torch.ops.dqrelo.delta_norm_(
            y,
            x,
            self.arena,
            self.table,
            self.groups.rows,
            self.groups.slots,
            self.groups.num_active,
            self.base_layer.variance_epsilon,
        )
        return y


def install(
    model: torch.nn.Module,
    site: Site,
    arena: torch.Tensor,
    table: torch.Tensor,
    step: Step,
    added: AddedRows | None,
) -> None:
    """Put the deltas behind one module of ``model``, which is changed in place."""
    if site.is_norm:
        parent, _, leaf = site.name.rpartition(".")
        norm = DeltaNorm(site.module, arena, table, step)
        setattr(model.get_submodule(parent), leaf, norm)
        return
    site.module.quant_method = DeltaMethod(
        site.module.quant_method, site, arena, table, step, added
    )
    # vLLM has faster paths around quant_method, which would leave the deltas out.
    embedding = isinstance(site.module, VocabParallelEmbedding)
    path = "use_fused_embedding" if embedding else "requires_unquantized_input"
    setattr(site.module, path, not embedding)
