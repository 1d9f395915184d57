# SPDX-License-Identifier: Apache-2.0
"""A trainer updates the delta of a running engine, under one name."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_dqrelo import delta_of, load_delta

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parent.parent
TOLERANCE = 1e-4  # as in test_serving.py
# How ``family`` makes its deltas.
OPTIONS = [{}, {"ratio": 0.25}, {"ratio": 0.0625, "method": "dqrelo-paper"}]


@pytest.fixture
def updates(family):
    """The deltas of the family's fine-tunes, made of models in memory."""
    made = family("llama")
    models = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in made.models
    ]
    return (
        delta_of(str(made.base), model, **options)
        for model, options in zip(models, OPTIONS, strict=True)
    )


def test_each_update_is_served_under_the_same_name(
    family, alone, engine, updates, add_request, finish, prompts, difference, manager_of
):
    """Running requests end on old weights; a failed update changes nothing."""
    expected, prompt = alone("llama"), prompts[2]  # a prompt that the cache keeps
    llm = engine(family("llama").base, quantization="dqrelo", max_loras=2)
    old, folders = None, []
    for number, delta in enumerate(updates, 1):
        if old:
            add_request(llm, "old", prompt, old)
            for _ in range(3):
                llm.llm_engine.step()
        new = load_delta(llm, "math", delta)
        folders.append(delta.folder)
        del delta
        with pytest.raises(Exception, match="not a folder|missing|delta_config"):
            load_delta(llm, "math", ROOT / "docs")
        add_request(llm, "new", prompt, new)
        add_request(llm, "base", prompt, None)
        found = finish(llm)
        assert difference(found["new"], expected[number][2]) <= TOLERANCE
        assert difference(found["base"], expected[0][2]) <= TOLERANCE
        if old:
            assert difference(found["old"], expected[number - 1][2]) <= TOLERANCE
        assert len(manager_of(llm).host.packed) == 1  # the old weights are freed
        old = new
    gc.collect()
    # The engine may read the last delta again, and the one that was running then.
    assert [folder.exists() for folder in folders] == [False, True, True]


@pytest.mark.slow
def test_the_example_runs(family):
    """The loop of examples/train_and_serve.py, on a tiny model."""
    command = [sys.executable, ROOT / "examples/train_and_serve.py"]
    command += [family("llama").base, "--updates", "2", "--steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert sum("delta made in" in line for line in lines) == 2
    answers = [line for line in lines if line.startswith("  base: ")]
    assert len(answers) == 2 and len(set(answers)) == 1
