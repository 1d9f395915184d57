# SPDX-License-Identifier: Apache-2.0
"""convert --push-to-hub, with a Hub that only writes down what it is told."""

import shlex
from pathlib import Path

import pytest
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import LocalTokenNotFoundError

from dqrelo_tools import cli


@pytest.fixture
def hub(monkeypatch):
    """The calls of HfApi, in order, and what each uploaded file held."""
    calls: list[tuple] = []

    def create_repo(api, repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return RepoUrl(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")

    def upload_folder(api, *, repo_id, folder_path, **options):
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        calls.append(("upload_folder", repo_id, files))

    monkeypatch.setattr(HfApi, "whoami", lambda api: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return calls


def convert(made, output, *options) -> int:
    command = ["convert", "--base", made.base, "--model", made.models[0]]
    command += ["--output", output, *options]
    return cli.main([str(part) for part in command])


@pytest.mark.parametrize("private", [True, False])
def test_the_whole_folder_is_uploaded(family, tmp_path, capsys, hub, private):
    options = ["--private"] if private else []
    assert not convert(
        family("llama"), tmp_path / "d", "--push-to-hub", "mine", *options
    )
    created, uploaded = hub
    assert created == ("create_repo", "mine", {"private": private, "exist_ok": True})
    written = {path.name: path.read_bytes() for path in (tmp_path / "d").iterdir()}
    assert uploaded == ("upload_folder", "me/mine", written)
    assert {"delta_config.json", "README.md"} <= written.keys()
    assert "pushed to https://huggingface.co/me/mine" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["create_repo", "upload_folder"])
def test_a_failed_upload_keeps_the_folder(
    family, tmp_path, capsys, hub, monkeypatch, step
):
    def fail(api, *arguments, **options):
        raise RuntimeError("connection lost")

    monkeypatch.setattr(HfApi, step, fail)
    folder = tmp_path / "a delta"
    options = ("--push-to-hub", "me/mine", "--private")
    assert convert(family("llama"), folder, *options) == 1
    message = capsys.readouterr().err
    assert "connection lost" in message and "Traceback" not in message
    command = message.strip().splitlines()[-1].partition(": ")[2]
    assert shlex.split(command) == [
        *("hf", "upload", "me/mine", str(folder), ".", "--private"),
    ]
    assert cli.main(["inspect", str(folder)]) == 0


def no_token(api):
    raise LocalTokenNotFoundError("Token is required")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: Repo id must be"),
        (["--push-to-hub", "no spaces"], "--push-to-hub no spaces: Repo id must"),
        (["--push-to-hub", "me/mine"], "accept a token (Token is required)"),
        (["--private"], "--private needs --push-to-hub"),
    ],
)
def test_what_cannot_be_pushed_is_not_converted(
    family, tmp_path, capsys, hub, monkeypatch, options, message
):
    monkeypatch.setattr(HfApi, "whoami", no_token)
    assert convert(family("llama"), tmp_path / "d", *options) == 1
    assert message in capsys.readouterr().err
    assert not hub and not list(tmp_path.iterdir())
