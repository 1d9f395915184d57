# SPDX-License-Identifier: Apache-2.0
"""What documents, docstrings and comments name is in the tree; files are short."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (
    ".ci",
    "benchmarks",
    "deploy",
    "docs",
    "examples",
    "kernels",
    "tests",
    "tools",
    "vllm_dqrelo",
)
FILES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        *ROOT.glob("*.*"),
        *(f for d in FOLDERS for f in ROOT.glob(f"{d}/**/*")),
    )
    if path.is_file() and "__pycache__" not in path.parts
)
SOURCES = [name for name in FILES if name.endswith((".py", ".h", ".cpp"))]
# CHANGELOG.md is of the past.
DOCUMENTS = [name for name in FILES if name.endswith(".md") and name != "CHANGELOG.md"]
NAME = re.compile(
    r"(?<![\w/.*{<-])(?P<file>(?:[\w.-]+/)*[\w-]+\.(?:cpp|csv|h|md|py|svg|toml))\b"
    r"(?P<line>:\d+)?"
)
FOLDER = re.compile(rf"(?<![\w/.])(?:{'|'.join(FOLDERS)})/[\w/]*(?![\w/.*{{<-])")
TEST = re.compile(r"\b(test_\w+)\b(?![./*])")
MODULE = re.compile(r"-m (benchmarks(?:\.\w+)*)")
# A file with a line number is vLLM's; so is one in a folder of its source.
VLLM = ("csrc/", "entrypoints/", "model_executor/", "model_loader/", "v1/", "vllm/")
FOREIGN = {
    "modeling_rope_utils.py",  # transformers
    "modeling_utils.py",  # transformers
    "results.csv",  # what a user may call an output
    "sampling_params.py",  # vLLM
    "zero_to_fp32.py",  # DeepSpeed
}


def prose(name):
    """A document, or the docstrings and comments of a source."""
    text = (ROOT / name).read_text()
    if name.endswith(".py"):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds))
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        found = [ast.get_docstring(node) or "" for node in nodes]
        found += [token.string for token in tokens if token.type == tokenize.COMMENT]
        return "\n".join(found)
    if name.endswith((".h", ".cpp")):
        return "\n".join(re.findall(r"//.*|/\*.*?\*/", text, re.DOTALL))
    return text


def absent(text):
    """Files, folders and modules that a text names and the tree does not have."""
    names = [found["file"] for found in NAME.finditer(text) if not found["line"]]
    names = [name.removeprefix("../") for name in names]
    names = [
        name
        for name in names
        if not name.startswith((*VLLM, ".cache/")) and name not in FOREIGN
    ]
    known = {"/".join(f.split("/")[i:]) for f in FILES for i in range(f.count("/") + 1)}
    missing = [name for name in names if name not in known]
    folders = [name for name in FOLDER.findall(text) if not (ROOT / name).exists()]
    modules = [
        name
        for name in MODULE.findall(text)
        if {
            f"{name.replace('.', '/')}{end}" for end in (".py", "/__main__.py")
        }.isdisjoint(FILES)
    ]
    return missing + folders + modules


@pytest.mark.parametrize("name", [*DOCUMENTS, "Makefile"])
def test_what_a_document_names_is_in_the_tree(name):
    text = prose(name)
    assert absent(text) == []
    tests = "\n".join((ROOT / f).read_text() for f in SOURCES if f.startswith("tests/"))
    functions = {*re.findall(r"def (test_\w+)\(", tests)}
    assert {*TEST.findall(text)} <= functions


def test_what_docstrings_and_comments_name_is_in_the_tree():
    assert {name: found for name in SOURCES if (found := absent(prose(name)))} == {}


def test_a_name_that_is_not_in_the_tree_is_seen():
    """Names of files, folders and modules; not another project's, nor an example's."""
    text = "`gone.py` and cpu/gone.h, kernels/gone/, `python -m benchmarks.gone`"
    assert absent(text) == ["gone.py", "cpu/gone.h", "kernels/gone/", "benchmarks.gone"]
    assert (
        absent("v1/engine/core.py:158, loader.py:7, *.py, results.csv, x_{name}.py")
        == []
    )
    assert (
        absent("tests/test_tree.py, cpu/ops.cpp, `README.md`, -m benchmarks.demo") == []
    )


def test_files_are_short():
    """Python 400 lines at most; a kernel 500."""
    lines = {name: (ROOT / name).read_bytes().count(b"\n") for name in SOURCES}
    most = {name: 400 if name.endswith(".py") else 500 for name in lines}
    assert {name: n for name, n in lines.items() if n > most[name]} == {}
