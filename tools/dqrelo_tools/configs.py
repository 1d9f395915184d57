# SPDX-License-Identifier: Apache-2.0
"""Whether two config.json say that two models compute the same."""

from typing import Any

# What a config.json may say differently without the model computing otherwise.
BOOKKEEPING = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",  # of the base, which is read as what it stands for
    "tie_word_embeddings",  # convert.py stores an LM head that only one of them has
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "vocab_size",  # added tokens are stored; see pair.py
}


def config_differences(base: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Keys of config.json that make the two compute differently."""
    old, own = computing(base), computing(model)
    return [
        f"config.json: {key} is {own.get(key)!r}, the base has {old.get(key)!r}"
        for key in sorted(old.keys() | own.keys())
        if old.get(key) != own.get(key)
    ]


def computing(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that says how to compute, text_config's included."""
    return {
        key: computing(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in BOOKKEEPING
    }


def vocabulary(config: dict[str, Any]) -> int | None:
    """The rows of the embedding, as a config.json has it."""
    return config.get("text_config", config).get("vocab_size")
