# SPDX-License-Identifier: Apache-2.0
"""A step of the worker with several deltas, against each of them merged."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from vllm.lora.request import LoRARequest

from dqrelo_kernels.table import ALIGNMENT, INT4, empty_table
from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.packed import PackedDelta, pack
from vllm_dqrelo.worker.self_check import requests
from vllm_dqrelo.worker.self_check.oracle import Oracle
from vllm_dqrelo.worker.self_check.report import Report
from vllm_dqrelo.worker.self_check.requests import Logits
from vllm_dqrelo.worker.self_check.synthetic import Kind, Named, Synthetic, by_site

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

RANK = 32
KINDS = (Kind(1, RANK // 2, INT4), Kind(0, RANK, torch.bfloat16))
# Of the size of a matrix: far above what rounding to 16 bits does to a model.
STRENGTH = 1 / 8
# What separates two models is so many times the error that is allowed: of the error
# towards the other model, and of the error in any direction, in which the rounding of
# 16 bits moves logits through all layers.
TOWARDS, ANYWHERE = 10, 3
# Elements of the matrices that deltas change. To merge them takes seconds on a CPU.
MOST_ELEMENTS = {"cuda": 2**38, "cpu": 2**26}
PROMPT = 7  # tokens


class Model(NamedTuple):
    """What a request is served by: the base, or a delta."""

    name: str
    request: LoRARequest | None = None
    delta: Synthetic | None = None


def check_step(worker: Any, manager: "DeltaManager", report: Report) -> None:
    """Serve the base and two deltas in one batch, and each merged model alone.

    A merged model is the base, eager, with ``Oracle`` in place of the ops. The base's
    weights are not written to, so that there is nothing to restore.

    Semantics: for each request and step, with the logits ``error = served - merged``
    and ``apart = merged of another model - merged``,
    ``|error . apart| <= |apart|^2 / TOWARDS`` and ``|error| <= |apart| / ANYWHERE``.

    Args:
        worker: vLLM's, with its KV cache and without requests. Mutated: the cache.
        manager: of the worker, without deltas. Mutated: deltas come and go.
        report: takes the errors. Mutated.
    """
    runner = worker.model_runner
    if problem := requests.why_none(runner, PROMPT):
        report.left_out.append(f"a step: {problem}")
        return
    parameters = by_site(manager)
    names = _names(manager, parameters)
    norms = (parameters[s.name] for s in manager.sites.by_name.values() if s.is_norm)
    if not names or any(p.name not in names for norm in norms for p in norm):
        # So small a change would be lost in the rounding of 16 bits.
        report.left_out.append("a step: delta_memory_gib has no room for two deltas")
        return
    models = [Model("the base"), *_deltas(manager, names)]
    nothing = _nothing(manager)
    _compare(worker, manager, models, nothing, parameters, PROMPT, report)
    merge_rows = manager.step.tokens.merge_rows
    if manager.step.merges:  # prompts of so many tokens
        if problem := requests.why_none(runner, merge_rows):
            report.left_out.append(f"a merged prompt: {problem}")
        else:
            _compare(worker, manager, models, nothing, parameters, merge_rows, report)
    for model in (*models, nothing):
        if model.request:
            manager.forget(model.request.lora_name)


def _compare(
    worker: Any,
    manager: "DeltaManager",
    models: list[Model],
    nothing: Model,
    parameters: dict[str, list[Named]],
    length: int,
    report: Report,
) -> None:
    runner = worker.model_runner
    generator = torch.Generator().manual_seed(length)
    tokens = runner.model_config.get_vocab_size()
    prompt = torch.randint(tokens, (length,), generator=generator).tolist()

    def alone(model: Model) -> Logits | None:
        with compat.eager(runner):
            if model.delta is None:
                return requests.serve(worker, [None], prompt)[0]
            with Oracle(manager, parameters, model.delta):
                return requests.serve(worker, [nothing.request], prompt)[0]

    merged = [alone(model) for model in models]
    size = min(requests.most_requests(runner, length), manager.max_loras + 1)
    ways: dict[str, Callable[[], AbstractContextManager[None]]]
    ways = {"served": nullcontext}
    if manager.device.type == "cuda" and not runner.model_config.enforce_eager:
        ways["eager"] = lambda: compat.eager(runner)
    for mode, how in ways.items():
        served: list[Logits | None] = []
        for first in range(0, len(models), size):
            batch = [model.request for model in models[first : first + size]]
            with how():
                served += requests.serve(worker, batch, prompt)
        for model, own, got in zip(models, merged, served, strict=True):
            if own is None or got is None:
                continue  # another worker has the logits
            others = [other for other in merged if other is not own and other]
            for step in Logits._fields:
                _near(model, step, mode, got, own, others, length, report)


def _near(
    model: Model,
    step: str,
    mode: str,
    got: Logits,
    own: Logits,
    others: list[Logits],
    length: int,
    report: Report,
) -> None:
    """See that logits are those of their own model, and not of another."""
    merged = getattr(own, step)
    error = _difference(getattr(got, step), merged)
    for other in others:
        apart = _difference(getattr(other, step), merged)
        distance = apart.norm()
        towards, anywhere = error @ apart / distance, error.norm()
        part = max(abs(towards) * TOWARDS, anywhere * ANYWHERE) / distance
        report.note(
            "step",
            float(part.nan_to_num(nan=torch.inf)),
            f"{step} of {model.name} after {length} tokens, {mode}: of the "
            f"{distance:.3g} between the logits of its merged model and those of "
            f"another, the served logits are {anywhere:.3g} off, {towards:.3g} of "
            "these towards the other model",
        )


def _difference(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Of the logits of tokens that a model has; what they have in common is nothing."""
    known = one.isfinite() | other.isfinite()
    difference = one[known].double() - other[known].double()
    return difference - difference.mean()


