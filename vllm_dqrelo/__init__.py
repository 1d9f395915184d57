# SPDX-License-Identifier: Apache-2.0
"""Serve dozens of delta-compressed full fine-tunes of one base model in vLLM."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    from vllm_dqrelo.format.delta import Delta

__version__ = "0.2.0"


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it once in every process."""
    from vllm_dqrelo.plugin import register

    register()


def load_delta(llm: "LLM", name: str, delta: "str | Path | Delta") -> "LoRARequest":
    """Load a delta into an offline engine; see ``offline.load_delta``."""
    from vllm_dqrelo.frontend.offline import load_delta

    return load_delta(llm, name, delta)


def delta_of(base: str, model: Any, *args: Any, **options: Any) -> "Delta":
    """Make a delta of a model in memory; see ``dqrelo_tools/trained.py``."""
    from dqrelo_tools.trained import delta_of

    return delta_of(base, model, *args, **options)
