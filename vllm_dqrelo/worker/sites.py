# SPDX-License-Identifier: Apache-2.0
"""Where in the model a delta applies: each module is a site, with its table.

A fused module (q/k/v, gate/up) is one site with a slice for each checkpoint
matrix. A tied LM head is a site of its own: the same stored change feeds it and
the embedding, but it sees the sampled rows. The experts of a layer are two sites, with
slices for each expert. Of a multimodal model only the language model has sites for a
batch: the rows of its other parts are not tokens, and ``tower.py`` has its own.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, LayerNorm, RMSNorm
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import supports_multimodal

from vllm_dqrelo.worker import compat, shards
from vllm_dqrelo.worker.experts import DOWN, GATE_UP

# What the q/k/v slices of a fused attention projection are called.
QKV = {"q": 0, "k": 1, "v": 2}

Shape = tuple[tuple[int, ...], int]  # sizes of the slices, columns

LAYER_NORMS = (LayerNorm, torch.nn.LayerNorm)


@dataclass(frozen=True)
class Site:
    """One module of the model that deltas can change.

    Attributes:
        name: path of the module in the model.
        module: the module itself.
        first: index of its first slice among the slices of all sites.
        sizes: output features (rows of the checkpoint matrix) of each slice that this
            worker has; for a norm the length of its weight.
        columns: input features of its matrices that this worker has; 0 for a norm.
        whole_sizes, whole_columns: of all workers together.
        experts: how many the module has, one after another in ``sizes``; 1 for a layer
            without.
        fully_sharded: whether workers share both factors of its matrices.
    """

    name: str
    module: Any
    first: int
    sizes: tuple[int, ...]
    columns: int
    whole_sizes: tuple[int, ...]
    whole_columns: int
    experts: int = 1
    fully_sharded: bool = False

    @property
    def is_norm(self) -> bool:
        """Whether the site has one vector instead of matrices."""
        return not self.columns

    @property
    def is_vocabulary(self) -> bool:
        """Whether the rows of its matrix are tokens."""
        return isinstance(self.module, VocabParallelEmbedding)

    @property
    def is_split(self) -> bool:
        """Whether other workers have other parts of its matrices."""
        here = self.sizes, self.columns
        return here != (self.whole_sizes, self.whole_columns)

    @property
    def splits_columns(self) -> bool:
        """Whether workers add up what they compute, each of its columns."""
        return self.columns != self.whole_columns

    def ranks(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of ``rank`` ranks that A has in this worker, and B: int64 each."""
        ranks = torch.arange(rank)
        if not self.fully_sharded:
            return ranks, ranks
        group = self.sharded_by
        some = ranks.tensor_split(group.tp_size)[group.tp_rank]
        return (ranks, some) if self.splits_columns else (some, ranks)

    @property
    def sharded_by(self) -> Any:
        """What has the module's ``tp_size`` and ``tp_rank``."""
        return self.module

    def rows(self, index: int) -> torch.Tensor:
        """The checkpoint's rows that a slice has, int64 [sizes[index]]."""
        if not self.is_split:
            return torch.arange(self.sizes[index])
        return shards.rows_here(self.module, self.sizes, index, self.whole_sizes[index])

    def kept_columns(self) -> torch.Tensor:
        """The checkpoint's columns that the site has, int64 [columns]."""
        if not self.splits_columns:
            return torch.arange(self.columns)
        return shards.columns_here(self.module, self.columns, self.whole_columns)

    @property
    def of_a_row(self) -> tuple[int, ...]:
        """Sizes of the slices that one row meets: all, or those of one expert."""
        return self.sizes[: len(self.sizes) // self.experts]

    @property
    def whole_of_a_row(self) -> tuple[int, ...]:
        """The same of the checkpoint's matrices."""
        return self.whole_sizes[: len(self.sizes) // self.experts]

    def slices(self, device: torch.device) -> torch.Tensor:
        """int32 [slices of a row + 1]: the first output feature of each, then N.

        Sites of the same sizes share it: a compiled step looks at each tensor it has.
        """
        return _ends(self.of_a_row, device)

    @property
    def adds_bias(self) -> bool:
        """Whether it is this worker whose part of the output has the bias."""
        return not self.splits_columns or self.module.tp_rank == 0

    @property
    def is_layer_norm(self) -> bool:
        """Whether it is a norm that subtracts the mean."""
        return isinstance(self.module, LAYER_NORMS)

    def has(self, leaf: str) -> bool:
        """Whether the module has a "weight" or a "bias"."""
        return getattr(self.module, leaf, None) is not None

    def base_vector(self, leaf: str, index: int = 0) -> torch.Tensor:
        """The base's bias of one slice or a norm's weight, float32 on the CPU."""
        vector = self.module.get_parameter(leaf)
        start = sum(self.sizes[:index])
        return vector[start : start + self.sizes[index]].detach().float().cpu()


@dataclass(frozen=True)
class ExpertSite(Site):
    """The gate and up matrices of all experts of a layer, or their down matrices.

    Attributes:
        part: GATE_UP or DOWN.
    """

    part: str = GATE_UP

    @property
    def sharded_by(self) -> Any:
        return self.module.moe_config

    def rows(self, index: int) -> torch.Tensor:
        size, whole = self.sizes[index], self.whole_sizes[index]
        if size == whole:
            return torch.arange(size)
        return shards.expert_rows_here(self.module, index % 2, size, whole)

    def kept_columns(self) -> torch.Tensor:
        if not self.splits_columns:
            return torch.arange(self.columns)
        return shards.expert_columns_here(self.module, self.columns, self.whole_columns)


@dataclass(frozen=True)
class Place:
    """Where one parameter of the fine-tune goes: ``leaf`` is "weight" or "bias"."""

    site: Site
    index: int
    leaf: str

    @property
    def slice(self) -> int:
        """Among the slices of all sites."""
        return self.site.first + self.index

    @property
    def rows(self) -> torch.Tensor:
        """The rows of the checkpoint's matrix that this worker has: int64."""
        return self.site.rows(self.index)

    @property
    def columns(self) -> torch.Tensor:
        """The same of its columns."""
        return self.site.kept_columns()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter in the checkpoint."""
        size = self.site.whole_sizes[self.index]
        matrix = self.leaf == "weight" and not self.site.is_norm
        return (size, self.site.whole_columns) if matrix else (size,)


class Sites:
    """All sites of a loaded model.

    Args:
        model: as vLLM has loaded it.
        parameters: of the base's checkpoint. A module that is fused in vLLM and in
            the checkpoint has one slice.
        added_tokens: rows of its vocabulary matrices that are not the base's.
        is_stage: whether other workers have other layers of the model.
        fully_sharded: whether workers that share a layer share both factors.
        tied_embedding: the parameter that the LM head is, too. vLLM may have two
            matrices for it where the checkpoint has a copy.
        beside: sites of the modules outside of the language model, and of no other.

    Attributes:
        by_name: module path -> site, in the order of the model.
        count: slices in all.
        is_stage: whether other workers have other layers of the model.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        parameters: Iterable[str],
        added_tokens: int = 0,
        is_stage: bool = False,
        fully_sharded: bool = False,
        tied_embedding: str | None = None,
        beside: bool = False,
    ) -> None:
        self.model = model
        self.tied_embedding = tied_embedding
        self.is_stage = is_stage
        self._fully_sharded = fully_sharded
        self.added_tokens = added_tokens
        self.by_name: dict[str, Site] = {}
        self.count = 0
        self._experts: dict[str, tuple[str, int]] = {}  # path -> site, slice
        mapped = [compat.map_name(model, name) for name in parameters]
        whole = {
            name.rpartition(".")[0]
            for name, shard in filter(None, mapped)
            if shard is None
        }
        known = set(language_model(model).modules())
        for name, module in model.named_modules():
            is_head = isinstance(module, ParallelLMHead)
            if (module not in known and not is_head) != beside:
                continue
            if isinstance(module, RoutedExperts):
                self._add_experts(name, module)
            elif shapes := _slices_of(module, added_tokens):
                here, in_all = shapes
                if name in whole:
                    here, in_all = (((sum(n),), k) for n, k in shapes)
                self._add(name, module, here, in_all)

    def _add(
        self,
        name: str,
        module: Any,
        here: Shape,
        in_all: Shape,
        kind: Callable[..., Site] = Site,
        experts: int = 1,
    ) -> None:
        (sizes, columns), whole = here, in_all
        # Of a vocabulary matrix the factor that is not split is a small part.
        vocabulary = isinstance(module, VocabParallelEmbedding)
        shared = self._fully_sharded and here != in_all and not vocabulary
        site = kind(name, module, self.count, sizes, columns, *whole, experts, shared)
        self.by_name[name] = site
        self.count += len(site.sizes)

    def _add_experts(self, name: str, module: Any) -> None:
        """Two sites: the gate and up matrices of all experts, and the down matrices."""
        count, columns = module.local_num_experts, module.hidden_size
        parts = {"w1": (GATE_UP, 2, 0), "w3": (GATE_UP, 2, 1), "w2": (DOWN, 1, 0)}
        # Its weights may have been filled up with zeros.
        here = module.moe_config.intermediate_size_per_partition
        in_all = here * module.moe_config.tp_size
        for part, shapes in (
            (GATE_UP, [((width,) * 2 * count, columns) for width in (here, in_all)]),
            (DOWN, [((columns,) * count, width) for width in (here, in_all)]),
        ):
            kind = functools.partial(ExpertSite, part=part)
            self._add(f"{name}.{part}", module, shapes[0], shapes[1], kind, count)
        runner = name.rpartition(".")[0]
        for _, weight, expert, shard in module.get_expert_mapping():
            part, slices, index = parts[shard]
            path = runner + weight.removeprefix("experts").rstrip(".")
            self._experts[path] = f"{name}.{part}", expert * slices + index

    @property
    def tokens(self) -> int:
        """The base's; 0 in a stage of a pipeline that has no vocabulary."""
        sites = self.by_name.values()
        return max((s.whole_sizes[0] for s in sites if s.is_vocabulary), default=0)

    def added_here(self, site: Site) -> range:
        """Those of the added tokens whose rows a site has in this worker."""
        if not site.is_vocabulary:
            return range(0)
        return shards.added_here(site.module, self.added_tokens)

    def places(self, parameter: str, tied: bool = True) -> list[Place]:
        """Where the fine-tune's ``parameter`` goes; empty if nowhere.

        Args:
            tied: whether the fine-tune's LM head is its embedding, as the base's is.
        """
        own = self._own_place(parameter)
        places = [own] if own else []
        heads = (
            site
            for site in self.by_name.values()
            if isinstance(site.module, ParallelLMHead)
            and not (own and own.site is site)
        )
        for head in heads if tied else ():
            shared = own and own.leaf == "weight" and _share(own.site, head)
            if shared or parameter == self.tied_embedding:
                places.append(Place(head, 0, "weight"))
        return places

    def _own_place(self, parameter: str) -> Place | None:
        """Where the model's loader puts it."""
        mapped = compat.map_name(self.model, parameter)
        if mapped is None:
            return None
        name, shard = mapped
        module, _, leaf = name.rpartition(".")
        module, index = self._experts.get(module, (module, _index(shard)))
        site = self.by_name.get(module)
        if site is None or leaf not in ("weight", "bias"):
            return None
        if index is None or index >= len(site.sizes):
            return None
        if leaf == "bias" and not site.has(leaf):
            return None
        return Place(site, index, leaf)


def _share(one: Site, other: Site) -> bool:
    """Whether two sites have one matrix."""
    if not one.is_vocabulary:
        return False
    return one.module.weight.data_ptr() == other.module.weight.data_ptr()


@functools.cache
def _ends(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    ends = torch.tensor((0, *sizes)).cumsum(0)
    return ends.to(dtype=torch.int32, device=device)


def language_model(model: Any) -> torch.nn.Module:
    """The part of a multimodal model whose rows are tokens; else the model."""
    return model.get_language_model() if supports_multimodal(model) else model


def _slices_of(module: Any, added_tokens: int) -> tuple[Shape, Shape] | None:
    """The slices of a site here, and in all workers; None where it is not a site."""
    if isinstance(module, LinearBase | VocabParallelEmbedding):
        return (
            shards.sizes_here(module, added_tokens),
            shards.sizes_in_all(module, added_tokens),
        )
    if isinstance(module, torch.nn.Embedding):
        shape = (module.num_embeddings,), module.embedding_dim
        return shape, shape
    partial = getattr(module, "variance_size_override", None)
    if isinstance(module, RMSNorm | GemmaRMSNorm | LayerNorm) and not partial:
        return _norm(module)
    # A subclass may compute something else, or see images.
    return _norm(module) if type(module) is torch.nn.LayerNorm else None


def _norm(module: torch.nn.Module) -> tuple[Shape, Shape] | None:
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 1:
        return None
    shape = (weight.numel(),), 0
    return shape, shape


def _index(shard: Any) -> int | None:
    """The slice of a vLLM shard id; None for several slices."""
    if isinstance(shard, str):
        return QKV.get(shard)
    return shard or 0 if isinstance(shard, int | None) else None
