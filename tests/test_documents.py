# SPDX-License-Identifier: Apache-2.0
"""README and docs say what the results say, and what is in the tree."""

import csv
import importlib
import re
import subprocess
import sys
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
    keys = " ".join(f"{key}={row[key]}" for key in ("way", "method", "ratio"))
    source = f'<!-- convert.csv model="{row["model"]}" {keys} seconds -->'
    text = f"It takes 1.0{source} seconds."
    right = f"It takes {float(row['seconds']):.1f}{source} seconds."
    assert documents.rewritten(text, {}) == right
    assert documents.unsourced(right) == []
    with pytest.raises(ValueError, match="5 rows of convert.csv"):
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
    assert len({row["system"] for row in rows}) == 4
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


LINKED = [*DOCUMENTS, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG"))]


def prose(text):
    """A document without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors of a document's headings, by GitHub's rule."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    found = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        again = sum(re.fullmatch(rf"{slug}(-\d+)?", one) is not None for one in found)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def broken(path):
    """The targets of a document's links and pictures that do not exist."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text())):
        if not target.startswith(("http:", "https:", "mailto:")):
            file, _, anchor = target.partition("#")
            leads_to = path.parent / file if file else path
            if not leads_to.exists() or (
                anchor and anchor not in anchors(leads_to.read_text())
            ):
                yield target


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.name)
def test_links_and_anchors_lead_somewhere(path):
    assert list(broken(path)) == []


def test_a_broken_link_or_anchor_is_seen(tmp_path):
    other, path = tmp_path / "other.md", tmp_path / "a.md"
    other.write_text("# A `b`, c!\n\n```\n# code\n```\n\n## Twice\n\n## Twice\n")
    assert anchors(other.read_text()) == ["a-b-c", "twice", "twice-1"]
    right = "[x](other.md#a-b-c) [y](other.md) [z](#top) `[](no)` [w](https://no)"
    path.write_text(f"# Top\n\n{right}\n")
    assert list(broken(path)) == []
    path.write_text("[x](other.md#code) [y](#top) ![z](gone.svg)")
    assert list(broken(path)) == ["other.md#code", "#top", "gone.svg"]


def test_every_document_is_on_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    pages = {path.name for path in LINKED} - {"README.md"} | {"index.md"}
    assert set(re.findall(r": (\S+\.md)$", site, re.MULTILINE)) == pages


def test_the_site_builds_without_a_warning(tmp_path):
    """Its links, anchors, tables and pages as mkdocs sees them."""
    pytest.importorskip("material", reason="mkdocs-material is missing: make site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in LINKED:
        uri = "" if path.name == "README.md" else path.stem
        page = (tmp_path / uri / "index.html").read_text()
        body = page[page.index("<article") : page.index("</article>")]
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.DOTALL)
        tables = re.findall(r"^\|[ :|-]+\|$", text, re.MULTILINE)
        assert body.count("<table") == len(tables), path.name
        items = re.findall(r"^ *(?:[-*]|\d+\.) ", text, re.MULTILINE)
        assert body.count("<li") == len(items), path.name
    assert (tmp_path / "search" / "search_index.json").exists()


def test_the_first_command_is_near_the_top():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "```bash" in lines[:15]
