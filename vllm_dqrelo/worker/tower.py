# SPDX-License-Identifier: Apache-2.0
"""What encodes images: vision tower and projector, with one model's weights at a time.

A batch of the language model has rows of many deltas. An encoder is called for images,
each with thousands of rows, and vLLM's code reads some of its weights itself (patch
convolutions, positions). So the images of a step are encoded model by model, and before
a model's images all weights that its fine-tune changed are written in place.
"""

from collections.abc import Iterable, Mapping
from types import NoneType
from typing import Any, NamedTuple

import torch
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
)

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.tensors import MatrixDelta
from vllm_dqrelo.worker import compat, shards
from vllm_dqrelo.worker.order import REARRANGED, compare, unlike
from vllm_dqrelo.worker.sites import Sites, language_model

logger = init_logger(f"vllm.{__name__}")

OTHER_FORM = "vLLM keeps it in another form, which an encoder's deltas cannot change"

Change = MatrixDelta | torch.Tensor  # of a matrix, or a parameter as it is


class Part(NamedTuple):
    """The place of one parameter of the checkpoint.

    Attributes:
        shape: in the checkpoint.
        module, leaf: whose parameter has it, from row ``start`` on.
        rows, columns: of the checkpoint's that this worker has, int64; None for all.
    """

    shape: tuple[int, ...]
    module: Any
    leaf: str
    start: int = 0
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def cut(self, change: Change) -> Change:
        """What this worker has of a change."""
        if self.rows is None:
            return change
        if isinstance(change, MatrixDelta):
            assert self.columns is not None
            return change.part(self.rows, self.columns)
        rows = change[self.rows]
        return rows if self.columns is None else rows[:, self.columns]

    def write(self, value: torch.Tensor) -> None:
        """Make ``value`` the weights that the encoder reads."""
        weights = self.module.get_parameter(self.leaf).data
        weights[self.start : self.start + len(value)].copy_(value)


def is_beside(model: torch.nn.Module, parameter: str) -> bool:
    """Whether it is of a multimodal model, and not of its language model."""
    language = language_model(model)
    path = next(p for p, m in model.named_modules() if m is language)
    while (mapped := compat.map_name(model, parameter)) is None:
        if not parameter:
            return False
        parameter = parameter.rpartition(".")[0]  # vLLM drops this one
    return bool(path) and not f"{mapped[0]}.".startswith(f"{path}.")


