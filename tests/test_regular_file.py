# SPDX-License-Identifier: Apache-2.0
"""Pipes, devices and folders in the place of files: an error, and at once."""

import os
import socket

import pytest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.json_file import read_json
from vllm_dqrelo.format.regular_file import read_bytes
from vllm_dqrelo.format.tensor_file import TensorFile

READERS = [lambda path: read_bytes(path, 9), read_json, TensorFile]


@pytest.fixture(params=["pipe", "folder", "socket", "device"])
def odd(request, tmp_path, monkeypatch):
    """A path that is there, and not a regular file."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.json"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("read", READERS)
def test_what_is_no_regular_file_is_refused(odd, read):
    with pytest.raises(
        DqreloError, match=r"file\.json (is not a regular|cannot be re)"
    ):
        read(odd)


def test_what_is_too_large_or_missing(tmp_path):
    path = tmp_path / "file.json"
    with pytest.raises(FileNotFoundError):
        read_bytes(path, 9)
    path.symlink_to("nothing")
    with pytest.raises(DqreloError, match="is a link to a file that is missing"):
        read_bytes(path, 9)
    path.unlink()
    path.write_bytes(b"[1, 2, 3]")
    assert read_bytes(path, 9) == b"[1, 2, 3]"
    with pytest.raises(DqreloError, match="has 9 bytes; expected at most 8"):
        read_bytes(path, 8)
    os.truncate(path, 2**33)
    with pytest.raises(DqreloError, match="expected at most"):
        read_json(path)
