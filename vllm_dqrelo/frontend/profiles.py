# SPDX-License-Identifier: Apache-2.0
"""The profiles of an engine's deltas, and where its requests meet them."""

import asyncio
import functools
import hashlib
import inspect
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest

from vllm_dqrelo.format.checkpoint import resolve
from vllm_dqrelo.format.delta import vocabulary_size
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.regular_file import read_bytes
from vllm_dqrelo.format.side_files import GENERATION_CONFIG, TOKENIZER_FILES
from vllm_dqrelo.format.tokenizer import MOST_BYTES
from vllm_dqrelo.frontend import compat
from vllm_dqrelo.frontend.containment import contain_failures
from vllm_dqrelo.frontend.profile import Profile
from vllm_dqrelo.frontend.serialization import check_decodes
from vllm_dqrelo.frontend.token_ids import keep_to_own_tokens
from vllm_dqrelo.messages.request import folder_of
from vllm_dqrelo.options import Options

MOST_REFUSED = 1000  # of which it is remembered


class Served(NamedTuple):
    """How a delta, or the base, is served.

    Attributes:
        path: the path of its LoRARequest.
        profile: None where the base's serves.
        tokens: how many tokens the model has.
    """

    path: str
    profile: Profile | None
    tokens: int


class Profiles:
    """The profiles of all deltas of an engine.

    Args:
        engine: an AsyncLLM or an LLMEngine with deltas. Mutated: where a request's
            delta has a profile, twins of the input and output processors answer, and
            the methods for adapters read the profile with the delta.
    """

    def __init__(self, engine: Any) -> None:
        self._config = engine.vllm_config
        self._renderer, inputs, outputs = compat.text_parts(engine)
        room = Options.of(self._config.additional_config).added_tokens
        self._tokens = self._config.model_config.get_vocab_size() - room
        self._of: dict[int, Served] = {}  # by the id of the delta
        self._removed: set[int] = set()
        # Fine-tunes of one recipe often have the same files: they share a profile.
        self._by_content: WeakValueDictionary[str, Profile] = WeakValueDictionary()
        # Folder and content -> why: to find out again would take seconds.
        self._refused: dict[tuple[Path, str], str] = {}
        self._with_adapters(engine)
        self._with_requests(inputs, outputs)

    def of(self, request: LoRARequest | None) -> Profile | None:
        """The profile of a delta; None for the base, and where the base's serves.

        Raises:
            DqreloError: a file of the delta's own cannot be used.
        """
        return self._served(request).profile

    def _served(self, request: LoRARequest | None) -> Served:
        if request is None:
            return Served("", None, self._tokens)
        served = self._of.get(request.lora_int_id)
        if served is None or served.path != request.lora_path:
            served = self._of[request.lora_int_id] = self._read(request)
        return served

    def _read(self, request: LoRARequest) -> Served:
        """Read a delta's own files; a disk may take long."""
        tokens = vocabulary_size(folder_of(request), self._tokens)
        return Served(request.lora_path, self._profile(request, tokens), tokens)

    def _profile(self, request: LoRARequest, tokens: int) -> Profile | None:
        """Read the delta's own files, unless they are the base's."""
        folder, base = folder_of(request), self._base
        files: dict[str, bytes] = {}
        for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
            with suppress(FileNotFoundError):
                files[name] = read_bytes(folder / name, MOST_BYTES)
        if all(has_content(base / name, files[name]) for name in files):
            return None
        hasher = hashlib.sha256(b"%d tokens\n" % tokens)
        for name, content in files.items():
            hasher.update(f"{name} {len(content)}\n".encode() + content)
        key = hasher.hexdigest()
        if (error := self._refused.get((folder, key))) is not None:
            raise DqreloError(error)
        if (profile := self._by_content.get(key)) is None:
            try:
                profile = Profile(
                    files, folder, key, tokens, base, self._config, self._renderer
                )
            except DqreloError as refused:
                if len(self._refused) == MOST_REFUSED:
                    self._refused.clear()
                self._refused[folder, key] = str(refused)
                raise
            self._by_content[key] = profile
        return profile

    @functools.cached_property
    def _base(self) -> Path:
        config = self._config.model_config
        return resolve(config.model, config.revision)

    def _keep(self, request: LoRARequest, served: Served) -> None:
        self._of[request.lora_int_id] = served
        self._removed.discard(request.lora_int_id)

    def _forget(self, adapter_id: int) -> None:
        self._of.pop(adapter_id, None)
        self._removed.add(adapter_id)
        compat.forget_methods()

    def _with_adapters(self, engine: Any) -> None:
        """Load the profile before a delta and forget it with the delta."""
        add, remove = engine.add_lora, engine.remove_lora

        def add_lora(request: LoRARequest) -> bool:
            served = self._read(request)
            added = add(request)
            self._keep(request, served)
            return added

        async def add_lora_async(request: LoRARequest) -> bool:
            served = await asyncio.to_thread(self._read, request)
            added = await add(request)
            self._keep(request, served)
            return added

        def remove_lora(lora_id: int) -> Any:
            self._forget(lora_id)
            return remove(lora_id)  # of AsyncLLM: to be awaited

        is_async = inspect.iscoroutinefunction(add)
        engine.add_lora = add_lora_async if is_async else add_lora
        engine.remove_lora = remove_lora

    def _with_requests(self, inputs: Any, outputs: Any) -> None:
        """Let each request be processed with the profile of its delta."""
        signature = inspect.signature(inputs.process_inputs)
        process, add = type(inputs).process_inputs, type(outputs).add_request

        def process_inputs(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            request = given.get("lora_request")
            if request is not None and request.lora_int_id in self._removed:
                raise VLLMValidationError(f"{request.lora_name} was unloaded")
            model, params = self._served(request), given["params"]
            target, name = inputs, self._config.model_config.served_model_name
            if request is not None:
                name = request.lora_name
            if model.profile:
                model.profile.refuse_base_tokens(request, params)
                target = model.profile.twin(inputs)
            made = process(target, *args, **kwargs)
            keep_to_own_tokens(made, params, model.tokens, name, self._tokens)
            if model.profile:
                try:
                    check_decodes(made, EngineCoreRequest)
                except Exception as error:
                    raise VLLMValidationError(
                        f"this request for {name} cannot be sent to the engine: {error}"
                    ) from error
            return made

        def add_request(request: Any, *args: Any, **kwargs: Any) -> None:
            profile = self.of(request.lora_request)
            if profile is None:
                return add(outputs, request, *args, **kwargs)
            new = request.request_id not in outputs.request_states
            add(profile.twin(outputs), request, *args, **kwargs)
            if new:
                state = outputs.request_states[request.request_id]
                contain_failures(state, request.lora_request.lora_name)

        inputs.process_inputs = process_inputs
        inputs.process_inputs_async = functools.partial(
            asyncio.to_thread, process_inputs
        )
        outputs.add_request = add_request


def has_content(path: Path, content: bytes) -> bool:
    """Whether a file is there and holds exactly that."""
    return path.is_file() and path.read_bytes() == content
