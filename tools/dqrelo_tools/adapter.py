# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter in PEFT's format becomes a delta of low rank."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_dqrelo.format.checkpoint import Checkpoint, SafetensorsFiles, locate
from vllm_dqrelo.format.errors import refuse
from vllm_dqrelo.format.tensors import LORA_A, LORA_B, SHAPE, MatrixDelta

CONFIG = "adapter_config.json"
STEM = "adapter_model"
PREFIX = "base_model.model."
# Options of PEFT that change what the factors mean, with the values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
}


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is an adapter and not a checkpoint."""
    return (folder / CONFIG).is_file()


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix, as they are called in the adapter's file."""

    down: str
    up: str
    embedding: bool
    scaling: float


class Adapter:
    """An opened adapter.

    Attributes:
        pairs: parameter of the base -> its factors.
        whole: parameter of the base -> tensor that replaces it (modules_to_save,
            trained biases).

    Raises:
        DqreloError: it is not a plain LoRA of ``base``; lists all reasons.
    """

    def __init__(self, folder: Path, base: Checkpoint) -> None:
        self.folder = folder
        self.config = json.loads((folder / CONFIG).read_text())
        self.files = SafetensorsFiles(locate(folder, STEM))
        self.pairs: dict[str, Pair] = {}
        self.whole: dict[str, str] = {}
        problems = [
            f"{CONFIG}: {key} is {self.config[key]!r}; merge the adapter into its base "
            "and convert that"
            for key, plain in PLAIN.items()
            if key in self.config and self.config[key] not in plain
        ]
        for stored in self.files:
            problems += self._place(stored, base)
        refuse(f"{folder} cannot be converted:", problems)

    def _place(self, stored: str, base: Checkpoint) -> list[str]:
        """Sort one stored tensor; what is wrong with it."""
        name = stored.removeprefix(PREFIX)
        module, _, rest = name.partition(".lora_")
        if not rest:
            parameter = name.replace(".modules_to_save", "").replace(".base_layer", "")
            self.whole[parameter] = stored
        elif rest.startswith(("A.", "embedding_A")):
            up = stored.replace(".lora_A.", ".lora_B.").replace("_A", "_B")
            if up not in self.files:
                return [f"{stored} has no {up}"]
            parameter, embedding = f"{module}.weight", rest.startswith("embedding")
            self.pairs[parameter] = Pair(stored, up, embedding, self._scaling(module))
        elif rest.startswith(("B.", "embedding_B")):
            return []
        else:
            return [f"{stored} is no factor of a plain LoRA"]
        if base.tied and parameter == "lm_head.weight":
            return [f"{stored} unties the LM head, which cannot be served yet"]
        if parameter not in base:
            return [f"{stored}: the base has no {parameter}"]
        return []

    def _scaling(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rslora, of one module."""
        rank = self._of("rank_pattern", module, self.config["r"])
        alpha = self._of("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _of(self, key: str, module: str, default: float) -> float:
        """A per-module option, matched as PEFT does."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def matrix(self, parameter: str) -> MatrixDelta:
        """The change of one matrix: ``scaling * B A``, folded into B.

        PEFT's A is [R, in] and B [out, R]; an embedding's are [R, vocabulary] and
        [hidden, R], and its change is the transpose of their product.
        """
        pair = self.pairs[parameter]
        a, b = self.files.get(pair.down), self.files.get(pair.up)
        dtype = a.dtype
        if pair.embedding:
            a, b = b.T, a.T
        stored = {
            SHAPE: torch.tensor([b.shape[0], a.shape[1]]),
            LORA_A: a.contiguous(),
            LORA_B: (pair.scaling * b.float()).to(dtype).contiguous(),
        }
        return MatrixDelta.from_tensors("", stored)

    def change(self, parameter: str, before: torch.Tensor) -> torch.Tensor:
        """Fine-tune minus base of a parameter that the adapter holds as a whole."""
        return self.files.get(self.whole[parameter]).float() - before.float()
