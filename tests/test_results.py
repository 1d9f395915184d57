# SPDX-License-Identifier: Apache-2.0
"""Results files, and the tables and figures that are made of them."""

import importlib
import itertools

import pytest

from benchmarks import age
from benchmarks.documents import figures
from benchmarks.documents import quality_tables as quality
from benchmarks.documents import reliability_tables as reliability
from benchmarks.documents import serving_tables as serving
from benchmarks.documents.rows import table
from benchmarks.memory.memory import cards
from benchmarks.paths import RESULTS, ROOT
from benchmarks.table import Table


def test_a_results_file_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "results.csv"
    first = Table(path, ("a", "b"), ("a", "b", "c"))
    first.add({"a": "x, y", "b": "1", "c": 5})
    columns = ("a", "b", "c", "d")  # one more than the first has
    again = Table(path, ("a", "b"), columns)
    assert ("x, y", "1") in again and ("x, y", "2") not in again
    again.add({"a": "z", "b": "1", "d": 7})
    written = ["a,b,c,d", '"x, y",1,5,', "z,1,,7"]
    assert path.read_text().splitlines() == written
    assert ("z", "1") in Table(path, ("a", "b"), columns)
    with pytest.raises(ValueError, match="e: not among"):
        again.add({"a": "y", "b": "1", "e": 7})
    with pytest.raises(SystemExit, match="results.csv has the columns d, which"):
        Table(path, ("a", "b"), ("a", "b", "c"))
    assert path.read_text().splitlines() == written


COLUMNS = {
    "check.COLUMNS": "history",
    "memory.base.COLUMNS": "bases",
    "memory.memory.CARD_COLUMNS": "cards",
    "memory.memory.COLUMNS": "memory",
    "memory.workers.COLUMNS": "workers",
    "quality.halves.COLUMNS": "halves",
    "quality.quality.COLUMNS": "quality",
    "quality.quality.PREDICTED_COLUMNS": "predicted",
    "quality.quality.SCALE_COLUMNS": "finetunes",
    "quality.quantized.COLUMNS": "quantized",
    "quality.real.COLUMNS": "real",
    "quality.strength.COLUMNS": "strength",
    "reliability.vllm_versions.COLUMNS": "versions",
    "serving.capacity.COLUMNS": "capacity",
    "serving.overhead.COLUMNS": "overhead",
    "serving.router.COLUMNS": "router",
    "serving.serving.COLUMNS": "serving",
    "serving.serving.COMPARE_COLUMNS": "serving_compare",
}


@pytest.mark.parametrize("name", COLUMNS)
def test_the_results_have_the_columns_that_their_benchmark_writes(name):
    for package in ("vllm", "gguf"):
        pytest.importorskip(package)
    module, _, columns = name.rpartition(".")
    path = RESULTS / f"{COLUMNS[name]}.csv"
    head = path.read_text().partition("\n")[0]
    found = importlib.import_module(f"benchmarks.{module}")
    assert sorted(head.split(",")) == sorted(getattr(found, columns))


def test_tables():
    assert quality.geometric_mean([2.0, 4.0, 27.0]) == pytest.approx(6.0)
    lines = table(["a", "b"], [["1", "2"], ["3", "4"]]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "| 3 | 4 |"]
    rows = [
        {"fine_tune": f, "method": m, "kl": kl}
        for f, m, kl in [("x", "p", "1e-2"), ("y", "p", "4e-2"), ("x", "q", "1e-3")]
    ]
    assert list(quality.by_method(rows, {"x", "y"})) == ["p"]  # q lacks a fine-tune
    assert quality.kl(rows[:2]) == pytest.approx((1e-2 * 4e-2) ** 0.5)
    versions = [
        {"vllm": "0.9.0", "passed": "7", "failed": "0", "errors": "0"},
        {"vllm": "0.8.0", "passed": "7", "failed": "0", "errors": "2"},
    ]
    about = {"torch": "2.1+cpu", "transformers": "5", "build": "cpu"}
    versions += [{**versions[0], "vllm": "0.10.0"}]
    rows = [{**row, **about, "runner": "V1"} for row in versions]
    rows += [{**rows[0], "runner": "V2", "passed": "3"}]
    assert reliability.versions_table(rows).splitlines()[2:] == [
        "| 0.10.0 | 2.1 | 5 | cpu | 7 tests pass |  |",
        "| 0.9.0 | 2.1 | 5 | cpu | 7 tests pass | 3 tests pass |",
        "| 0.8.0 | 2.1 | 5 | cpu | refused |  |",
    ]


def test_rows_measured_before_hits_were_counted_have_a_dash():
    about = {"popularity": "uniform", "models": "4", "arrivals": "closed"}
    about |= dict.fromkeys((*serving.TIMES, "output_tokens_per_s"), "1")
    about["goodput_per_s"] = "2"
    # Without the column; in a file that has it for other rows; with it.
    rows = [about, about | {"hits": ""}, about | {"hits": "0.906"}]
    head, _, *lines = serving.serving_table(rows).splitlines()
    cells = [line.strip("| ").split(" | ") for line in (head, *lines)]
    assert [cell[-2:] for cell in cells] == [
        ["goodput/s", "resident"],
        ["2.00", "-"],
        ["2.00", "-"],
        ["2.00", "91%"],
    ]


