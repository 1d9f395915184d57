# SPDX-License-Identifier: Apache-2.0
"""A delta folder goes to the Hugging Face Hub; its headers come from there."""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.utils import HFValidationError, validate_repo_id
from tqdm import tqdm

from vllm_dqrelo.format.config import CONFIG_NAME
from vllm_dqrelo.format.delta import MODEL
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensor_file import MOST_HEADER, TensorFile
from vllm_dqrelo.format.tensors import SHAPE

BLOCK = 2**20  # bytes that one request asks for at least

# Which errors the Hub's client raises depends on its version (requests or httpx).


def require_access(repo_id: str) -> None:
    """Refuse what would fail after a long conversion: the name, or a missing token.

    Raises:
        DqreloError: says which, and what to do.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise DqreloError(f"--push-to-hub {repo_id}: {error}") from error
    try:
        HfApi().whoami()
    except Exception as error:
        raise DqreloError(
            f"--push-to-hub: the Hugging Face Hub did not accept a token ({error}). "
            "Run hf auth login, or set HF_TOKEN"
        ) from error


def push(folder: Path, repo_id: str, private: bool) -> str:
    """Upload a delta folder, into a new repository if need be.

    Args:
        folder: of the delta; kept as it is, whatever happens.
        repo_id: NAME or OWNER/NAME.
        private: of a new repository; one that exists is left as it is.

    Returns:
        The address of the repository.

    Raises:
        DqreloError: it failed; says how to go on.
    """
    api = HfApi()
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message="Upload delta"
        )
    except Exception as error:
        options = ["--private"] if private else []
        command = shlex.join(["hf", "upload", repo_id, str(folder), ".", *options])
        raise DqreloError(
            f"{folder} is written, but was not uploaded to {repo_id}: {error}\n"
            f"Push it again with: {command}"
        ) from error
    return repo.url


def is_repo_id(text: str) -> bool:
    """Whether it is OWNER/NAME, as repositories of the Hub are called."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def fetch_headers(repo_id: str, folder: Path) -> None:
    """Fetch what a delta on the Hub consists of, without its tensors.

    Semantics: ``folder`` gets a file for each one of the repository. delta_config.json
    and the index of shards are whole. A file of tensors has its size, its header and
    the shapes of matrices, and zeros elsewhere, which take no space on most disks.
    Other files are empty.

    Args:
        repo_id: OWNER/NAME.
        folder: exists and is empty.

    Raises:
        DqreloError: the Hub or the repository cannot be reached, or the repository does
            not hold a delta.
    """
    hub = HfFileSystem()
    try:
        entries: list[Any] = hub.ls(repo_id, detail=True)
        found = {Path(entry["name"]).name: entry for entry in entries}
        if CONFIG_NAME not in found:
            raise DqreloError(
                f"{repo_id} on the Hugging Face Hub is not a delta: it does not have "
                f"{CONFIG_NAME}"
            )
        for name in tqdm(found, "inspect", unit=" files", leave=False, disable=None):
            path, remote = folder / name, found[name]["name"]
            if name.startswith(MODEL) and name.endswith(".safetensors"):
                _fetch_header(hub, remote, found[name]["size"], path)
            elif name == CONFIG_NAME or name.startswith(MODEL):
                path.write_bytes(hub.cat_file(remote))
            else:
                path.touch()
    except DqreloError as error:
        raise DqreloError(str(error).replace(str(folder), repo_id)) from error
    except FileNotFoundError as error:
        raise DqreloError(
            f"{repo_id} is neither a folder nor a repository that the Hugging Face Hub "
            "shows to you. Check the name; for a private one run hf auth login"
        ) from error
    except Exception as error:
        raise DqreloError(
            f"{repo_id} is not a folder, and the Hugging Face Hub could not be asked "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}). Try again"
        ) from error


def _fetch_header(hub: HfFileSystem, remote: str, size: int, path: Path) -> None:
    """Fetch the header of a file of tensors, and the shapes of matrices."""
    with hub.open(remote, "rb", block_size=BLOCK) as source, path.open("wb") as file:
        start = source.read(8)
        file.write(start)
        length = int.from_bytes(start, "little")
        file.write(source.read(min(length, MOST_HEADER, size)))
        file.truncate(size)
        for name, (_, shape, first) in TensorFile(path).tensors.items():
            if name.endswith(SHAPE) and shape == [2]:
                source.seek(first)
                file.seek(first)
                file.write(source.read(2 * 8))
