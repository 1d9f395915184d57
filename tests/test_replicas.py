# SPDX-License-Identifier: Apache-2.0
"""Two replicas, of which one is killed while it answers: what its clients see."""

import concurrent.futures
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

import httpx
import openai
import psutil
import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BIN = Path(sys.executable).parent
NAMES = ["base", "one", "two"]
PROMPT = [1, 5, 9, 33, 200, 77, 3, 8]
LENGTH = 120
AT_ONCE, MANY = 4, 16  # requests in a step, and for each model: most of them wait
# openai's client wraps what ends a connection before an answer, not within one.
CUT = (openai.APIError, httpx.HTTPError)


def client_of(url):
    """A client for any number of threads. To make one takes as long as an answer."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def stream(client, name, begun=None):
    """The tokens of an answer, and why it ended: None if nobody said so.

    Args:
        begun: called with the first token.
    """
    options = {"model": name, "prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0}
    options["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    tokens, reason = [], None
    with suppress(*CUT):
        for part in client.completions.create(stream=True, **options):
            tokens += getattr(part.choices[0], "token_ids", None) or []
            reason = part.choices[0].finish_reason or reason
            if begun and tokens:
                begun()
                begun = None
    return tokens, reason


def group_of(url):
    """The process group of the server that listens at an address."""
    port = int(url.rpartition(":")[2])
    (listener,) = {
        c.pid
        for c in psutil.net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }
    return os.getpgid(listener)


def test_a_replica_dies_while_it_answers(family, server, tmp_path):
    """No answer of it looks whole; the other one's answers are what they were."""
    made = family("llama")
    command = [BIN / "dqrelo", "serve", made.base, "--served-model-name", "base"]
    command += ["--delta", f"one={made.deltas[0]}", f"two={made.deltas[1]}"]
    command += ["--max-num-seqs", str(AT_ONCE)]
    with (
        server(command, tmp_path / "lives") as url,
        server(command, tmp_path / "dies", dies=True) as other,
    ):
        lives, dies = client_of(url), client_of(other)
        whole = {name: stream(lives, name) for name in NAMES}
        assert {len(tokens) for tokens, _ in whole.values()} == {LENGTH}
        assert len({tuple(tokens) for tokens, _ in whole.values()}) == len(NAMES)
        group, once = group_of(other), threading.Lock()

        def kill():
            """End the processes at once, as a lost machine does."""
            if once.acquire(blocking=False):
                os.killpg(group, signal.SIGKILL)

        asked = [(lives, name) for name in NAMES] + [(dies, n) for n in NAMES * MANY]
        with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
            jobs = [
                pool.submit(stream, client, name, kill if client is dies else None)
                for client, name in asked
            ]
            answers = [job.result() for job in jobs]
        for (client, name), (tokens, reason) in zip(asked, answers, strict=True):
            if client is lives or reason:
                assert (tokens, reason) == whole[name]
            else:
                assert tokens == whole[name][0][: len(tokens)]
        assert any(tokens and reason is None for tokens, reason in answers)
        # A client that goes on with the next of its replicas is answered.
        for name in NAMES:
            assert stream(dies, name) == ([], None)
            assert stream(lives, name) == whole[name]
