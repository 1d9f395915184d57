# SPDX-License-Identifier: Apache-2.0
"""A catalogue of deltas: good ones, and some that would have stopped a whole server."""

import os
import shutil

from transformers import PreTrainedTokenizerFast

LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
# Deltas that would have stopped the whole server: file, content (None: a pipe), reason.
SETTINGS = "generation_config.json"
BAD = {
    "z-text": (SETTINGS, '{"eos_token_id": "2"}', "eos_token_id is '2'"),
    "z-float": (SETTINGS, '{"eos_token_id": 3.0}', "eos_token_id is 3.0"),
    "z-bool": (SETTINGS, '{"eos_token_id": true}', "eos_token_id is True"),
    "z-far": (SETTINGS, '{"eos_token_id": [2, 999999]}', "eos_token_id is .2, 999999"),
    "z-nested": (SETTINGS, '{"eos_token_id": [[2]]}', "eos_token_id is ..2"),
    "z-nan": (SETTINGS, '{"temperature": NaN}', "temperature is nan"),
    "z-negative": (SETTINGS, '{"max_new_tokens": -1}', "max_new_tokens is -1"),
    "z-torn": (SETTINGS, "{", "is not valid JSON"),
    "z-pipe": ("tokenizer.json", None, "is not a regular file"),
    "z-config-pipe": ("delta_config.json", None, "is not a regular file"),
    "z-weights-pipe": ("delta_model.safetensors", None, "is not a regular file"),
    "z-loop": ("chat_template.jinja", LOOP, "more time than is allowed"),
    "z-large": ("chat_template.jinja", "{{ 'a' * 10 ** 11 }}", "bytes of memory"),
    "z-syntax": ("chat_template.jinja", "{% if %}", "cannot be used"),
}


def fill(root, family, own):
    """Put good and bad deltas of ``family("llama")``'s base into a folder."""
    made = family("llama")
    shutil.copytree(own.delta, root / "own")
    shutil.copytree(made.deltas[1], root / "plain")
    shutil.copytree(family("llama-tied").deltas[0], root / "foreign")
    (root / "link").symlink_to(made.deltas[2])
    shutil.copytree(made.deltas[1], root / "flipped")
    weights = root / "flipped" / "delta_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    shutil.copytree(own.delta, root / "wordless")
    (root / "wordless" / "tokenizer.json").unlink()
    (root / "notes").mkdir()
    for name, (file, content, _) in BAD.items():
        shutil.copytree(own.delta, root / name)
        (root / name / file).unlink(missing_ok=True)
        if content is None:
            os.mkfifo(root / name / file)
        else:
            (root / name / file).write_text(content)
    shutil.copytree(own.delta, root / "padded")
    padded_tokenizer().save_pretrained(root / "padded")
    (root / os.fsdecode(b"no-text-\xff")).mkdir()
    (root / "z-circle").mkdir()
    (root / "z-circle" / "delta_config.json").symlink_to("delta_config.json")


def padded_tokenizer():
    """With tokens for a half of the model's; vLLM fails on the logprobs of others."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {f"▁w{i}": i for i in range(160)}
    made = Tokenizer(models.WordLevel(words, unk_token="▁w0"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template="w1")
