# SPDX-License-Identifier: Apache-2.0
"""A delta's tokenizer that fails on an answer fails that request only.

vLLM turns the tokens of all requests into text in one task. That task ends at the first
error (v1/engine/async_llm.py:905), after which no request is answered.
"""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def is_failure(error: BaseException) -> bool:
    """Whether code failed: an Exception, or a panic of native code (BaseException).

    Other exceptions interrupt or end the process.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def contain_failures(state: Any, name: str) -> None:
    """Fail a request whose tokens the tokenizer cannot turn into text.

    Args:
        state: vLLM's RequestState. Its detokenizer and its logprobs processor are
            mutated.
        name: of the delta.
    """

    def contained(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any) -> Any:
            try:
                return method(*args)
            except BaseException as error:
                if not is_failure(error):
                    raise
                reason = f"the tokenizer of {name} fails on its answer: {error}"
                logger.warning("dqrelo: %s", reason)
                failure = GracefulHTTPError(reason, HTTPStatus.BAD_REQUEST)
                if state.queue is None:  # LLM, not a server
                    raise failure from error
                state.queue.put(failure)
                return reason  # taken for a stop string, which ends the request

        return run

    for part, method in (
        (state.detokenizer, "update"),
        (state.logprobs_processor, "update_from_output"),
    ):
        if part is not None:
            setattr(part, method, contained(getattr(part, method)))
