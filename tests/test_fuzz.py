# SPDX-License-Identifier: Apache-2.0
"""Some hundreds of the cases of docs/reliability.md."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


def test_malformed_folders_are_refused(tmp_path):
    """Another seed than that of the long run; 20 cases of each kind."""
    command = [sys.executable, str(FUZZ), "--cases", "380", "--seed", "1"]
    command += ["--output", str(tmp_path / "results.csv")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    with (tmp_path / "results.csv").open(newline="") as file:
        *kinds, total = csv.DictReader(file)
    assert [row["cases"] for row in kinds] == ["20"] * 19
    assert (total["cases"], total["faults"]) == ("380", "0")
    for row in (*kinds, total):
        found = (int(row[key]) for key in ("refused", "same", "another"))
        assert sum(found) == int(row["cases"]), row["mutation"]
