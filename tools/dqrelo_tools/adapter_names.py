# SPDX-License-Identifier: Apache-2.0
"""The names of an adapter's tensors: which parameter each is of, and what it does."""

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from dqrelo_tools.adapter_config import AdapterConfig
from dqrelo_tools.names import without_wrapper

PREFIX = "base_model.model."  # PEFT's own


class Role(StrEnum):
    """What a tensor does to its parameter, in the order in which PEFT applies them."""

    ORIGINAL = "replaces the base's values"
    WHOLE = "is the parameter of modules_to_save"
    DOWN = "is A"
    UP = "is B"
    OFFSET = "is the bias of B"
    MAGNITUDE = "is the magnitude of DoRA"
    ROWS = "are the rows of trainable_token_indices"


@dataclass(frozen=True)
class Name:
    """What the name of a tensor says.

    Attributes:
        parameter: of the model.
        role: of the tensor.
        wrapped: whether more than PEFT's own prefix was read through.
        replaced_by: of an original, what its module must have as well.
    """

    parameter: str
    role: Role
    wrapped: bool
    replaced_by: Role | None = None

    @property
    def module(self) -> str:
        """The module that has the parameter, by which adapter_config.json names it."""
        return self.parameter.rpartition(".")[0]


# Some savers leave the name that PEFT gives to an adapter in memory, as "default".
ADAPTER = r"(?:\.[^.]+)?"
FACTORS = (
    (rf"lora_A{ADAPTER}\.weight", Role.DOWN, "weight"),
    (rf"lora_embedding_A{ADAPTER}", Role.DOWN, "weight"),
    (rf"lora_B{ADAPTER}\.weight", Role.UP, "weight"),
    (rf"lora_embedding_B{ADAPTER}", Role.UP, "weight"),
    (rf"lora_B{ADAPTER}\.bias", Role.OFFSET, "bias"),
    (rf"lora_magnitude_vector{ADAPTER}(?:\.weight)?", Role.MAGNITUDE, "weight"),
    (rf"token_adapter\.trainable_tokens_delta{ADAPTER}", Role.ROWS, "weight"),
)
# What PEFT calls a parameter that it replaces, and what it has in its place.
ORIGINALS = (
    (".token_adapter.base_layer.", Role.ROWS),
    (".base_layer.", Role.UP),
    (".original_module.", Role.WHOLE),
)
COPIES = re.compile(r"\.modules_to_save(?:\.default)?(?=\.)")


def parse(stored: str, config: AdapterConfig) -> Name | None:
    """Read the name of a tensor; None for a factor of another kind than LoRA's.

    A tensor without a mark is the copy that modules_to_save makes, or the base's.
    """
    name = without_wrapper(stored)
    wrapped = stored != PREFIX + name
    for pattern, role, kind in FACTORS:
        if found := re.fullmatch(rf"(.+)\.{pattern}", name):
            return Name(f"{found.group(1)}.{kind}", role, wrapped)
    if re.search(r"\.lora_|\.trainable_tokens", name):
        return None
    if COPIES.search(name):
        return Name(COPIES.sub("", name), Role.WHOLE, wrapped)
    for mark, replaced_by in ORIGINALS:
        if mark in name:
            parameter = name.replace(mark, ".", 1)
            return Name(parameter, Role.ORIGINAL, wrapped, replaced_by)
    plain = Name(name, Role.ORIGINAL, wrapped)
    return replace(plain, role=Role.WHOLE) if config.saves(plain.module) else plain
