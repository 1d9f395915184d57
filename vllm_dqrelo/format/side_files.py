# SPDX-License-Identifier: Apache-2.0
"""What a model has besides its weights: a tokenizer and a generation config."""

# They belong together: a delta has all of its own, or its base's.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one is needed
GENERATION_CONFIG = "generation_config.json"
