# SPDX-License-Identifier: Apache-2.0
"""``server(command, log)``: a server in a process of its own."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


@pytest.fixture(scope="session", name="server")
def server_fixture():
    """The function ``server``."""
    return server


PATIENCE_S = 600  # for a start or an end, on a busy machine
SERVER_OPTIONS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
SERVER_OPTIONS += ["--max-num-seqs", "16", "--host", "127.0.0.1"]


@contextmanager
def server(command, log: Path, dies: bool = False):
    """Start a server, wait until it is ready, yield its address, end it.

    One that ``dies`` has to end by itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), *SERVER_OPTIONS, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        if dies:
            process.wait(PATIENCE_S)
        assert dies or process.poll() is None, log.read_text()[-4000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)


def healthy(port) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60):
            return True
    except OSError:
        return False
