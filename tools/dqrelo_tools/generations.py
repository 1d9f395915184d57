# SPDX-License-Identifier: Apache-2.0
"""The parameter into which transformers loads each tensor of a checkpoint.

Parameters have been published under several names: with the vision part inside of the
model or next to it, with experts one by one or stacked. transformers maps all of them
to the names of its present model (transformers.conversion_mapping).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vllm_dqrelo.format.checkpoint import Checkpoint


@dataclass(frozen=True)
class Place:
    """Where a stored tensor goes.

    Attributes:
        parameter: of transformers' model.
        expert: where one expert's matrix goes, in the first dimension.
        chunk: which of ``chunks`` equal parts of the expert's rows it is.
        source: of a tensor that is converted otherwise: by which rule.
    """

    parameter: str
    expert: int | None = None
    chunk: int = 0
    chunks: int = 1
    source: str | None = None


def places(checkpoint: Checkpoint) -> Callable[[str], Place] | None:
    """The place of a stored name, as transformers maps it; None for other models."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    if (model := skeleton(checkpoint)) is None:
        return None
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    rules = {source: rule for rule in converters for source in rule.source_patterns}
    prefix, parameters = model.base_model_prefix, model.state_dict()

    def place(name: str) -> Place:
        new, source = rename_source_key(name, renamings, converters, prefix, parameters)
        if new not in parameters and name in parameters:
            new, source = rename_source_key(name, [], [], prefix, parameters)
        return Place(new) if source is None else converted(name, new, source, rules)

    return place


def converted(name: str, parameter: str, source: str, rules: dict[str, Any]) -> Place:
    """The place of a tensor that becomes a part of ``parameter``."""
    rule = rules[source]
    steps = [type(step).__name__ for step in rule.operations]
    number = re.search(source.replace("*.", r"(\d+)\."), name)
    if steps[:1] != ["MergeModulelist"] or steps[1:] not in ([], ["Concatenate"]):
        return Place(parameter, source=f"{source} {number and number.groups()}")
    if number is None or rule.operations[-1].dim != len(steps) - 1:
        return Place(parameter, source=f"{source} {name}")
    sources = rule.source_patterns
    return Place(parameter, int(number[1]), sources.index(source), len(sources))


def skeleton(checkpoint: Checkpoint) -> Any:
    """transformers' model of a checkpoint, without weights; None if it has none.

    Code that comes with a checkpoint is not run.
    """
    import transformers

    config = checkpoint.model_config.parsed
    kind = getattr(transformers, checkpoint.model_config.architecture or "", None)
    if kind is None or config is None:
        return None
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception:  # whatever a model's code raises for a config that it is not for
        return None
