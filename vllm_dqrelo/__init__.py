# SPDX-License-Identifier: Apache-2.0
"""Serve dozens of delta-compressed full fine-tunes of one base model in vLLM."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

__version__ = "0.1.0"


def register() -> None:
    """Entry point ``vllm.general_plugins``: vLLM calls it once in every process."""
    from vllm_dqrelo.plugin import register

    register()


def load_delta(llm: "LLM", name: str, path: str) -> "LoRARequest":
    """Load a delta into an offline engine; see ``offline.load_delta``."""
    from vllm_dqrelo.frontend.offline import load_delta

    return load_delta(llm, name, path)
