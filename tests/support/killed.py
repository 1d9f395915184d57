# SPDX-License-Identifier: Apache-2.0
"""``killed(pieces, options)``: a conversion that is killed at a known place."""

import signal
import subprocess
import sys

import torch

SCRIPT = """
import os, signal, sys
import torch
from dqrelo_tools import cli
from dqrelo_tools.journal import Journal

record, pieces = Journal.record, int(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))

def record_and_die(self, *arguments):
    record(self, *arguments)
    if len(list(self.folder.glob("0*"))) == pieces:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.record = record_and_die
cli.main(["convert", *sys.argv[3:]])
"""


def killed(pieces: int, options: list[str]) -> None:
    """Run ``dqrelo convert OPTIONS`` until ``pieces`` parameters are on disk.

    With the threads of this process, which an engine may have changed: the order of a
    sum, and so its last bit, depends on their number.
    """
    numbers = (str(pieces), str(torch.get_num_threads()))
    command = [sys.executable, "-c", SCRIPT, *numbers, *map(str, options)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
