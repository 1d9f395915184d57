# SPDX-License-Identifier: Apache-2.0
"""One model's tokenizer, chat template and generation config.

vLLM renders the prompts of every adapter with the base's tokenizer, and detokenizes
with it. The objects of vLLM that do so keep the model's properties as attributes. So
copies of these objects, the *twins* of a delta, serve a delta with files of its own:
the twins have the delta's attributes. vLLM's own objects serve every other delta.
"""

import copy
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.renderers import BaseRenderer
from vllm.renderers.hf import HfRenderer
from vllm.sampling_params import SamplingParams
from vllm.tokenizers import TokenizerLike, get_tokenizer

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.generation_config import read_generation_config
from vllm_dqrelo.format.side_files import GENERATION_CONFIG, TOKENIZER_FILES
from vllm_dqrelo.format.tokenizer import folder_of, try_tokenizer
from vllm_dqrelo.frontend import compat
from vllm_dqrelo.frontend.serialization import check_decodes
from vllm_dqrelo.frontend.tokenizer import own_tokenizer

T = TypeVar("T")


class Profile:
    """What one model has of its own besides its weights.

    Args:
        files: content of its tokenizer and settings, by file name.
        folder: where the files are from, for errors.
        key: hash of the files' content.
        tokens: how many tokens the model has, V.
        base: the folder of the base.
        config: the engine's configuration.
        renderer: the base's renderer.

    Attributes:
        attributes: name of an attribute of vLLM's objects -> this model's value.
        same_tokens: whether every token means what it means to the base.

    Raises:
        DqreloError: one of the files cannot be used.
    """

    def __init__(
        self,
        files: dict[str, bytes],
        folder: Path,
        key: str,
        tokens: int,
        base: Path,
        config: VllmConfig,
        renderer: BaseRenderer,
    ) -> None:
        # Copies, because nothing of the engine's own configuration may change.
        self._config = copy.copy(config)
        self._config.model_config = self._model = copy.copy(config.model_config)
        self.attributes: dict[str, Any] = {"model_config": self._model}
        self.same_tokens = True
        self._folder, self._tokens = folder, tokens
        try:
            # Use the checked content, also if the folder changes.
            with folder_of(files, base) as scratch:
                if (content := files.get(GENERATION_CONFIG)) is not None:
                    self._take_generation_config(str(scratch), content)
                if renderer.tokenizer and not files.keys().isdisjoint(TOKENIZER_FILES):
                    try_tokenizer(scratch, folder)
                    self._take_tokenizer(str(scratch), f"{folder}#{key}", renderer)
        except DqreloError:
            raise
        except Exception as error:
            raise DqreloError(
                f"{folder} has files of its own ({', '.join(sorted(files))}) that "
                f"cannot be used: {error}. Convert the fine-tune again, or remove all "
                "of them to serve it with the base's"
            ) from error

    def _take_generation_config(self, scratch: str, content: bytes) -> None:
        """Default sampling parameters, and the tokens that end an answer."""
        file = self._folder / GENERATION_CONFIG
        read_generation_config(content, str(file), self._tokens)
        self._model.hf_config_path = scratch
        if self._model.generation_config != "vllm":
            self._model.generation_config = "auto"  # no file given for the base
        overrides = self._model.override_generation_config
        self.attributes |= {
            "generation_config_fields": self._model.try_get_generation_config(),
            "default_sampling_params": self._model.get_diff_sampling_param(),
            "override_max_tokens": overrides.get("max_new_tokens"),
        }
        try:
            params = SamplingParams(**self.attributes["default_sampling_params"])
            params.update_from_generation_config(
                self.attributes["generation_config_fields"]
            )
            check_decodes(params, SamplingParams)
        except Exception as error:
            raise DqreloError(f"{file} cannot be used: {error}") from error

    def _take_tokenizer(self, scratch: str, name: str, renderer: BaseRenderer) -> None:
        """The tokenizer, and the chat template that comes with it."""
        base = renderer.get_tokenizer()
        tokenizer: TokenizerLike = get_tokenizer(
            scratch,
            runner_type=self._model.runner_type,
            tokenizer_mode=self._model.tokenizer_mode,
            trust_remote_code=False,  # a delta brings no code
        )
        # vLLM's own max_token_id is one too high in 0.31.
        highest, of_base = (max(t.get_vocab().values()) for t in (tokenizer, base))
        last = max(self._tokens - 1, of_base)
        if highest > last:
            raise DqreloError(
                f"{self._folder} has a tokenizer with tokens up to {highest}, "
                f"but the model has them up to {last} only"
            )
        end = tokenizer.eos_token_id
        if end is not None and end >= self._tokens:
            raise DqreloError(
                f"{self._folder} has a tokenizer whose eos_token is {end}, but the "
                f"model has tokens up to {self._tokens - 1} only"
            )
        self.same_tokens = tokenizer.get_vocab() == base.get_vocab()
        # What vLLM keeps by name is kept by content, and it finds nothing of that name.
        self._model.tokenizer = name
        if type(renderer) is HfRenderer:
            tokenizer = own_tokenizer(tokenizer, name)
        # The renderer makes a copy of it that several threads may use.
        own = compat.renderer_like(renderer, self._config, tokenizer)
        if not self.same_tokens:
            compat.refuse_images(
                own,
                "images are not available for a model with a vocabulary of its own: "
                "vLLM would place them by the base's. Send text only",
            )
        self.attributes |= {"renderer": own, "tokenizer": own.tokenizer}
        if getattr(tokenizer, "chat_template", None):
            self.attributes["chat_template"] = None  # in the place of --chat-template
            self.attributes[compat.MERGE_SYSTEM] = not takes_system_messages(tokenizer)

    def twin(self, of: T) -> T:
        """A copy of one of vLLM's objects with what this model has of its own."""
        twin = copy.copy(of)
        for name in vars(of).keys() & self.attributes.keys():
            setattr(twin, name, self.attributes[name])
        if online_renderer := vars(of).get("online_renderer"):
            twin.online_renderer = self.twin(online_renderer)  # type: ignore[attr-defined]
        return twin

    def refuse_base_tokens(self, request: LoRARequest, params: Any) -> None:
        """Refuse what vLLM's engine does with the tokens of the base alone."""
        if self.same_tokens or not isinstance(params, SamplingParams):
            return
        for name in ("structured_outputs", "thinking_token_budget"):
            if getattr(params, name) is not None:
                raise VLLMValidationError(
                    f"{name} is not available for {request.lora_name}: it has a "
                    "vocabulary of its own, and vLLM would use the base's. Leave it "
                    "out, as well as response_format and a tool_choice other than "
                    '"auto" or "none"',
                    parameter=name,
                )


def takes_system_messages(tokenizer: Any) -> bool:
    """Whether a chat template takes a system message after the first message."""
    chat = [{"role": role, "content": "t"} for role in ("system", "user") * 2]
    with suppress(Exception):
        tokenizer.apply_chat_template(chat, tokenize=False)
        return True
    return False
