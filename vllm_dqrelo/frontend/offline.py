# SPDX-License-Identifier: Apache-2.0
"""Deltas in the offline engine, ``vllm.LLM``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from vllm import LLM
from vllm.lora.request import LoRARequest

from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.messages.request import delta_request, folder_of

# By engine and name: deltas of ``delta_of``, whose folders the engine may read again.
HELD: WeakKeyDictionary[LLM, dict[str, list[Delta]]] = WeakKeyDictionary()


def load_delta(llm: LLM, name: str, delta: str | Path | Delta) -> LoRARequest:
    """Load a delta and make the request object that selects the delta.

    Semantics: ``llm.generate(prompts, lora_request=load_delta(llm, "math", path))``
    answers as the fine-tune does; ``lora_request=None`` answers as the base does,
    and a list gives each prompt its own. A delta with a tokenizer, a chat template or a
    generation config of its own is used with them.

    A name that is loaded already means the new delta from then on. Requests that are
    in the engine keep the old weights. After an error the name keeps its old delta.

    Args:
        llm: made with ``LLM(model=BASE, quantization="dqrelo")``.
        name: of the delta, as it would be the OpenAI API's ``model``.
        delta: a delta folder, or what ``delta_of`` returned. Kept until the engine
            no longer needs the folder.

    Raises:
        Exception: whatever keeps the delta from being served, in words; the engine
            goes on without it. vLLM passes it on in a type of its own.
    """
    folder = delta.folder if isinstance(delta, Delta) else Path(delta)
    request = delta_request(name, folder)
    llm.llm_engine.add_lora(request)
    states = llm.llm_engine.output_processor.request_states.values()
    running = {folder_of(s.lora_request) for s in states if s.lora_request}
    held = HELD.setdefault(llm, {})
    held[name] = [old for old in held.get(name, ()) if old.folder in running]
    if isinstance(delta, Delta):
        held[name].append(delta)
    return request


def offline_twin(llm: LLM, requests: Any) -> LLM:
    """Who runs the prompts of one call: ``llm``, or its twin for a delta.

    Raises:
        DqreloError: the deltas of the call have different files of their own.
    """
    profiles = getattr(llm.llm_engine, "profiles", None)
    if profiles is None:
        return llm
    given = requests if isinstance(requests, Sequence) else [requests]
    found = {id(profile): profile for profile in map(profiles.of, given)}
    if len(found) > 1:
        raise DqreloError(
            "these deltas have different tokenizers, chat templates or generation "
            "configs: expected one of them in a call; make a call for each"
        )
    (profile,) = found.values() or [None]
    return profile.twin(llm) if profile else llm
