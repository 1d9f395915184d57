# SPDX-License-Identifier: Apache-2.0
"""A tokenizer that fails on an answer: one request fails, and vLLM's task goes on."""

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.output_processor import RequestOutputCollector

from vllm_dqrelo.frontend.containment import contain_failures

pytestmark = pytest.mark.vllm


class PanicException(BaseException):
    """As native code that panics raises it."""


class Part:
    """A detokenizer, and logprobs, that fail on the token 7."""

    def __init__(self, error):
        self.error, self.seen = error, []

    def update(self, tokens, stopped):
        if 7 in tokens:
            raise self.error
        self.seen += tokens

    def update_from_output(self, output):
        self.update(output, stopped=False)


@pytest.mark.parametrize("error", [TypeError("None"), PanicException("None")])
@pytest.mark.parametrize("method", ["detokenizer", "logprobs_processor"])
def test_the_request_fails_that_a_tokenizer_fails_on(error, method):
    async def failure():
        queue = RequestOutputCollector(RequestOutputKind.DELTA, "1")
        state = SimpleNamespace(
            detokenizer=Part(error), logprobs_processor=Part(error), queue=queue
        )
        contain_failures(state, "math")
        state.detokenizer.update([1, 2], False)
        state.logprobs_processor.update_from_output([3])
        assert (state.detokenizer.seen, state.logprobs_processor.seen) == ([1, 2], [3])
        assert queue.output is None
        if method == "detokenizer":
            assert state.detokenizer.update([7], False)  # as a stop string: it ends
        else:
            state.logprobs_processor.update_from_output([7])
        with pytest.raises(
            GracefulHTTPError, match="of math fails on its answer: None"
        ):
            await queue.get()

    asyncio.run(failure())


def test_without_a_server_it_is_raised():
    state = SimpleNamespace(
        detokenizer=Part(PanicException()), logprobs_processor=None, queue=None
    )
    contain_failures(state, "math")
    with pytest.raises(GracefulHTTPError, match="the tokenizer of math fails"):
        state.detokenizer.update([7], False)
