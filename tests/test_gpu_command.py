# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.gpu``, rehearsed with tiny sizes: every part that a CPU runs.

What it does with parts that fail, hang or are skipped is shown with short programs.
"""

import csv
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def command(output, models, *options):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--seconds", "3600"]
        + ["--output", str(output), "--models", str(models), *options],
        cwd=ROOT,
        env={**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    parts = json.loads((output / "summary.json").read_text())["parts"]
    return done, {part["part"]: part for part in parts}


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture
def gpu():
    import importlib

    return importlib.import_module("benchmarks.gpu.__main__")


@pytest.mark.slow
def test_a_part_that_fails_hangs_or_is_skipped(gpu, tmp_path, monkeypatch, capsys):
    """The next one goes on; what is not shown to be right is exit code 1."""
    programs = {
        "good": ("print('fine')", False),
        "slow": ("import time; print('waits'); time.sleep(600)", False),
        "wrong": ("raise SystemExit('0.5 is not 0.25')", True),
        "absent": (f"print('no tool'); raise SystemExit({gpu.SKIPPED})", True),
        "unsure": ("raise SystemExit('a table is missing')", False),
    }
    parts = [gpu.Part(n, ["-c", p], 1, check) for n, (p, check) in programs.items()]
    monkeypatch.setattr(gpu, "PARTS", parts)
    given = ["gpu", "--output", str(tmp_path), "--models", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*given, "--seconds", "25"])
    with pytest.raises(SystemExit, match="not shown to be right: wrong$"):
        gpu.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    found = {row["part"]: (row["outcome"], row["why"]) for row in summary["parts"]}
    assert found == {
        "good": ("ok", ""),
        "slow": ("out of time", "waits"),
        "wrong": ("failed", "0.5 is not 0.25"),
        "absent": ("skipped", "no tool"),
        "unsure": ("failed", "a table is missing"),
    }
    assert "no tool" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*given, "--parts", "good", "unsure"])
    gpu.main()


def test_a_part_that_is_late_is_not_shown_to_be_right(gpu, tmp_path):
    part = gpu.Part("late", ["-c", "import time; time.sleep(600)"], 1, True)
    options = Namespace(output=tmp_path, models=tmp_path, tiny=True)
    found = gpu.run(part, options, 0.5)
    assert found["outcome"] == "out of time" and gpu.failed(part, found)


@pytest.mark.slow
def test_the_kernels_are_compared_and_timed(tmp_path):
    """In Triton's interpreter: tiles, the table beside the roofline, marked tests."""
    parts = ["tests", "tiles", "kernels", "sanitizer"]
    done, found = command(tmp_path, tmp_path, "--parts", *parts)
    assert done.returncode == 0, done.stdout
    assert [row["part"] for row in found.values()] == parts
    outcomes = [row["outcome"] for row in found.values()]
    assert outcomes == ["ok", "ok", "ok", "skipped"], done.stdout
    assert "compute-sanitizer" in found["sanitizer"]["why"]
    marked, others = rows_of(tmp_path / "tests.csv")
    assert int(marked["skipped"]) and int(others["passed"])
    tiles = json.loads((tmp_path / "tiles.json").read_text())
    assert set(tiles["a CPU, interpreted"]) == {"short", "tall"}
    table = rows_of(tmp_path / "kernels.csv")
    assert len(table) == 4 and (tmp_path / "kernels.svg").exists()
    one, _ = rows_of(tmp_path / "layers.csv")
    first, _, head, _ = (float(row["us"]) for row in table)
    # 32 layers and one LM head; in milliseconds, of three digits.
    assert float(one["ms"]) == pytest.approx((32 * first + head) / 1e3, abs=1e-3)
    assert one["deltas"] == "1" and one["lora_ms"] == ""
    # One rounding of y to float16.
    assert all(float(row["relative_error"]) < 2**-10 for row in table)


def test_the_table_names_what_the_roofline_predicts(monkeypatch):
    import importlib

    table = importlib.import_module("benchmarks.ops.gpu")
    roofline = importlib.import_module("benchmarks.ops.roofline")
    key = {"deltas": 4, "rows_per_delta": 1, "ratio": 1 / 8, "factors": "int4"}
    monkeypatch.setattr(table, "NAME", "NVIDIA H200")
    found = table.predicted("qkv", key)
    said = roofline.predict(roofline.DEVICES["H200"], "qkv", 4, 1, 1 / 8, "int4")
    assert found["roofline_us"] == pytest.approx(said["delta_us"], abs=0.01)
    monkeypatch.setattr(table, "NAME", "a GPU of tomorrow")
    assert set(table.predicted("qkv", key).values()) == {""}


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_is_checked_and_timed(tmp_path):
    """On the CPU: the start, a mixed batch against merged weights, and steps."""
    pytest.importorskip("vllm")
    parts = ["models", "start_eager", "start_graphs", "mixed", "steps"]
    output, models = tmp_path / "output", tmp_path / "models"
    done, found = command(output, models, "--parts", *parts)
    assert done.returncode == 0, done.stdout
    outcomes = [found[part]["outcome"] for part in parts]
    assert outcomes == ["ok", "ok", "skipped", "ok", "ok"], done.stdout
    assert "CUDA" in found["start_graphs"]["why"]
    (start,) = rows_of(output / "start_eager.csv")
    assert "self-check passed" in start["said"]
    mixed = rows_of(output / "mixed.csv")
    assert len(mixed) == 6 and {row["model"] for row in mixed} >= {"base"}
    for row in mixed:
        assert row["model"] == "base" or float(row["error"]) <= float(row["allowed"])
    steps = {
        (r["system"], r["phase"], r["deltas"]) for r in rows_of(output / "steps.csv")
    }
    systems = ("deltas", "base", "lora", "merged")
    phases = ("decode", "prompt")
    assert steps == {(s, p, n) for s in systems for p in phases for n in ("1", "2")}


@pytest.mark.vllm
def test_another_answer_than_that_of_merged_weights_is_seen(tmp_path, monkeypatch):
    """The control of the mixed batch: the engine's answers of another delta."""
    pytest.importorskip("vllm")
    import importlib

    mixed = importlib.import_module("benchmarks.gpu.mixed")
    models = importlib.import_module("benchmarks.gpu.models")
    part = importlib.import_module("benchmarks.gpu.part")
    folder = models.base(tmp_path, part.TINY)
    made = models.deltas(tmp_path, 3, 1 / 8, models.WHOLE)
    oracle = mixed.Oracle(folder)

    def answers(shift):
        asked = [None, *made[shift:], *made[:shift]]
        ids = [[i, 5, 9, 33, 200, 77, 3 + i, 8] for i in range(4)]
        said = [(5, i, oracle.logprobs(i, d)) for i, d in zip(ids, asked, strict=True)]
        return [mixed.Answer(*one) for one in (*said, *said[:2])]

    given = ["mixed", "--tiny", "--models", str(tmp_path), "--output"]
    for shift, folder in ((0, "right"), (1, "wrong")):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(sys, "argv", [*given, str(tmp_path / folder)])
        monkeypatch.setattr(mixed, "answers", lambda *_, shift=shift: answers(shift))
        if shift:
            with pytest.raises(SystemExit, match="not what merged weights say"):
                mixed.main()
        else:
            mixed.main()
