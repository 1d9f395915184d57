# SPDX-License-Identifier: Apache-2.0
"""Deltas in the offline engine, ``vllm.LLM``."""

import zlib
from pathlib import Path

from vllm import LLM
from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.config import DeltaConfig


def load_delta(llm: LLM, name: str, path: str) -> LoRARequest:
    """Load a delta and make the request object that selects it.

    Semantics: ``llm.generate(prompts, lora_request=load_delta(llm, "math", path))``
    answers as the fine-tune does; ``lora_request=None`` answers as the base does,
    and a list gives each prompt its own.

    Args:
        llm: made with ``LLM(model=BASE, quantization="dqrelo")``.
        name: of the delta, as it would be the OpenAI API's ``model``.
        path: a delta folder.

    Raises:
        Exception: whatever keeps the delta from being served, in words; the engine
            goes on without it. vLLM passes it on in a type of its own.
    """
    folder = Path(path).absolute()
    # The digest makes the path, and with it vLLM's key of cached prefixes, one of
    # content: a folder that is replaced in place and loaded again is another delta.
    identity = f"{folder}#{DeltaConfig.read(folder).digest}"
    # A name keeps its number in every process; 0 stands for the base.
    request = LoRARequest(name, zlib.crc32(name.encode()) % (2**31 - 1) + 1, identity)
    llm.llm_engine.add_lora(request)
    return request
