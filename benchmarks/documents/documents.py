# SPDX-License-Identifier: Apache-2.0
"""Where the numbers of README and docs come from, and how they are kept true.

A measured number in a document is one of two things:

* part of a table or sentence between ``<!-- NAME -->`` and ``<!-- end of NAME -->``,
  whose table ``tables.py`` names; it is written as a whole;
* followed by its source: ``101<!-- serving.csv system="base alone" seconds -->`` is the
  column ``seconds`` of the one row of results/serving.csv with that system, shown with
  as many decimals as the number has. In a .json file the last word is a path of keys.

``figures.py`` writes both again; tests/test_documents.py fails where a document is not
what it would write, and where a number with a unit is neither. A paragraph in which
numbers are settings or examples says ``<!-- given -->``.
"""

import re
import shlex
from collections.abc import Mapping

from benchmarks.documents.rows import read, read_json
from benchmarks.paths import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

BLOCK = re.compile(
    r"<!-- (?P<name>[\w-]+) -->\n.*?<!-- end of (?P=name) -->", re.DOTALL
)
SOURCED = re.compile(
    r"(?P<shown>\d[\d,]*(?:\.\d+)?)"
    r"<!-- (?P<file>[\w.]+\.(?:csv|json))"
    r'(?P<where>(?: \w+=(?:"[^"]*"|[^ "]+))*) (?P<what>[\w.-]+) -->'
)
UNIT = r"%|ms|s|seconds?|minutes?|hours?|tokens/s|MB|GB|MiB|GiB"
MEASURED = re.compile(rf"(?<![\w./:-])\d[\d,]*(?:\.\d+)?\s?(?:{UNIT})(?![\w/])")
GIVEN = "<!-- given -->"
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def rewritten(text: str, tables: Mapping[str, str]) -> str:
    """A document with its blocks and sourced numbers as the results have them.

    Args:
        text: of the document.
        tables: name -> Markdown.

    Raises:
        KeyError: a block has no table. ValueError: a source names no number.
    """

    def block(found: re.Match[str]) -> str:
        name = found["name"]
        return f"<!-- {name} -->\n{tables[name]}\n<!-- end of {name} -->"

    def number(found: re.Match[str]) -> str:
        shown, comment = found["shown"], found[0].removeprefix(found["shown"])
        value = looked_up(found["file"], found["where"], found["what"])
        return f"{value:.{len(shown.partition('.')[2])}f}{comment}"

    return SOURCED.sub(number, BLOCK.sub(block, text))


def looked_up(file: str, where: str, what: str) -> float:
    """One number of a results file.

    Args:
        file: in results/.
        where: ' column="value"' for each column that names a row of a .csv.
        what: a column, or keys of a .json with dots between them.

    Raises:
        ValueError: there is none, or several.
    """
    if file.endswith(".json"):
        found = read_json(file)
        for key in what.split("."):
            found = found[key]
        return float(found)
    wanted = dict(part.split("=", 1) for part in shlex.split(where))
    rows = [row for row in read(file) if wanted.items() <= row.items()]
    if len(rows) != 1:
        raise ValueError(f"{len(rows)} rows of {file} have {wanted}, expected one")
    return float(rows[0][what])


def unsourced(text: str) -> list[str]:
    """Numbers with a unit of measurement that name no source, with their line."""

    def blank(found: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", found[0])

    for pattern in (CODE, BLOCK):
        text = pattern.sub(blank, text)
    missing = []
    for paragraph in re.split(r"\n\s*\n", SOURCED.sub("", text)):
        if GIVEN not in paragraph:
            missing += MEASURED.findall(paragraph)
    return missing
