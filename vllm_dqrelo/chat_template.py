# SPDX-License-Identifier: Apache-2.0
"""A delta's chat template: rendered in a sandbox, for each request.

vLLM renders in a thread of the server, which nothing can end, and which keeps every
other thread from running while it computes a number of a billion digits.
"""

import copy
import functools
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from vllm_dqrelo.format.sandbox import SANDBOX, SandboxError

# Options of apply_chat_template that are no variables of a template.
TOKENIZING = {"tokenize", "padding", "truncation", "max_length", "return_tensors"}
TOKENIZING |= {"return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"}


def in_sandbox(tokenizer: Any, name: str) -> Any:
    """A copy of a tokenizer called ``name`` that renders its template in a sandbox."""
    made = copy.copy(tokenizer)

    class Sandboxed(type(made)):  # type: ignore[misc]
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
            return in_sandbox, (tokenizer, name)  # also of a copy

    made.__class__ = Sandboxed
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
