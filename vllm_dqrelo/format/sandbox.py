# SPDX-License-Identifier: Apache-2.0
"""Processes for what a fine-tune brings that runs: its tokenizer and chat template.

A template is a program, and a tokenizer is parsed by native code. What takes too long,
too much memory, or crashes, does so in a process that can be ended and started again.
These limits keep a server going; they keep no secrets.
"""

import json
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path
from threading import Lock
from typing import Any

CPU_SECONDS = {"load": 20, "render": 2}  # of one job
MEMORY = 2 * 2**30  # bytes of one process
MOST_REPLY = 16 * 2**20  # bytes, of a prompt of a million tokens
MOST_PROCESSES = 4
PATIENCE = 0.2  # seconds after which another process is started
SCRIPT = Path(__file__).with_name("sandboxed.py")


class SandboxError(Exception):
    """A job failed.

    Attributes:
        kind: name of the error's class; "Limit" where the process had to be ended.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Sandbox:
    """Up to ``MOST_PROCESSES`` processes, each started when all others are busy."""

    def __init__(self) -> None:
        self._idle: queue.Queue[subprocess.Popen[bytes]] = queue.Queue()
        self._started = 0
        self._lock = Lock()

    def run(self, job: str, *arguments: Any) -> Any:
        """Do a job of sandboxed.py in one of the processes.

        Args:
            job: name of the function.
            arguments: of it, that JSON can say.

        Raises:
            SandboxError: the function failed, or took more than its limits.
        """
        request = json.dumps([job, CPU_SECONDS[job], arguments]).encode() + b"\n"
        process, done = self._borrow(), False
        try:
            kind, result = exchange(process, request)
            done = kind != "MemoryError"  # which leaves a process without room
        finally:
            self._give_back(process, done)
        if kind == "MemoryError":
            raise SandboxError(
                "Limit", f"it takes more than {MEMORY:,} bytes of memory"
            )
        if kind:
            raise SandboxError(kind, result)
        return result

    def _borrow(self) -> subprocess.Popen[bytes]:
        """An idle process, or a new one where all are busy for a while."""
        while True:
            try:
                idle = self._idle.get(timeout=PATIENCE if self._started else 0.001)
                if idle.poll() is None:
                    return idle
                self._count(-1)  # the system ended it: out of memory
            except queue.Empty:
                if self._count(1):
                    return self._start()

    def _give_back(self, process: subprocess.Popen[bytes], alive: bool) -> None:
        if not alive:
            process.kill()
            process.wait()
            process = self._start()
        self._idle.put(process)

    def _start(self) -> subprocess.Popen[bytes]:
        """A process for one that was counted."""
        try:
            return start()
        except OSError:
            self._count(-1)
            raise

    def _count(self, change: int) -> bool:
        """Count a process more or less; whether it may be."""
        with self._lock:
            allowed = self._started + change <= MOST_PROCESSES
            self._started += change * allowed
        return allowed


def start() -> subprocess.Popen[bytes]:
    """A process that waits for jobs; it ends when this one does."""
    return subprocess.Popen(
        # -P: files in the folder of the script are not importable.
        [sys.executable, "-P", SCRIPT, str(MEMORY), str(MOST_REPLY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
    )


def exchange(process: subprocess.Popen[bytes], request: bytes) -> tuple[str, Any]:
    """Send a job to a process; the name of its error or "", and what it replied."""
    assert process.stdin and process.stdout
    try:
        process.stdin.write(request)
        process.stdin.flush()
    except BrokenPipeError:
        pass
    if (reply := process.stdout.readline()).endswith(b"\n"):
        kind, result = json.loads(reply)
        return kind, result
    if (code := process.wait()) == -signal.SIGXCPU:
        raise SandboxError("Limit", "it takes more time than is allowed")
    raise SandboxError("Limit", f"it ended its process (exit code {code})")


SANDBOX = Sandbox()
