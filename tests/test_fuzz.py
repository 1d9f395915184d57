# SPDX-License-Identifier: Apache-2.0
"""Some hundreds of the cases of docs/reliability.md."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def test_malformed_folders_are_refused():
    """Another seed than that of the long run; 20 cases of each kind."""
    command = [sys.executable, str(FUZZ), "--cases", "380", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.endswith("| 0 |")]
    assert len(lines) == 19 and all("| 20 |" in line for line in lines)
