# SPDX-License-Identifier: Apache-2.0
"""Where a request meets its delta: the base's layers, followed by the ops."""

from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.rows import RowGroups
from dqrelo_kernels.table import SiteDeltas
from vllm_dqrelo.worker import compat, limits
from vllm_dqrelo.worker.experts import GATE_UP, DeltaExperts
from vllm_dqrelo.worker.fully_sharded import linear_of
from vllm_dqrelo.worker.sites import ExpertSite, Site
from vllm_dqrelo.worker.step import Step
from vllm_dqrelo.worker.vocabulary import AddedRows


class DeltaMethod(QuantizeMethodBase):
    """A layer's own method, and then the deltas of its rows.

    The method is wrapped, not replaced: the base may store its weights in any way.

    Args:
        inner: the layer's method.
        site: the layer as a site.
        deltas: of this site.
        step: gives the slot of each row.
        added: rows of tokens that are not the base's, in a vocabulary matrix.
    """

    def __init__(
        self,
        inner: QuantizeMethodBase,
        site: Site,
        deltas: SiteDeltas,
        step: Step,
        added: AddedRows | None = None,
    ) -> None:
        self.inner = inner
        self.deltas = deltas
        self.step = step
        self.added = added
        self.is_head = isinstance(site.module, ParallelLMHead)
        self.add = linear_of(site)
        self.merges = step.merges and limits.is_linear(site)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("deltas are installed after a model has its weights")

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        self.inner.process_weights_after_loading(layer)

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.merges:
            return self._linear(layer.weight, x, bias)
        y = self.inner.apply(layer, x, bias)
        groups = self.step.head_rows(x) if self.is_head else self.step.tokens
        self.add(
            _rows(y),
            self.step.scratch,
            _rows(x),
            *self.deltas,
            *groups.of_rows,
        )
        if self.added is not None:
            self.added.logits_(y, x, groups.by_row[: len(x)])
        return y

    def _linear(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The base's product and the deltas in one op, which may merge the two."""
        groups = self.step.tokens
        y = torch.ops.dqrelo.linear(
            _rows(x),
            weight,
            bias,
            self.step.whole,
            self.step.scratch,
            *self.deltas,
            *groups.of_rows,
            groups.unmerged,
            groups.merged,
        )
        return y.view(*x.shape[:-1], len(weight))

    def embedding(self, layer: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        y = self.inner.embedding(layer, ids)
        known = ids if self.added is None else ids.clamp_max(self.added.start - 1)
        groups = self.step.embedded
        _embed(y, known, self.deltas, groups)
        if self.added is not None:
            rows = ids.reshape(-1)
            self.added.embed_(_rows(y), rows, groups.by_row[: len(rows)])
        return y


class DeltaEmbedding(torch.nn.Embedding):
    """A table other than the vocabulary's, such as learnt position embeddings.

    ``install`` puts this class between the module's class and torch.nn.Embedding. So
    this class gets the numbers that the module's class looks up.
    """

    deltas: SiteDeltas
    step: Step

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = super().forward(ids)
        _embed(y, ids, self.deltas, self.step.embedded)
        return y


class NormDeltas(NamedTuple):
    """What a norm needs for its deltas.

    Attributes:
        site, step: deltas and step, as for DeltaMethod.
        eps: of the norm.
        centred: whether it subtracts the mean.
        batched: whether activations are [1, M, ...] and not [M, ...].
    """

    site: SiteDeltas
    step: Step
    eps: float
    centred: bool
    batched: bool


class DeltaNorm(torch.nn.Module):
    """A norm of the base, redone for the rows whose delta has its own weight.

    ``install`` puts it in front of the module's class.
    """

    deltas: NormDeltas

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            return self._redo(super().forward(x), x)
        # The base returns the sum that it normalised as the new residual.
        y, residual = super().forward(x, residual)
        return self._redo(y, residual), residual

    def _redo(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        site, step, eps, centred, batched = self.deltas
        torch.ops.dqrelo.delta_norm_(
            y[0] if batched else y,
            x[0] if batched else x,
            site.arena,
            site.table,
            step.tokens.rows,
            step.tokens.slots,
            step.tokens.num_active,
            eps,
            centred,
        )
        return y


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[M, K] of [M, K] or [1, M, K]: what deltas are for has one row a token."""
    if x.numel() != x.shape[-2] * x.shape[-1]:
        raise RuntimeError(
            f"a layer is called with {tuple(x.shape)}, expected one row a token: this "
            "model cannot have deltas"
        )
    return x.reshape(x.shape[-2:])


def _embed(
    y: torch.Tensor,
    ids: torch.Tensor,
    deltas: SiteDeltas,
    groups: RowGroups,
) -> None:
    """Add every row's delta to embeddings [M, K] of ids [M], or [1, M, K] of [1, M]."""
    torch.ops.dqrelo.delta_embedding_(
        _rows(y),
        ids.reshape(-1),
        *deltas,
        groups.rows,
        groups.slots,
        groups.num_active,
    )


def install(
    model: torch.nn.Module,
    site: Site,
    deltas: SiteDeltas,
    step: Step,
    added: AddedRows | None,
) -> None:
    """Add the deltas to one module of ``model``, which is changed in place.

    In a step that skips deltas, the module has the class and the method of vLLM again,
    unless its vocabulary has room for added tokens.
    """
    if site.is_norm:
        _install_norm(model, site, deltas, step)
    elif isinstance(site, ExpertSite):
        _install_experts(model, site, deltas, step)
    elif hasattr(site.module, "quant_method"):
        _install_method(site, deltas, step, added)
    else:
        _install_embedding(site, deltas, step)


def _install_method(
    site: Site,
    deltas: SiteDeltas,
    step: Step,
    added: AddedRows | None,
) -> None:
    """A linear layer, the embedding of the vocabulary or the LM head."""
    module = site.module
    method = DeltaMethod(module.quant_method, site, deltas, step, added)
    # The base's rows do not have the added tokens, so that their method stays.
    put = step.put if added is None else setattr
    put(module, "quant_method", method)
    # vLLM has faster paths around quant_method, which would leave the deltas out.
    path = "use_fused_embedding" if site.is_vocabulary else "requires_unquantized_input"
    put(module, path, not site.is_vocabulary)


def _install_experts(
    model: torch.nn.Module,
    site: ExpertSite,
    deltas: SiteDeltas,
    step: Step,
) -> None:
    """One of the two matrices of all experts of a layer."""
    module = site.module
    if site.part == GATE_UP:  # which comes first
        step.put(module, "quant_method", DeltaExperts(module.quant_method, step))
        layer = site.name.rpartition(".")[0]
        runner: Any = model.get_submodule(layer.rpartition(".")[0])
        step.put(runner, *compat.opaque_experts(runner))
        if (shared := runner.shared_experts) is not None:
            step.put(shared, *compat.experts_in_turn(shared))
    module.quant_method.install(site.part, deltas, linear_of(site))


def _install_norm(
    model: torch.nn.Module,
    site: Site,
    deltas: SiteDeltas,
    step: Step,
) -> None:
    module = site.module
    eps = module.eps if site.is_layer_norm else module.variance_epsilon
    batched = compat.adds_batch_dimension(model)
    _derive(step, module, DeltaNorm, type(module))
    module.deltas = NormDeltas(deltas, step, eps, site.is_layer_norm, batched)


def _install_embedding(site: Site, deltas: SiteDeltas, step: Step) -> None:
    """A table other than the vocabulary's."""
    module = site.module
    own = () if type(module) is torch.nn.Embedding else (type(module),)
    _derive(step, module, *own, DeltaEmbedding)
    module.deltas, module.step = deltas, step


def _derive(step: Step, module: torch.nn.Module, *classes: type) -> None:
    """Exchange the class of a module for a new class with these base classes.

    Why the class, and not a wrapper or a hook: the model's code knows the module by its
    path, its parameters and its type, which a wrapper would change. A subclass may look
    up something else than its input (OPT's positions are shifted by 2) and passes that
    on to ``super().forward``, where only a class between the two sees it. In a step
    that skips deltas, one assignment restores the class, and no call is left.
    """
    step.put(module, "__class__", type(type(module).__name__, classes, {}))
