# SPDX-License-Identifier: Apache-2.0
"""``killed(pieces, options)``: a conversion that is killed at a known place."""

import signal
import subprocess
import sys

SCRIPT = """
import os, signal, sys
from dqrelo_tools import cli
from dqrelo_tools.journal import Journal

record, pieces = Journal.record, int(sys.argv[1])

def record_and_die(self, *arguments):
    record(self, *arguments)
    if len(list(self.folder.glob("0*"))) == pieces:
        os.kill(os.getpid(), signal.SIGKILL)

Journal.record = record_and_die
cli.main(["convert", *sys.argv[2:]])
"""


def killed(pieces: int, options: list[str]) -> None:
    """Run ``dqrelo convert OPTIONS`` until ``pieces`` parameters are on disk."""
    command = [sys.executable, "-c", SCRIPT, str(pieces), *map(str, options)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
