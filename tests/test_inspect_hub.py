# SPDX-License-Identifier: Apache-2.0
"""dqrelo inspect OWNER/NAME, against a server that answers as the Hub does."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from support.command import run

from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import write_delta
from vllm_dqrelo.format.tensors import MatrixDelta

pytestmark = pytest.mark.slow

BASE = {"base_model_name_or_path": "base", "base_fingerprint": "sha256:0"}


class Hub(http.server.BaseHTTPRequestHandler):
    """One repository, me/mine, is ``server.folder``; ``server.sent`` counts bytes."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/me/mine/tree/"):
            self.answer(self.entries())
        elif path.startswith("/api/models/me/mine"):
            self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": []})
        elif path.startswith("/me/mine/resolve/"):
            self.answer_file(self.server.folder / path.rpartition("/")[2])
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def entries(self):
        return [
            {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
            for path in sorted(self.server.folder.iterdir())
        ]

    def answer(self, content, status=200):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def answer_file(self, path):
        content, status = path.read_bytes(), 200
        if asked := self.headers["Range"]:
            first, last = asked.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.server.sent += len(content)
        self.answer(content, status)

    def log_message(self, *arguments):
        """Nothing."""


@pytest.fixture
def hub(tmp_path):
    """A Hub with a delta of 16 MiB, whose header is much shorter."""
    folder = tmp_path / "deltas" / "mine"
    folder.mkdir(parents=True)
    factor = torch.ones(1024, 1024)
    matrices = {}
    for name, rank in (("a.weight", 1024), ("b.weight", 7)):
        signs = torch.zeros(1, 1024, 64, dtype=torch.int16)
        a, b = factor[:rank].clone(), factor[:, :rank].clone()
        matrix = MatrixDelta((1024, 1024), signs, torch.ones(1, 1), a, b)
        matrices |= matrix.tensors(name)
    matrices["norm.weight"] = torch.ones(8)
    config = DeltaConfig(**BASE, digest="", method="dqrelo", ratio=0.125)
    write_delta(folder, config, matrices, max_shard_size=5 * 2**20)
    (folder / "tokenizer.json").write_text("x" * 2**20)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.sent = folder, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def inspect(hub, cwd, *arguments, **variables):
    """``dqrelo inspect`` in a process whose Hub this is."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_address[1]}"
    return subprocess.run(
        [sys.executable, "-m", "dqrelo_tools.cli", "inspect", *map(str, arguments)],
        env={**environment, **variables},
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_delta_on_the_hub_is_described_as_its_folder(hub, tmp_path, capsys, form):
    """By its headers: of 16 MiB come fewer than 4, of a tokenizer nothing."""
    assert len([*hub.folder.glob("*.safetensors")]) > 1
    assert run("inspect", hub.folder, *form) == 0
    done = inspect(hub, tmp_path, "me/mine", *form)
    assert done.returncode == 0, done.stderr
    assert done.stdout == capsys.readouterr().out
    assert "dqrelo: note: me/mine: the headers were read" in done.stderr
    assert "%" not in done.stderr  # not a terminal
    assert 0 < hub.sent < 2**22


def test_a_folder_of_that_name_comes_first(hub, tmp_path):
    shutil.copytree(hub.folder, tmp_path / "me" / "mine")
    (tmp_path / "me" / "mine" / "notes.txt").touch()
    assert "notes.txt" in inspect(hub, tmp_path, "me/mine").stdout
    assert not hub.sent


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("me/nobody", "me/nobody is neither a folder nor a repository that the"),
        ("nobody", "nobody is not a delta folder: it does not exist"),
        ("a/b/c", "a/b/c is not a delta folder: it does not exist"),
    ],
)
def test_what_is_not_on_the_hub(hub, tmp_path, name, message):
    error_of(inspect(hub, tmp_path, name), message)


def test_a_hub_that_cannot_be_asked(hub, tmp_path):
    done = inspect(hub, tmp_path, "me/mine", HF_HUB_OFFLINE="1")
    error_of(done, "me/mine is not a folder, and the Hugging Face Hub could not be")
    done = inspect(hub, tmp_path, "me/mine", HF_ENDPOINT="http://127.0.0.1:9")
    error_of(done, "me/mine is not a folder, and the Hugging Face Hub could not be")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("delta_config.json", None, "is not a delta: it does not have delta_config"),
        ("delta_config.json", b"{", "me/mine/delta_config.json is not valid JSON"),
        ("delta_model.safetensors.index.json", None, "me/mine is not a delta folder"),
        ("delta_model-00001-of-00002.safetensors", b"{}", "readable safetensors file"),
        ("delta_model-00002-of-00002.safetensors", None, "names missing files"),
    ],
)
def test_what_is_not_a_delta(hub, tmp_path, file, content, message):
    if content is None:
        (hub.folder / file).unlink()
    else:
        (hub.folder / file).write_bytes(content)
    error_of(inspect(hub, tmp_path, "me/mine"), message)


def error_of(done, message):
    """One line, exit code 1."""
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("dqrelo: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1 and str(Path("/tmp")) not in done.stderr
