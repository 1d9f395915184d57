# SPDX-License-Identifier: Apache-2.0
"""The files that a delta takes from its fine-tune: tokenizer and generation config."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.generation_config import (
    MOST_INT,
    TOKENS,
    read_generation_config,
)
from vllm_dqrelo.format.json_file import parsed_json
from vllm_dqrelo.format.regular_file import read_bytes
from vllm_dqrelo.format.side_files import (
    GENERATION_CONFIG,
    TOKENIZER_FILES,
    VOCABULARIES,
)
from vllm_dqrelo.format.tokenizer import MOST_BYTES, folder_of, try_tokenizer

logger = logging.getLogger(__name__)

TEMPLATE = "chat_template.json"  # of older versions of transformers, for images
PROCESSOR = "processor_config.json"
IMAGE_FILES = ("preprocessor_config.json", PROCESSOR)


def side_files(base: Path, model: Path, vocabulary: int | None) -> dict[str, bytes]:
    """The tokenizer and the generation config that a fine-tune has of its own.

    A tokenizer is all of its files: mixed with the base's, it would be neither's. A
    fine-tune without any is used with the base's.

    Args:
        base, model: their folders.
        vocabulary: how many tokens the fine-tune has, if its config.json says so.

    Returns:
        Content by file name, checked as a server does.

    Raises:
        DqreloError: a server would refuse one of the files.
    """
    vocabulary = vocabulary or MOST_INT
    own = files_of(model, TOKENIZER_FILES)
    files = {}
    if own and not same_files(own, files_of(base, TOKENIZER_FILES)):
        if own.keys().isdisjoint(VOCABULARIES):
            raise DqreloError(
                f"{model} has {', '.join(own)}, but not the tokenizer that belongs to "
                f"them: expected one of {', '.join(VOCABULARIES)}. Copy the files of "
                f"the base's tokenizer into {model}, or remove {', '.join(own)} to use "
                "the base's tokenizer"
            )
        files = {name: read_bytes(path, MOST_BYTES) for name, path in own.items()}
        check_tokenizer(files, base, model, vocabulary)
    config = generation_config(model)
    if config is not None and config != generation_config(base):
        path = model / GENERATION_CONFIG
        if path.exists():
            content, where = read_bytes(path, MOST_BYTES), path
        else:
            content = (json.dumps(config, indent=2) + "\n").encode()
            where = model / "config.json"
        read_generation_config(content, str(where), vocabulary)
        files[GENERATION_CONFIG] = content
    return files


def check_tokenizer(
    files: dict[str, bytes], base: Path, model: Path, vocabulary: int
) -> None:
    """Refuse a tokenizer that cannot be used, or has tokens that the model has not."""
    with folder_of(files, base) as folder:
        highest = try_tokenizer(folder, model)
        if highest is None or highest < vocabulary:
            return
    with folder_of(read_all(base, TOKENIZER_FILES), base) as folder:
        of_base = try_tokenizer(folder, base)
    if of_base is None or highest > of_base:
        raise DqreloError(
            f"{model} has a tokenizer with tokens up to {highest}, but the model has "
            f"them up to {vocabulary - 1} only. Call resize_token_embeddings("
            f"{highest + 1}) of transformers before training, or save the tokenizer "
            "that the model was trained with"
        )


def warn_of_images(base: Path, model: Path) -> None:
    """Say what of a fine-tune's image processor a delta does not keep."""
    template, others = (files_of(folder, [TEMPLATE]) for folder in (model, base))
    if template and not same_files(template, others):
        logger.warning(
            "%s is left out: save the template as chat_template.jinja, which a delta "
            "keeps with the tokenizer",
            template[TEMPLATE],
        )
    own, old = image_settings(model), image_settings(base)
    names = sorted(own.keys() & old.keys())
    changed = [f"{k} {own[k]}, not {old[k]}" for k in names if own[k] != old[k]]
    if changed:
        logger.warning(
            "the fine-tune prepares images otherwise than the base (%s): a server "
            "prepares them as the base does",
            "; ".join(changed),
        )


def image_settings(folder: Path) -> dict[str, Any]:
    """How a model prepares images, without the names of what code does so."""
    settings: dict[str, Any] = {}
    for name, path in files_of(folder, IMAGE_FILES).items():
        value = parsed(path)
        nested = value.get("image_processor")
        if name == PROCESSOR:  # the present transformers has them in there
            value = nested if isinstance(nested, dict) else {}
        settings |= value
    return {k: v for k, v in settings.items() if not k.endswith(("_type", "_class"))}


def files_of(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Those of the files that are there, by name."""
    return {name: path for name in names if (path := folder / name).exists()}


def read_all(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The content of those of the files that are there."""
    paths = files_of(folder, names)
    return {name: read_bytes(path, MOST_BYTES) for name, path in paths.items()}


def same_files(some: dict[str, Path], others: dict[str, Path]) -> bool:
    """Whether two folders have the same of these files, with the same content."""
    return some.keys() == others.keys() and all(
        same_content(some[name], others[name]) for name in some
    )


def generation_config(folder: Path) -> dict[str, Any] | None:
    """How a model generates: its generation_config.json, or what config.json says."""
    if (path := folder / GENERATION_CONFIG).exists():
        return parsed(path)
    if not (path := folder / "config.json").exists():
        return None  # an adapter
    config = parsed(path)
    return {key: config[key] for key in TOKENS if config.get(key) is not None}


def same_content(one: Path, other: Path) -> bool:
    """Equal bytes, or equal JSON (but for the version of what wrote it)."""
    if one.suffix != ".json":
        return read_bytes(one, MOST_BYTES) == read_bytes(other, MOST_BYTES)
    return parsed(one) == parsed(other)


def parsed(path: Path) -> dict[str, Any]:
    """A JSON file, without the version of what wrote it."""
    value = parsed_json(read_bytes(path, MOST_BYTES), str(path))
    if not isinstance(value, dict):
        raise DqreloError(f"{path} is not a JSON object")
    value.pop("transformers_version", None)
    return value