def _deltas(manager: "DeltaManager", names: list[str]) -> list[Model]:
    """Two deltas in host memory that change these parameters."""
    most = min(
        manager.memory.rank // len(site.of_a_row) // 2 * 2
        for site in manager.sites.by_name.values()
    )
    models = []
    for i, kind in enumerate(KINDS):
        digest, kind = f"self-check delta {i}", kind.limited(most)
        delta = Synthetic(digest, manager.base, names, kind, STRENGTH)
        packed = pack(delta, manager.sites, manager.device, manager.unlike)
        manager.host.put(packed)
        models.append(Model(f"delta {i}", LoRARequest(digest, i + 2, digest), delta))
    return models


def _names(manager: "DeltaManager", parameters: dict[str, list[Named]]) -> list[str]:
    """Parameters of the first and the last sites, and on to the middle, that fit."""
    sites = list(manager.sites.by_name.values())
    elements = MOST_ELEMENTS[manager.device.type]
    size = manager.memory.arena // min(len(KINDS), manager.max_loras)
    names: dict[str, None] = {}
    for pair in zip(sites, reversed(sites), strict=True):
        for site in pair:
            new = [p.name for p in parameters[site.name] if p.name not in names]
            rows, columns = sum(site.sizes), site.columns
            # At most: a plane and its scale, factors of 16 bits, all of them padded.
            least = rows * (columns // 8 + 8) + 2 * RANK * (rows + columns)
            least += len(new) * 8 * ALIGNMENT
            if new and rows * columns <= elements and least <= size:
                elements, size = elements - rows * columns, size - least
                names |= dict.fromkeys(new)
    return list(names)


def _nothing(manager: "DeltaManager") -> Model:
    """A delta that changes nothing: it gives the oracle rows."""
    digest = "self-check nothing"
    entries = empty_table(1, manager.sites.count, "cpu")[0]
    manager.host.put(PackedDelta(digest, torch.zeros(0, dtype=torch.uint8), entries))
    return Model(digest, LoRARequest(digest, 1, digest))
