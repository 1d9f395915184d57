# SPDX-License-Identifier: Apache-2.0
"""Which module imports which, by the source: also within functions, also for types."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {
    "vllm_dqrelo": ROOT,
    "dqrelo_kernels": ROOT / "kernels",
    "dqrelo_tools": ROOT / "tools",
}
ROOMS = ("frontend", "engine", "worker")  # a process each

# Imports that would close a circle, or leave a room, and why they stay.
ALLOWED = {
    ("vllm_dqrelo", "vllm_dqrelo.plugin"): "the entry point; lazy, for it imports vLLM",
    ("vllm_dqrelo", "vllm_dqrelo.frontend.offline"): "the public load_delta; lazy, too",
    ("vllm_dqrelo", "dqrelo_tools.trained"): "the public delta_of; lazy, too",
}


def imported(path: Path, module: str) -> set[str]:
    """The modules that a file names in its import statements, wherever they stand.

    Semantics: ``from a.b import c`` is ``a.b.c``; ``c`` may be a module or not.

    Args:
        module: the dotted name of the file.
    """
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            parts = above if node.level else []
            parts = [*parts, node.module] if node.module else parts
            found |= {".".join([*parts, alias.name]) for alias in node.names}
    return found


def graph(sources: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of ``sources`` and the names of others that it imports."""
    files = {}
    for package, root in sources.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(p for p in parts if p != "__init__")] = path

    def module(name: str) -> str:
        """The module that has a name: the name itself, or what is before its dot."""
        if name.split(".")[0] in sources and name not in files:
            return name.rpartition(".")[0]
        return name

    return {name: {*map(module, imported(files[name], name))} for name in files}


def circle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn; empty if there are none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(edges[name] & edges.keys()):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next(filter(None, (walk(name, []) for name in sorted(edges))), [])


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    found = graph(SOURCES)
    assert len(found) > 80
    for module, other in ALLOWED:
        found[module].remove(other)  # each of them is needed
    return found


def crossings(edges, package, *others) -> list[tuple[str, str]]:
    """Imports of a module in ``package`` from one of ``others``."""
    return [
        (module, name)
        for module, names in edges.items()
        if is_in(module, package)
        for name in names
        if any(is_in(name, other) for other in others)
    ]


def test_no_import_circle(edges):
    assert circle(edges) == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_process_imports_another(edges, room):
    others = [f"vllm_dqrelo.{other}" for other in ROOMS if other != room]
    assert crossings(edges, f"vllm_dqrelo.{room}", *others) == []


@pytest.mark.parametrize(
    "package", ["messages", "format", "compat", "options", "room", "supported"]
)
def test_what_every_process_has_imports_no_process(edges, package):
    rooms = [f"vllm_dqrelo.{room}" for room in (*ROOMS, "plugin", "quantization")]
    assert crossings(edges, f"vllm_dqrelo.{package}", *rooms) == []


def test_the_format_imports_itself_and_how_bits_lie(edges):
    ours = crossings(edges, "vllm_dqrelo.format", *SOURCES, "vllm")
    known = "vllm_dqrelo.format", "dqrelo_kernels.layout", "dqrelo_kernels.table"
    assert [pair for pair in ours if not any(is_in(pair[1], k) for k in known)] == []


def test_the_tools_import_the_format_the_version_and_serve(edges):
    ours = crossings(edges, "dqrelo_tools", "vllm_dqrelo", "vllm")
    doors = {"vllm_dqrelo.frontend.serve", "vllm_dqrelo.frontend.doctor"}
    serve = {(m, n) for m, n in ours if n in doors}
    version = {(m, n) for m, n in ours if n == "vllm_dqrelo"}
    assert [
        pair
        for pair in ours
        if pair not in serve | version and not is_in(pair[1], "vllm_dqrelo.format")
    ] == []
    assert len(serve) == 2  # lazily, see test_packaging.py
    for module, _ in version:  # not another name of the package's
        path = SOURCES["dqrelo_tools"] / Path(*module.split(".")).with_suffix(".py")
        names = {n for n in imported(path, module) if n.count(".") == 1}
        names = {n for n in names if is_in(n, "vllm_dqrelo")}
        assert names <= {"vllm_dqrelo.__version__"}, module


def test_the_kernels_import_neither(edges):
    assert crossings(edges, "dqrelo_kernels", "vllm_dqrelo", "dqrelo_tools") == []


def test_nothing_imports_the_tools(edges):
    assert crossings(edges, "vllm_dqrelo", "dqrelo_tools") == []


def test_every_way_to_import_is_seen(tmp_path):
    """A circle through a function, a relative import and one for types alone."""
    package = tmp_path / "house"
    (package / "attic").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "cellar.py": "def late():\n    from house.attic.box import lid\n",
        "attic/__init__.py": "from .. import stairs\n",
        "attic/box.py": "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from ..stairs import Step\n",
        "stairs.py": "import house.cellar as below\n",
    }.items():
        (package / name).write_text(text)
    found = graph({"house": tmp_path})
    assert found["house.attic"] == {"house.stairs"}
    assert found["house.cellar"] == {"house.attic.box"}
    stairs, cellar, box = "house.stairs", "house.cellar", "house.attic.box"
    assert circle(found) == [stairs, cellar, box, stairs]
    (package / "cellar.py").write_text("import vllm.lora\n")
    assert circle(graph({"house": tmp_path})) == []
