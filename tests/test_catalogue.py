# SPDX-License-Identifier: Apache-2.0
"""Which folders a server may load, and what it says of the others."""

import json
import os
import shutil

import pytest

from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.frontend import catalogue
from vllm_dqrelo.frontend.catalogue import Catalogue, DeltaInfo


@pytest.fixture
def store(family, tmp_path):
    """A folder with one delta, ``math``, and one beside it that it must not reach."""
    made = family("llama")
    shutil.copytree(made.deltas[0], tmp_path / "store" / "math")
    shutil.copytree(made.deltas[1], tmp_path / "private")
    return tmp_path / "store"


def test_names_are_sub_folders_and_new_ones_are_seen(store):
    known = Catalogue([str(store)])
    assert known.find("math") == store / "math"
    assert list(known.list()) == ["math"]
    with pytest.raises(FileNotFoundError, match="code is not a delta of this server"):
        known.find("code")
    shutil.copytree(store / "math", store / "code")
    (store / "notes").mkdir()
    (store / "file").write_text("")
    assert known.find("code") == store / "code"
    assert list(known.list()) == ["code", "math"]
    shutil.rmtree(store / "math")
    assert list(known.list()) == ["code"]


def test_what_is_said_of_a_delta(store):
    (info,) = Catalogue([str(store)]).list().values()
    weights = store / "math" / "delta_model.safetensors"
    config = json.loads((store / "math" / "delta_config.json").read_text())
    assert info == DeltaInfo(
        store / "math",
        config["digest"],
        config["ratio"],
        weights.stat().st_size,
        int((store / "math" / "delta_config.json").stat().st_mtime),
    )
    assert info.digest == Delta(store / "math").config.digest


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../private", "/etc", "math/", "a/b", "math\0", "./math"]
    + ["x" * 256, "\ud800"],
)
def test_a_name_is_one_component_of_a_path(store, name):
    with pytest.raises(FileNotFoundError):
        Catalogue([str(store)]).find(name)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_a_link_that_leaves_the_folder_is_refused(store, what):
    path = store / "math" if what == "folder" else store / "math" / "README.md"
    target = store.parent / "private"
    if what == "folder":
        shutil.rmtree(path)
        path.symlink_to(target)
    else:
        path.unlink()
        path.symlink_to(target / "README.md")
    known = Catalogue([str(store)])
    for look in (lambda: known.find("math"), lambda: known.allowed(f"{store}/math")):
        with pytest.raises(DqreloError, match=f"outside|must not be loaded: .*{store}"):
            look()
    assert known.list() == {}


def test_nothing_in_the_folder_keeps_the_list_from_being_made(store):
    """Names that are no text, links in a circle, pipes, numbers that JSON lacks."""
    sound = store / "math"
    (store / os.fsdecode(b"\xff")).mkdir()
    shutil.copy(sound / "delta_config.json", store / os.fsdecode(b"\xff"))
    bad = {name: store / name for name in ("circle", "pipe", "nan", "inside")}
    for folder in bad.values():
        shutil.copytree(sound, folder)
    for name in ("circle", "pipe"):
        (bad[name] / "delta_config.json").unlink()
    (bad["circle"] / "delta_config.json").symlink_to("delta_config.json")
    os.mkfifo(bad["pipe"] / "delta_config.json")
    config = json.loads((sound / "delta_config.json").read_text())
    text = json.dumps(config | {"ratio": float("nan")})
    (bad["nan"] / "delta_config.json").write_text(text)
    (bad["inside"] / "notes").symlink_to("notes")
    known = Catalogue([str(store), str(store.parent / "private")])
    assert known.names() == ["circle", "inside", "math", "nan", "pipe"]
    assert list(known.list()) == ["inside", "math"]
    json.dumps([info.ratio for info in known.list().values()], allow_nan=False)
    for name in ("circle", "pipe", "nan"):
        with pytest.raises(DqreloError, match="delta_config.json"):
            DeltaInfo.read(known.find(name))
    shutil.rmtree(store)
    assert known.names() == [] and known.list() == {}


@pytest.mark.parametrize("path", ["\0", "x/" * 3000])
def test_what_is_no_path_is_refused(store, path):
    with pytest.raises(DqreloError, match="is not a path"):
        Catalogue([str(store)]).allowed(path)


def test_a_name_in_two_folders_is_nobody(store):
    known = Catalogue([str(store), str(store.parent)])
    shutil.copytree(store / "math", store.parent / "math")
    with pytest.raises(DqreloError, match="math is ambiguous"):
        known.find("math")


def test_only_given_folders_and_namespaces_may_be_named(store, monkeypatch):
    private = store.parent / "private"
    known = Catalogue([str(store)], ["mine"])
    assert known.allowed(str(store / "math")) == store / "math"
    monkeypatch.chdir(store.parent)
    (store.parent / "mine").mkdir()
    named = ("private", "mine/../private", "mine/..", "mine/", "other/delta")
    for path in (str(private), f"{store}/../private", *named):
        with pytest.raises(DqreloError, match="must not be loaded"):
            known.allowed(path)
    with pytest.raises(FileNotFoundError):
        known.allowed(str(store / "code"))
    known.give(str(private))
    assert known.allowed(str(private)) == private
    monkeypatch.setattr(catalogue, "resolve", lambda name: store / name)
    assert known.allowed("mine/delta") == store / "mine/delta"
    with pytest.raises(DqreloError, match="a --delta-dir, but none is given"):
        Catalogue([]).allowed(str(private))


def test_the_environment_says_which(store, monkeypatch):
    monkeypatch.setenv("DQRELO_DELTA_DIR", f"{store}{os.pathsep}{store.parent}")
    monkeypatch.setenv("DQRELO_HUB_NAMESPACE", "one")
    known = Catalogue.from_environment()
    assert known.folders == [store, store.parent] and known.namespaces == {"one"}
    monkeypatch.setenv("DQRELO_DELTA_DIR", str(store / "none"))
    with pytest.raises(DqreloError, match="none is not a folder"):
        Catalogue.from_environment()
