# SPDX-License-Identifier: Apache-2.0
"""README and docs say what the results say, and what is in the tree."""

import csv
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_NAME = {str(path.relative_to(ROOT)): path for path in DOCUMENTS}


@pytest.fixture(scope="module")
def documents():
    """benchmarks/documents/documents.py."""
    return importlib.import_module("benchmarks.documents.documents")


@pytest.fixture(scope="module")
def tables(documents):
    """What stands in the documents' blocks."""
    return importlib.import_module("benchmarks.documents.tables").tables()


@pytest.mark.parametrize("name", BY_NAME)
def test_numbers_are_those_of_the_results(documents, tables, name):
    """``python -m benchmarks.documents.figures`` would change nothing."""
    text = BY_NAME[name].read_text()
    assert documents.rewritten(text, tables) == text


@pytest.mark.parametrize("name", BY_NAME)
def test_a_number_that_was_measured_names_its_source(documents, name):
    assert documents.unsourced(BY_NAME[name].read_text()) == []


def test_a_number_without_a_source_or_of_another_is_seen(documents):
    assert documents.unsourced("It takes 12 ms.") == ["12 ms"]
    assert documents.unsourced("It takes 3.5 GB, <!-- given --> or so.") == []
    assert documents.unsourced("```\nsleep 5 s\n```\n`10 ms` of CPU 3") == []
    with (RESULTS / "convert.csv").open() as file:
        row = next(csv.DictReader(file))
    source = (
        f'<!-- convert.csv model="{row["model"]}" method={row["method"]} seconds -->'
    )
    text = f"It takes 1.0{source} seconds."
    right = f"It takes {float(row['seconds']):.1f}{source} seconds."
    assert documents.rewritten(text, {}) == right
    assert documents.unsourced(right) == []
    with pytest.raises(ValueError, match="2 rows of convert.csv"):
        model = f'<!-- convert.csv model="{row["model"]}" seconds -->'
        documents.rewritten(f"1{model}", {})
    old = "<!-- cpu -->\nold\n<!-- end of cpu -->"
    assert documents.rewritten(old, {"cpu": "new"}) == old.replace("old", "new")


def test_every_table_is_in_a_document(documents, tables):
    text = "".join(path.read_text() for path in DOCUMENTS)
    assert {m["name"] for m in documents.BLOCK.finditer(text)} == set(tables)


def test_the_versions_that_are_served_are_those_whose_tests_pass():
    pytest.importorskip("vllm")
    from vllm_dqrelo.compat import FIRST_UNTESTED, OLDEST

    with (RESULTS / "versions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        version = tuple(map(int, row["vllm"].split(".")[:2]))
        passes = int(row["passed"]) > 0 and int(row["failed"]) + int(row["errors"]) == 0
        assert passes == (OLDEST <= version < FIRST_UNTESTED), row["vllm"]
    oldest, first = (".".join(map(str, v)) for v in (OLDEST, FIRST_UNTESTED))
    bounds = f">={oldest},<{first}"
    assert f'vllm = ["vllm{bounds}"]' in (ROOT / "pyproject.toml").read_text()


def rows_of(name):
    with (RESULTS / name).open() as file:
        return list(csv.DictReader(file))


def test_memory_is_what_plan_counts_within_two_percent():
    rows = [row for row in rows_of("memory.csv") if row["system"] == "deltas"]
    assert [row["models"] for row in rows] == ["2", "4", "8", "16"]
    for row in rows:
        for tier in ("disk", "host", "device"):
            measured = float(row[f"{tier}_mb"]) / float(row["predicted_mb"])
            assert abs(measured - 1) < 0.02, (tier, row["models"])


def test_a_base_is_what_plan_counts_within_two_percent():
    """Under deltas, under LoRA and as whole copies; other bases beside it."""
    rows = rows_of("memory.csv")
    assert len({row["system"] for row in rows}) == 3
    sizes = [(row["base_mb"], row["predicted_base_mb"]) for row in rows]
    bases = rows_of("bases.csv")
    assert {"tied" in row["base"] for row in bases} == {True, False}
    sizes += [(row["measured_mb"], row["predicted_mb"]) for row in bases]
    for measured, predicted in sizes:
        assert abs(float(measured) / float(predicted) - 1) < 0.02


def test_the_map_of_the_repository_is_true():
    """What the map in CONTRIBUTING.md names is there, and every folder is on it."""
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Repository")[2]
    rows = re.findall(r"^\| `(\S+/)` \| (.*) \|$", text, re.MULTILINE)
    assert rows
    for folder, description in rows:
        assert (ROOT / folder).is_dir(), folder
        for name in re.findall(r"`([\w./]+\.\w+|[\w/]+/)`", description):
            assert (ROOT / folder / name).exists(), f"{folder}{name}"
    tops = {Path(folder).parts[0] for folder, _ in rows}
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir()}
    ours = {name for name in tracked if not name.startswith((".", "__"))}
    assert ours - {"dist", "build"} == tops


@pytest.mark.parametrize("name", BY_NAME)
def test_links_lead_somewhere(name):
    path = BY_NAME[name]
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text()):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), target


def test_the_first_command_is_near_the_top():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "```bash" in lines[:15]
