# SPDX-License-Identifier: Apache-2.0
"""Where a delta's tokenizer fails on an answer: that request fails, and it alone.

vLLM turns the tokens of all requests into text in one task, and that task ends at the
first error (v1/engine/async_llm.py:905): no request gets an answer after it.
"""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError
from vllm.logger import init_logger

logger = init_logger(f"vllm.{__name__}")


def is_failure(error: BaseException) -> bool:
    """Whether what ran failed: an Exception, or a panic of native code, which is none.

    Others are for the process: somebody interrupts it, or ends it.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def contain_failures(state: Any, name: str) -> None:
    """Let the request fail whose tokens a tokenizer cannot turn into text.

    Args:
        state: what vLLM's output processor keeps of a request. Its detokenizer and its
            logprobs are changed.
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
                if state.queue is None:  # of an engine without a server
                    raise failure from error
                state.queue.put(failure)
                return reason  # as a stop string would: it ends the request

        return run

    for part, method in (
        (state.detokenizer, "update"),
        (state.logprobs_processor, "update_from_output"),
    ):
        if part is not None:
            setattr(part, method, contained(getattr(part, method)))
