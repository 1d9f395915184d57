# SPDX-License-Identifier: Apache-2.0
"""A delta folder goes to the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from vllm_dqrelo.format.errors import DqreloError

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