class Tower:
    """The parameters of a multimodal model outside of its language model.

    Args:
        sites: of the language model. The encoder of ``sites.model`` is mutated: on a
            CPU its linear layers multiply by their weights as they are.
        checkpoint: the base's.
        device: of the model. The base's weights are kept there once more.

    Attributes:
        nbytes: of the base's weights.
    """

    def __init__(
        self, sites: Sites, checkpoint: Checkpoint, device: torch.device
    ) -> None:
        self._device = device
        self._parts: dict[str, Part] = {}
        self._base: dict[str, torch.Tensor] = {}
        self._unused: set[str] = set()
        encoder = Sites(sites.model, checkpoint, beside=True)
        self._unlike = unlike(encoder, checkpoint, device)
        for name in checkpoint:
            if sites.places(name) or not is_beside(sites.model, name):
                continue
            part = _part(encoder, name, tuple(checkpoint.spec(name)[1]))
            if part is None:
                self._unused.add(name)
                continue
            self._parts[name] = part
            self._keep(name, part, checkpoint.get(name))
        if missing := _without_source(sites, self._parts.values()):
            # A name that leads nowhere may be that parameter's.
            reason = f"vLLM may have it as {missing}"
            self._unlike |= dict.fromkeys(self._unused, reason)
        self._make_plain()
        self.nbytes = sum(tensor.nbytes for tensor in self._base.values())
        logger.info(
            "dqrelo: deltas may change what encodes images: %.2f GiB of the base, kept "
            "twice",
            self.nbytes / 2**30,
        )
        self._model: str | None = None
        self._changed: set[str] = set()

    def _keep(self, name: str, part: Part, stored: torch.Tensor) -> None:
        """Keep the base's weights, or note why a delta cannot change them."""
        if not _is_plain(part.module, self._device):
            self._unlike[name] = OTHER_FORM
            return
        weights = part.module.get_parameter(part.leaf)
        if part.rows is None and (
            weights.shape != part.shape or compare(weights.data, stored)
        ):
            self._unlike[name] = REARRANGED
        base = part.cut(stored)
        assert isinstance(base, torch.Tensor)
        dtype = getattr(part.module, "params_dtype", weights.dtype)
        self._base[name] = base.to(self._device, dtype)

    def _make_plain(self) -> None:
        """Let linear layers on a CPU multiply by weights that can be written."""
        packed: dict[Any, list[str]] = {}
        for name, part in self._parts.items():
            if hasattr(part.module, "cpu_linear"):
                packed.setdefault(part.module, []).append(name)
        for module, names in packed.items():
            if not self._unlike.keys().isdisjoint(names):
                # The weights of the layer cannot be made of the checkpoint's.
                self._unlike = dict.fromkeys(names, OTHER_FORM) | self._unlike
                continue
            sizes, columns = shards.sizes_here(module, 0)
            compat.multiply_by_weight(module, (sum(sizes), columns))
            for name in names:
                self._parts[name].write(self._base[name])

    def has(self, name: str) -> bool:
        """Whether the base's parameter ``name`` is the encoder's."""
        return name in self._parts or name in self._unused

    def problem(self, name: str, shape: tuple[int, ...]) -> str | None:
        """Why a delta cannot change ``name``, which it has with ``shape``."""
        if name in self._unlike:
            return f"{name}: {self._unlike[name]}"
        expected = self._parts[name].shape if name in self._parts else shape
        if shape != expected:
            return f"{name} is {list(shape)}, expected {list(expected)}"
        return None

    def uses(self, name: str) -> bool:
        """Whether vLLM loads the base's parameter ``name``.

        The last layers of a tower whose middle feeds the language model are not loaded.
        """
        return name in self._parts

    def cut(self, name: str, change: Change) -> Change:
        """What this worker has of a delta's change of a parameter that is used."""
        return self._parts[name].cut(change)

    def use(self, digest: str | None, changes: Mapping[str, Change]) -> None:
        """Encode with the weights of one model from now on.

        Semantics: weights = base + change, rounded to the base's dtype.

        Args:
            digest: of the delta; None for the base.
            changes: what the delta changes, from ``cut``.
        """
        if digest == self._model:
            return
        self._model = "some of each"  # if the next lines fail
        self._changed |= changes.keys()
        for name in self._changed:
            self._parts[name].write(self._merged(name, changes.get(name)))
        self._changed, self._model = set(changes), digest

    def _merged(self, name: str, change: Change | None) -> torch.Tensor:
        base = self._base[name]
        if isinstance(change, MatrixDelta):
            merged = base.float() + change.to(self._device).dense()
            return merged.to(base.dtype)
        return base if change is None else change.to(self._device, base.dtype)


def _part(sites: Sites, name: str, shape: tuple[int, ...]) -> Part | None:
    """Where vLLM has a parameter of the encoder; None if nowhere."""
    if places := sites.places(name):
        site, leaf = places[0].site, places[0].leaf
        start = sum(site.sizes[: places[0].index])
        columns = places[0].columns if len(places[0].shape) == 2 else None
        return Part(shape, site.module, leaf, start, places[0].rows, columns)
    if (mapped := compat.map_name(sites.model, name)) is None:
        return None
    path, _, leaf = mapped[0].rpartition(".")
    modules: dict[str, Any] = dict(sites.model.named_modules())
    if leaf not in getattr(modules.get(path), "_parameters", {}):
        return None
    return Part(shape, modules[path], leaf)


def _is_plain(module: Any, device: torch.device) -> bool:
    """Whether a module computes with its weights, or can (``_make_plain``)."""
    method = getattr(module, "quant_method", None)
    if isinstance(module, LinearBase) and device.type != "cpu":
        return compat.multiplies_by_weight(method)
    known = NoneType, UnquantizedLinearMethod, UnquantizedEmbeddingMethod
    return type(method) in known


def _without_source(sites: Sites, parts: Iterable[Part]) -> str | None:
    """A parameter of the encoder that no parameter of the checkpoint leads to."""
    known = {(part.module, part.leaf) for part in parts}
    heads = {site.module for site in sites.by_name.values()}
    language = {*language_model(sites.model).modules()}
    for path, module in sites.model.named_modules():
        if module in language or module in heads:
            continue
        for leaf, weights in module._parameters.items():
            if weights is not None and (module, leaf) not in known:
                return f"{path}.{leaf}"
    return None
