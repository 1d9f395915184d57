# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, for as long as it is needed."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from tqdm import tqdm

from benchmarks.machine import ENVIRONMENT

START_TIMEOUT_S = 600


@contextmanager
def server(
    arguments: Sequence[str | Path], log: Path, **environment: str
) -> Iterator[str]:
    """Run ``python ARGUMENTS --host --port``; yields its address, ends it at exit.

    Args:
        arguments: of Python: a module or a file, and its arguments.
        log: gets what it prints.
        environment: variables beside ours and ``ENVIRONMENT``.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [sys.executable, *arguments, "--host=127.0.0.1", f"--port={port}"]
    variables = {**os.environ, **ENVIRONMENT, **environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=file, env=variables, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(process, f"{address}/health", log)
        yield address
    finally:
        for number, patience_s in ((signal.SIGTERM, 30), (signal.SIGKILL, None)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience_s)


def wait_for(process: subprocess.Popen[bytes], health: str, log: Path) -> None:
    """Return when the server is healthy; when it fails, exit with its last words."""
    for _ in tqdm(
        range(START_TIMEOUT_S), "wait", bar_format="{desc} {elapsed}", disable=None
    ):
        if process.poll() is not None:
            break
        with suppress(OSError), urllib.request.urlopen(health, timeout=60):
            return
        time.sleep(1)
    tail = "\n".join(log.read_text().splitlines()[-30:])
    raise SystemExit(f"{tail}\n\nThe server did not start; its whole log is {log}.")


def copies(address: str) -> int:
    """Deltas that a server has copied into its arena."""
    evicted = metric(address, "dqrelo:delta_evictions_total", tier="device")
    return int(evicted + metric(address, "dqrelo:num_deltas_resident"))


def metric(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have all ``labels``, such as tier="host"."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    )
