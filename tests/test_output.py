# SPDX-License-Identifier: Apache-2.0
"""Where convert and export write: places that work, that are refused, that fail."""

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from support.command import run

from dqrelo_tools import convert
from vllm_dqrelo.format import folder
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError


@pytest.fixture(params=["convert", "export"])
def command(request, family):
    """The command, and the options that say what it reads."""
    made = family("llama-tied")
    what = ["--model", made.models[0]]
    if request.param == "export":
        what = ["--delta", made.deltas[0]]
    return [request.param, "--base", made.base, *what, "--output"]


def names(path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def whole(path) -> bool:
    """Whether a folder is a finished delta or checkpoint, with nothing else in it."""
    kinds = {"delta_config.json", "config.json"} & names(path)
    return len(kinds) == 1 and not [n for n in names(path) if n.startswith(".")]


# Places that work.


def test_the_current_folder(command, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    inode = here.stat().st_ino
    assert run(*command, ".") == 0
    assert here.stat().st_ino == inode and whole(here)
    assert names(tmp_path) == {"here"}


def test_a_link_to_an_empty_folder(command, tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    assert run(*command, tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink() and whole(tmp_path / "target")
    assert names(tmp_path) == {"link", "target"}


def test_a_home_folder_a_slash_and_a_relative_path(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for i, output in enumerate(["~/new/0", f"{tmp_path}/new/1/", "new/2", "./3"]):
        assert run(*command, output) == 0
        assert whole(tmp_path / ("3" if i == 3 else f"new/{i}"))
    assert names(tmp_path) == {"new", "3"} and len(names(tmp_path / "new")) == 3


def test_an_empty_folder_may_be_another_disk(command, tmp_path, monkeypatch):
    """Nothing is renamed from outside of it, which a mount point would not take."""
    output = tmp_path / "mounted"
    output.mkdir()
    replace, rename = os.replace, os.rename

    def same_disk(rename):
        def checked(source, target, **options):
            inside = [Path(p).is_relative_to(output) for p in (source, target)]
            if inside[0] != inside[1] or Path(target) == output:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return rename(source, target, **options)

        return checked

    monkeypatch.setattr(os, "replace", same_disk(replace))
    monkeypatch.setattr(os, "rename", same_disk(rename))
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(path):
        asked.append(Path(path))
        return usage(0, 0, 10**9 if Path(path).is_relative_to(output) else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert run(*command, output) == 0
    assert whole(output) and asked == [output]


# Places that are refused, before anything is computed.


@pytest.fixture
def nothing_computed(monkeypatch):
    def computed(*args, **options):
        raise AssertionError("something was computed")

    monkeypatch.setattr(convert, "compress", computed)
    monkeypatch.setattr(Delta, "merged", computed)


def refused(command, output, message, capsys):
    assert run(*command, output) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_what_is_taken_is_refused(command, tmp_path, capsys, nothing_computed):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    for name in ("file", "full", "link"):
        message = "exists and is not an empty folder"
        refused(command, tmp_path / name, message, capsys)
    refused(command, tmp_path / "file" / "d", "file is not a folder", capsys)
    assert names(tmp_path) == {"file", "full", "link"}
    assert names(tmp_path / "full") == {"file"}


def test_nothing_is_written_into_what_is_read(
    command, tmp_path, capsys, monkeypatch, nothing_computed
):
    _, _, base, _, read, _ = command
    for source in (base, read):
        before = names(source)
        (tmp_path / "link").symlink_to(source)
        refused(command, source, "is not an empty folder", capsys)
        for output in (source / "d", tmp_path / "link" / "a" / "d"):
            refused(command, output, f"is in {source}, which is read", capsys)
        monkeypatch.chdir(source)
        refused(command, "d", f"is in {source}, which is read", capsys)
        assert names(source) == before
        (tmp_path / "link").unlink()


def test_a_protected_folder(command, tmp_path, capsys, monkeypatch, nothing_computed):
    """The tests may run as root, who may write everything."""
    monkeypatch.setattr(folder.os, "access", lambda path, mode: path != tmp_path)
    refused(command, tmp_path / "a" / "d", f"{tmp_path} is write-protected", capsys)


def test_a_disk_that_is_too_small(
    command, tmp_path, capsys, monkeypatch, nothing_computed
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(command, tmp_path / "a" / "d", f"{tmp_path} has 1,000 left", capsys)
    assert not names(tmp_path)


def test_a_picture_that_cannot_be_written(family, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    made = family("llama-tied")
    pair = ["--base", made.base, "--model", made.models[0]]
    (tmp_path / "d.png").mkdir()
    monkeypatch.setattr("dqrelo_tools.advise.survey", None)
    monkeypatch.setattr("dqrelo_tools.verify.verify", None)
    for command in (["advise"], ["verify", "--delta", made.deltas[0]]):
        assert run(*command, *pair, "--plot", tmp_path / "d.png") == 1
        assert "d.png cannot be written" in capsys.readouterr().err


# What fails after hours of work.


def test_a_last_step_that_fails_keeps_the_work(models, tmp_path, capsys, monkeypatch):
    base, model = models
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]
    computed = []
    compress = convert.compress
    monkeypatch.setattr(
        convert, "compress", lambda *args: computed.append(1) or compress(*args)
    )

    def fails(*args, **options):
        raise ValueError("a bug")

    steps = ["write_delta", "write_card"]
    for step in steps:
        with monkeypatch.context() as patched:
            patched.setattr(convert, step, fails)
            assert run(*command) == 1
        said = capsys.readouterr().err
        assert "ValueError: a bug" in said and "Traceback" not in said
        kept = folder.size_of(tmp_path / ".d.parts")
        assert f"{kept:,} bytes that are converted already are kept in" in said
        assert "the same command goes on from there" in said
        assert names(tmp_path) == {"base", "model", ".d.parts"}
    with monkeypatch.context() as patched:
        patched.setattr(folder.os, "replace", fails)
        assert run(*command) == 1
    once = len(computed)
    assert run(*command) == 0
    assert len(computed) == once and whole(tmp_path / "d")
    assert names(tmp_path) == {"base", "model", "d"}


def test_an_error_of_the_machine_keeps_the_work(models, tmp_path, capsys, monkeypatch):
    """In the middle: what came before it is not computed again."""
    base, model = models
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]
    compress, computed, lock = convert.compress, [], threading.Lock()

    def failing(*args):
        with lock:  # small matrices are converted at the same time
            if len(computed) == count:
                raise error
            computed.append(1)
        return compress(*args)

    monkeypatch.setattr(convert, "compress", failing)
    errors = [OSError(errno.EIO, "Input/output error"), MemoryError("no memory")]
    errors.append(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    for count, error in zip((3, 5, 7), errors, strict=True):
        assert run(*command) == 1
        said = capsys.readouterr().err
        assert error.args[-1] in said and "are kept in" in said, said
        assert len(computed) == count
        assert names(tmp_path) == {"base", "model", ".d.parts"}
    count = None
    assert run(*command) == 0 and whole(tmp_path / "d")


def test_a_broken_card_of_the_fine_tune_is_no_error(models, tmp_path, capsys):
    base, model = models
    broken = [
        b"---\nlicense: [\n---\n",
        b"---\n- a\n---\n",
        b"\xff\xfe\x00",
        b"---\n: :",
    ]
    for i, text in enumerate(broken):
        (model / "README.md").write_bytes(text)
        command = ["convert", "--base", base, "--model", model]
        assert run(*command, "--output", tmp_path / f"d{i}") == 0
    said = capsys.readouterr().err
    assert said.count("README.md cannot be read") >= 3


def test_another_conversion_is_not_gone_on_with(models, tmp_path, capsys, monkeypatch):
    """Not with other options, another base or another fine-tune; a note says so."""
    base, model = models
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]
    parts = tmp_path / ".d.parts"

    def stop(*args, **options):
        raise KeyboardInterrupt

    def stopped(*options):
        with monkeypatch.context() as patched:
            patched.setattr(convert, "write_delta", stop)
            assert run(*command, *options) == 130
        said = capsys.readouterr().err
        assert "the same command goes on from there" in said
        marks.append((parts / "identity").read_text())
        return f"left in {parts} are removed" in said

    marks: list[str] = []
    assert not stopped()
    assert not stopped()
    assert stopped("--ratio", "0.25")
    for changed in (base, model):
        os.utime(changed / "model.safetensors", ns=(1, 1))
        assert stopped("--ratio", "0.25")
    assert len(set(marks)) == 4


def test_two_at_a_time(models, tmp_path, capsys, monkeypatch):
    """The second is refused, and leaves the first alone."""
    base, model = models
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]
    compress, results, inside = convert.compress, [], threading.Event()
    go_on = threading.Event()

    def slow(*args):
        inside.set()
        assert go_on.wait(60)
        return compress(*args)

    monkeypatch.setattr(convert, "compress", slow)
    first = threading.Thread(target=lambda: results.append(run(*command)))
    first.start()
    assert inside.wait(60)
    second = [sys.executable, "-m", "dqrelo_tools.cli", *map(str, command)]
    done = subprocess.run(second, capture_output=True, text=True)
    go_on.set()
    first.join()
    assert done.returncode == 1
    assert f"another process is writing {tmp_path / 'd'}" in done.stderr
    assert results == [0] and whole(tmp_path / "d")
    assert names(tmp_path) == {"base", "model", "d"}


def test_what_a_killed_process_left_is_no_content(models, tmp_path):
    """In an empty folder that was given, the parts lie inside."""
    base, model = models
    output = tmp_path / "d"
    (output / ".partial").mkdir(parents=True)
    (output / ".partial" / "delta_model-00009-of-00009.safetensors").write_bytes(
        b"half"
    )
    (output / ".parts").mkdir()
    (output / ".parts" / "scratch").write_bytes(b"half")
    assert run("convert", "--base", base, "--model", model, "--output", output) == 0
    assert whole(output)
    assert Delta(output).matrices and len([*output.glob("*.safetensors")]) == 1


def test_parts_need_no_space_twice(tmp_path, monkeypatch):
    """A conversion that goes on needs what is left to be written."""
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    (tmp_path / ".d.parts").mkdir()
    (tmp_path / ".d.parts" / "000000.safetensors").write_bytes(bytes(500))
    folder.require_free(tmp_path / "d", 1500)
    with pytest.raises(DqreloError, match="needs 1,001 bytes"):
        folder.require_free(tmp_path / "d", 1501)


def test_export_does_what_is_cheap_first(family, tmp_path, monkeypatch):
    """No tensor is merged before the other files are there."""
    from dqrelo_tools import export

    def fails(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(export.shutil, "copyfile", fails)
    monkeypatch.setattr(Delta, "merged", None)
    made = family("llama-tied")
    with pytest.raises(OSError, match="Input/output error"):
        export.export(str(made.base), made.deltas[0], tmp_path / "d")
    assert not names(tmp_path)


@pytest.mark.parametrize("device", ["cuda:77", "gpu"])
@pytest.mark.parametrize("command", ["advise", "convert"])
def test_a_device_that_is_not_there(
    models, tmp_path, capsys, nothing_computed, command, device
):
    options = ["--base", models[0], "--model", models[1], "--device", device]
    output = ["--output", tmp_path / "d"] if command == "convert" else []
    assert run(command, *options, *output) == 1
    assert f"--device {device} cannot be used: " in capsys.readouterr().err
    assert names(tmp_path) == {"base", "model"}
