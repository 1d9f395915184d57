# SPDX-License-Identifier: Apache-2.0
"""A delta's tokenizer: its failure is an error of the request only.

vLLM renders a chat template in a thread of the server, which nothing can end, and which
keeps every other thread from running while it computes a number of a billion digits. A
delta's is rendered in a sandbox, for each request.
"""

import functools
from collections.abc import Callable
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.sandbox import SANDBOX, SandboxError
from vllm_dqrelo.frontend.containment import is_failure

# Options of apply_chat_template that are not variables of a template.
TOKENIZING = {"tokenize", "padding", "truncation", "max_length", "return_tensors"}
TOKENIZING |= {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}


def own_tokenizer(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer called ``name``, for a server that must go on.

    Its chat template is rendered in a sandbox, whose failure is a jinja2.TemplateError.
    A failure on a text or on tokens is a DqreloError.
    """
    base = type(tokenizer)

    class OwnTokenizer(base):  # type: ignore[misc, valid-type]
        __call__ = refusing(base.__call__)
        encode, decode = refusing(base.encode), refusing(base.decode)
        convert_ids_to_tokens = refusing(base.convert_ids_to_tokens)

        @functools.wraps(PreTrainedTokenizerBase.apply_chat_template)
        def apply_chat_template(
            self, conversation: Any, tools: Any = None, **options: Any
        ) -> Any:
            template = self.get_chat_template(options.pop("chat_template", None), tools)
            tokenizing = {k: options.pop(k) for k in TOKENIZING & options.keys()}
            variables = {**self.special_tokens_map, "tools": tools, **options}
            return super().apply_chat_template(
                conversation,
                chat_template="{{ rendered }}",
                rendered=render(template, conversation, variables),
                **tokenizing,
            )

        def __reduce__(self) -> Any:
            return own_tokenizer, (tokenizer, name)  # also of a copy

    # Not by copy.copy, for which vLLM makes the vocabulary once more.
    made = OwnTokenizer.__new__(OwnTokenizer)
    made.__dict__.update(vars(tokenizer))
    made.name_or_path = name
    return made


def render(template: str, conversation: Any, variables: dict[str, Any]) -> str:
    """Render a conversation; jinja2.TemplateError says why it cannot be."""
    try:
        return SANDBOX.run("render", template, conversation, variables)
    except SandboxError as error:
        # What a template says of a conversation is for who sent it, as it is.
        said = error.kind == "TemplateError"
        reason = str(error) if said else f"the chat template fails: {error}"
        raise jinja2.TemplateError(reason) from error


def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method`` of a tokenizer, whose failures are errors of the request."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except BaseException as error:
            if not is_failure(error) or isinstance(error, DqreloError):
                raise
            raise DqreloError(f"the tokenizer fails: {error}") from error

    return run