def test_a_figure_shows_its_rows():
    rows = [
        {"system": s, "models": str(n), "memory_mb": str(mb), "step_ms": str(ms)}
        for s, n, mb, ms in [
            ("deltas", 2, 500, 40),
            ("deltas", 4, 600, 50),
            ("deltas of 1/16", 2, 400, 45),
            ("vLLM LoRA", 2, 700, 100),
            ("full copies", 2, 900, 80),
        ]
    ]
    memory, speed = figures.memory_figure(rows).axes
    held = {line.get_label(): line.get_xydata().tolist() for line in memory.lines}
    assert held["deltas"] == [[2, 0.5], [4, 0.6]] and held["full copies"] == [[2, 0.9]]
    assert speed.lines[0].get_xydata().tolist() == [[2, 50.0], [4, 80.0]]
    rows = [
        {"arrivals": a, "popularity": p, "models": n, key: "3", "ttft_p99_ms": "5"}
        for a, p, n in itertools.product(
            ["closed", "poisson"], ["identical", "uniform"], ["1", "4"]
        )
        for key in ["output_tokens_per_s"]
        if (p, n) in (("identical", "1"), ("uniform", "4"))
    ]
    left, right = figures.serving_figure(rows).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 3], [4, 3]]
    assert right.lines[0].get_xydata().tolist() == [[1, 5], [4, 5]]


def test_a_law_has_one_colour_in_all_panels_and_in_the_legend():
    """Though the rows of each panel are in another order."""
    laws = ["uniform", "zipf:1", "distinct"]
    rows = [
        {"arrivals": a, "popularity": p, "models": n}
        | {"output_tokens_per_s": f"{10 * i}.{n}", "ttft_p99_ms": f"{20 * i}.{n}"}
        for a, order in (("closed", laws), ("poisson", laws[::-1]))
        for i, p in enumerate(["identical", *order])
        for n in (["1"] if p == "identical" else ["2", "8"])
    ]
    figure = figures.serving_figure(rows)
    (legend,) = figure.legends
    handles, texts = legend.get_lines(), [text.get_text() for text in legend.texts]
    colours = dict(zip(texts, [line.get_color() for line in handles], strict=True))
    assert colours.keys() == set(laws) and len(set(colours.values())) == len(laws)
    for axes, arrivals, key in zip(
        figure.axes,
        ("closed", "poisson"),
        ("output_tokens_per_s", "ttft_p99_ms"),
        strict=True,
    ):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "8"]
        assert {text.get_text() for text in axes.texts} == set(laws)
        for line in axes.lines:
            law = line.get_label()
            assert line.get_color() == colours[law]
            assert line.get_xydata().tolist() == [
                [int(row["models"]), float(row[key])]
                for row in rows
                if row["arrivals"] == arrivals
                and row["popularity"] in ("identical", law)
            ]


def test_models_on_a_card_by_hand():
    """Weights of Llama-3.1-8B are 8,030,261,248; what is free, over a delta's bytes."""
    rows = {row["stored_as"]: row for row in cards()}
    base = 2 * 8_030_261_248
    assert rows["full copies"]["model_gb"] == round(base / 1e9, 3)
    room = 80e9 * 0.92 - 20e9
    assert rows["full copies"]["models"] == int(room // base)
    for ratio in (4, 8, 16):
        row = rows[f"deltas of ratio 1/{ratio}"]
        # A delta spends what it may, and the norms are exact.
        assert row["model_gb"] == pytest.approx(base / ratio / 1e9, rel=0.01)
        expected = (room - base) / (1e9 * row["model_gb"])
        assert row["models"] == int(expected)


def test_each_results_file_has_the_code_that_it_measures():
    assert age.MEASURES.keys() == {path.name for path in RESULTS.glob("*.csv")}
    for path in itertools.chain(*age.MEASURES.values()):
        assert (ROOT / path).exists(), path


def test_results_that_are_older_than_their_code_are_named(tmp_path, monkeypatch):
    commits = {
        "new.csv": ["c2", "c2"],
        "old.csv": ["c2", "c1-dirty"],
        "unknown.csv": ["c2", "c9"],
        "unsaid.csv": ["c2", ""],
    }
    for name, column in commits.items():
        (tmp_path / name).write_text("commit,a\n" + "".join(f"{c},1\n" for c in column))
    asked = {"c1": "3", "c2": "0", "c9": ""}
    monkeypatch.setattr(age, "RESULTS", tmp_path)
    monkeypatch.setattr(age, "MEASURES", dict.fromkeys(commits, ("code",)))
    monkeypatch.setattr(age, "git", lambda _, __, since, *___: asked[since[:2]])
    assert age.older() == [
        "old.csv: 3 commits newer than c1-dirty",
        "unknown.csv: rows of unknown commits",
        "unsaid.csv: rows of unknown commits",
    ]
