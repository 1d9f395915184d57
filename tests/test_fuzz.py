# SPDX-License-Identifier: Apache-2.0
"""Some hundreds of the cases of docs/reliability.md."""

import csv
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MODULES = "benchmarks.reliability"


def rows(script, cases, output):
    """The rows of a run with another seed than the long run's."""
    command = [sys.executable, "-m", f"{MODULES}.{script}", "--cases", str(cases)]
    command += ["--seed", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-8000:]
    with output.open(newline="") as file:
        return list(csv.DictReader(file))


def test_malformed_folders_are_refused(tmp_path):
    """20 cases of each kind."""
    *kinds, total = rows("fuzz", 380, tmp_path / "results.csv")
    assert [row["cases"] for row in kinds] == ["20"] * 19
    assert (total["cases"], total["faults"]) == ("380", "0")
    for row in (*kinds, total):
        found = (int(row[key]) for key in ("refused", "same", "another"))
        assert sum(found) == int(row["cases"]), row["mutation"]


def test_malformed_side_files_stop_no_server(tmp_path):
    """10 cases of each kind; most of them are refused, and some answered."""
    *kinds, total = rows("fuzz_server", 120, tmp_path / "results.csv")
    assert [row["cases"] for row in kinds] == ["10"] * 12
    assert (total["cases"], total["faults"]) == ("120", "0")
    assert int(total["refused"]) > int(total["answered"]) > 10
