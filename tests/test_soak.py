# SPDX-License-Identifier: Apache-2.0
"""The soak of docs/reliability.md for a minute, on tiny models."""

import json
import subprocess
import sys

import pytest

from dqrelo_tools.convert import convert

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SOAK = "benchmarks.reliability.soak"


def test_a_short_soak(family, save_model, tmp_path):
    """Five names on room for two: nothing wrong, nothing left, all kinds of use."""
    made = family("llama")
    folders = list(made.deltas)
    for i in range(3):
        model = save_model("llama", tmp_path / f"model-{i}", seed=30 + i)
        folders.append(tmp_path / f"delta-{i}")
        convert(str(made.base), str(model), folders[-1], 0.125, method="dqrelo-paper")
    command = [sys.executable, "-m", SOAK, "--base", made.base, "--deltas", *folders]
    command += ["--minutes", "1", "--resident", "2"]
    command += ["--output", tmp_path / "results.json"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["problems"] == 0
    for kind in ("whole", "streamed", "cancelled", "folders replaced", "unloads"):
        assert results[kind] > 0, results
    assert results["completed"] > 50 and results["clients killed"] > 0
    assert results["evicted from the device"] > 5 and results["deltas read"] > 5
