# SPDX-License-Identifier: Apache-2.0
"""What a delta says of itself, without its base: a folder, or one on the Hub."""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dqrelo_tools.hub import fetch_headers, is_repo_id
from dqrelo_tools.text_table import text_table
from dqrelo_tools.verify import checked
from vllm_dqrelo.format.checkpoint import SafetensorsFiles, locate
from vllm_dqrelo.format.config import CONFIG_NAME, DeltaConfig
from vllm_dqrelo.format.delta import MODEL, weight_files
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.folder import file_bytes
from vllm_dqrelo.format.tensor_file import DTYPES, text_of
from vllm_dqrelo.format.tensors import INT4, LORA_A, PACKED, SHAPE, group

logger = logging.getLogger(__name__)


def describe(delta: Path) -> dict[str, Any]:
    """List configuration and parameters of a delta.

    The content of a folder is checked. From the Hub come the headers only, unless a
    folder has that name.

    Raises:
        DqreloError: the delta is damaged, or the Hub cannot deliver the delta.
        FileNotFoundError: the delta is not there.
    """
    name = str(delta)
    if delta.exists() or delta.is_symlink() or not is_repo_id(name):
        checked(delta)
        return describe_headers(delta)
    with TemporaryDirectory() as folder:
        fetch_headers(name, Path(folder))
        try:
            description = describe_headers(Path(folder))
        except (DqreloError, FileNotFoundError) as error:
            raise DqreloError(str(error).replace(folder, name)) from error
        except (KeyError, ValueError) as error:
            raise DqreloError(f"{name} is not a sound delta: {error}") from error
    logger.info("%s: the headers were read, the content was not checked", name)
    return description


def describe_headers(folder: Path) -> dict[str, Any]:
    """List configuration and parameters of a folder, whose content is not checked.

    Raises:
        DqreloError: a header is damaged. FileNotFoundError: not a delta folder.
    """
    config = DeltaConfig.read(folder)
    files = SafetensorsFiles(locate(folder, MODEL))
    matrices, exact = group(files)
    return {
        **config.to_dict(),
        "bytes": file_bytes(weight_files(folder)),
        "matrices": {
            name: _matrix(files, name, suffixes) for name, suffixes in matrices.items()
        },
        "exact": {name: files.spec(name)[1] for name in exact},
        "other_files": sorted(
            path.name
            for path in folder.iterdir()
            if path.name != CONFIG_NAME and not path.name.startswith(MODEL)
        ),
    }


def _matrix(files: SafetensorsFiles, name: str, suffixes: set[str]) -> dict[str, Any]:
    """Shape, number of sign planes, rank and dtype of the factors of a matrix."""
    if SHAPE not in suffixes or files.spec(name + SHAPE) != ("I64", [2]):
        raise DqreloError(f"{name}{SHAPE} must be two positive int64")
    planes, rank, dtype = 0, 0, "BF16"
    if PACKED in suffixes:
        planes, _, _ = files.spec(name + PACKED)[1]
    if LORA_A in suffixes:
        dtype, (rank, _) = files.spec(name + LORA_A)
    return {
        "shape": files.get(name + SHAPE).tolist(),
        "planes": planes,
        "rank": rank,
        "factors": "int4" if DTYPES[dtype] == INT4 else text_of(DTYPES[dtype]),
    }


def to_text(description: dict[str, Any]) -> str:
    """The description for people: one line a matrix."""
    facts = [
        (key, f"{value:,}" if key == "bytes" else value)
        for key, value in description.items()
        if not isinstance(value, dict | list)
    ]
    facts += [
        ("exact parameters", len(description["exact"])),
        ("other files", ", ".join(description["other_files"]) or "none"),
    ]
    rows = [("shape", "planes", "rank", "factors", "matrix")]
    for name, matrix in description["matrices"].items():
        shape = " x ".join(map(str, matrix["shape"]))
        rows.append((shape, *(matrix[key] for key in rows[0][1:4]), name))
    return f"{text_table(facts, '<')}\n\n{text_table(rows, '>>>><')}"
