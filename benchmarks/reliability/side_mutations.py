# SPDX-License-Identifier: Apache-2.0
"""The ways in which ``fuzz_server.py`` spoils the files beside a delta's tensors."""

import json
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reliability.mutations import VALUES, sparse
from vllm_dqrelo.format.generation_config import PARAMETERS, TOKENS
from vllm_dqrelo.format.side_files import GENERATION_CONFIG, TOKENIZER_FILES

NUMBERS: list[Any] = [0, 1, -1, 2, 319, 320, 2**31, 2**32 - 1, 2**63, 10**400, 1e308]
NUMBERS += [0.5, 2.0, True, False, None, "2", "0.7", float("nan"), float("-inf")]
NUMBERS += [[2], [[2]], [2, 999_999], ["2"], [3.0], [True], [2] * 100_000, {"2": 2}, []]
LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
DEEP = "{% if true %}" * 500 + "{% endif %}" * 500
DOUBLED = "{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
PROGRAMS = [
    LOOP,
    "{{ 'a' * 10 ** 11 }}",
    "{{ 'a' * 10 ** 6 }}",
    "{{ 7 ** 9 ** 9 }}",
    "{% set n = namespace(x='ab') %}" + DOUBLED + "{{ n.x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(99) }}",
    "{{ lipsum(n=10 ** 7) }}",
    "{{ range(10 ** 9) | list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ strftime_now('%Y' * 10 ** 7) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception('x' * 10 ** 7) }}",
    "{{ missing.attribute }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{{ messages.append(1) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{% generation %}{% endgeneration %}",
    "{% break %}",
    DEEP,
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ '\ud83d\ude00\u0000\u202e' }}",
    "",
]
SOME = [
    "{{% if messages[0]['role'] == 'system' %}}{}{{% endif %}}w7",
    "{{% if messages | length > 3 %}}{}{{% endif %}}w7",
    "{{% if tools %}}{}{{% endif %}}w7",
    "{{% if 'Sing' in messages[-1]['content'] %}}{}{{% endif %}}w7",
]
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b"\0" * 1000]
TEXTS += [b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b"w1 w2\n" * 1000, b'"x"', b"5"]
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "a"},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 1000},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Prepend", "prepend": "a" * 10**6},
        {"type": "Sequence", "normalizers": [{"type": "NFKC"}] * 1000},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "pre_tokenizer": [
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        {"type": "Metaspace", "replacement": "long", "prepend_scheme": "always"},
        {"type": "FixedLength", "length": 0},
        {"type": "Nothing"},
    ],
    "post_processor": [
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
            "pair": [],
            "special_tokens": {"x": {"id": "x", "ids": [10**9], "tokens": ["x"]}},
        },
        {"type": "RobertaProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 10**9]},
    ],
    "decoder": [
        {"type": "Replace", "pattern": {"String": ""}, "content": "y" * 10**6},
        {"type": "Strip", "content": "w", "start": 10**9, "stop": 10**9},
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
        {"type": "ByteFallback"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}] * 1000},
        {"type": "ByteLevel"},
    ],
    "padding": [
        {
            "strategy": {"Fixed": 10**12},
            "direction": "Left",
            "pad_id": 10**9,
            "pad_type_id": 0,
            "pad_token": "x",
        }
    ],
    "truncation": [
        {"max_length": 0, "stride": 0, "strategy": "LongestFirst"},
        {"max_length": 1, "stride": 9, "strategy": "OnlySecond", "direction": "Left"},
    ],
    "added_tokens": [
        [{"id": 10**9, "content": "far", "special": True}],
        [{"id": 5, "content": "", "special": True}],
        [{"id": 400, "content": "w1", "special": False}],
    ],
    "model": [
        {"type": "WordLevel", "vocab": {}, "unk_token": "x"},
        {"type": "WordLevel", "vocab": {"w0": 2**32 - 1}, "unk_token": "w0"},
        {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 10**9},
        {"type": "Unigram", "vocab": [["", float("nan")]], "unk_id": 0},
        {"type": "Unigram", "vocab": [], "unk_id": None},
        {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 0},
        {"type": "Nothing"},
    ],
}
CLASSES = ["LlamaTokenizer", "GPT2Tokenizer", "T5TokenizerFast", "BertTokenizer"]
CLASSES += ["ByT5Tokenizer", "CanineTokenizer", "WhisperTokenizer", "NotATokenizer", 5]
CONFIG: dict[str, list[Any]] = {
    "tokenizer_class": CLASSES,
    "auto_map": [{"AutoTokenizer": ["a.B", None]}, {"AutoTokenizer": "x"}, 3],
    "chat_template": [5, {}, {"default": 5}, [{"name": "default"}], [], LOOP, "{%"],
    "eos_token": [5, "nothing", {"content": "w1"}, ["w1"], {"__type": "AddedToken"}],
    "pad_token": ["new token", None, True],
    "added_tokens_decoder": [{"999": {"content": "x"}}, {"x": 1}, {"5": {}}, []],
    "extra_special_tokens": [{"a": 1}, ["x"] * 100, "w1", {"eos_token": "w2"}],
    "model_max_length": [-1, 0, "x", 10**30, 1e308],
    "vocab_file": ["/dev/zero", "/etc/passwd", "../x"],
    "tokenizer_file": ["/dev/zero", "/proc/self/mem"],
    "init_inputs": [[1, 2, 3], ["/dev/zero"]],
    "clean_up_tokenization_spaces": ["x"],
    "model_input_names": [5, ["x"]],
    "padding_side": ["up"],
}


class SideCase:
    """A folder to be spoiled: a copy of a sound delta, and chance."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng

    def pick(self, choices: Any) -> Any:
        """One of them."""
        return self.rng.choice(list(choices))

    def edit(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a parsed file."""
        path = self.folder / name
        raw = json.loads(path.read_text())
        change(raw)
        path.write_text(json.dumps(raw))

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file anew."""
        data = (
            content if isinstance(content, bytes) else content.encode(errors="replace")
        )
        (self.folder / name).write_bytes(data)


# The ways to spoil a folder; a docstring each, because the table prints them.


def settings_value(case: SideCase) -> None:
    """generation_config.json: another value"""
    key = case.pick([*TOKENS, *PARAMETERS])
    case.edit(
        GENERATION_CONFIG, lambda raw: raw.update({key: case.pick(NUMBERS + VALUES)})
    )


def settings_tokens(case: SideCase) -> None:
    """generation_config.json: tokens that end an answer"""
    values = [case.pick(NUMBERS), [case.pick([2, 3, 320, -1, "2", 3.0, True, [2]])]]
    case.edit(GENERATION_CONFIG, lambda raw: raw.update(eos_token_id=case.pick(values)))


def settings_text(case: SideCase) -> None:
    """generation_config.json: not JSON, not an object, nested, huge"""
    case.write(GENERATION_CONFIG, case.pick([*TEXTS, b" " * 2**21]))


def tokenizer_value(case: SideCase) -> None:
    """tokenizer.json: another value anywhere"""

    def change(raw: Any) -> None:
        at = raw
        while True:
            key = case.pick(at if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key]:
                break
            if case.rng.random() < 0.2:
                break
            at = at[key]
        at[key] = case.pick(VALUES + NUMBERS)

    case.edit("tokenizer.json", change)


def tokenizer_part(case: SideCase) -> None:
    """tokenizer.json: another model, decoder, normalizer, special tokens"""
    part = case.pick(PARTS)
    case.edit("tokenizer.json", lambda raw: raw.update({part: case.pick(PARTS[part])}))


def tokenizer_vocabulary(case: SideCase) -> None:
    """tokenizer.json: tokens missing, moved, twice, beyond the model's"""

    moved = case.rng.random() < 0.5

    def change(raw: dict[str, Any]) -> None:
        vocabulary = raw["model"]["vocab"]
        for word in case.rng.sample(sorted(vocabulary), case.pick((1, 30, 100))):
            if moved:
                vocabulary[word] = case.pick((0, 5, 319, 319, 320, 2**31))
            else:
                del vocabulary[word]

    case.edit("tokenizer.json", change)


def tokenizer_text(case: SideCase) -> None:
    """tokenizer's files: not JSON, not an object, nested, binary"""
    case.write(case.pick(TOKENIZER_FILES), case.pick(TEXTS))


def tokenizer_config(case: SideCase) -> None:
    """tokenizer_config.json: another class, tokens, paths, templates, code"""
    key = case.pick(CONFIG)
    value = case.pick([*CONFIG[key], case.pick(VALUES)])
    case.edit("tokenizer_config.json", lambda raw: raw.update({key: value}))
    if key == "chat_template":
        (case.folder / "chat_template.jinja").unlink()


def template_program(case: SideCase) -> None:
    """chat_template.jinja: another program"""
    case.write("chat_template.jinja", case.pick(PROGRAMS))


def template_of_some(case: SideCase) -> None:
    """chat_template.jinja: another program, for some conversations"""
    text = case.pick(SOME).format(case.pick(PROGRAMS))
    case.write("chat_template.jinja", text)


def template_text(case: SideCase) -> None:
    """chat_template.jinja: cut, mixed up, not text"""
    text = (case.folder / "chat_template.jinja").read_bytes()
    at, other = (case.rng.randrange(len(text)) for _ in range(2))
    mixed = bytes(case.rng.choices(text, k=len(text)))
    texts = [text[:at], text[at:] + text[:other], mixed, text * 10_000, *TEXTS]
    case.write("chat_template.jinja", case.pick(texts))


def entries(case: SideCase) -> None:
    """side files: links, pipes, sockets, folders, sparse files, none"""
    path = case.folder / case.pick([*TOKENIZER_FILES, GENERATION_CONFIG])
    path.unlink(missing_ok=True)
    chosen = case.rng.randrange(11)
    targets = [path, Path("/dev/zero"), Path("/dev/null"), Path("/proc/self/maps")]
    targets += [case.folder, Path("/nowhere"), case.folder / "delta_config.json"]
    if chosen < len(targets):
        path.symlink_to(targets[chosen])
    elif chosen == len(targets):
        os.mkfifo(path)
    elif chosen == len(targets) + 1:
        path.mkdir()
    elif chosen == len(targets) + 2:
        sparse(path, 2**33)
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)


SIDE_MUTATIONS = [settings_value, settings_tokens, settings_text, tokenizer_value]
SIDE_MUTATIONS += [tokenizer_part, tokenizer_vocabulary, tokenizer_text]
SIDE_MUTATIONS += [tokenizer_config, template_program, template_of_some]
SIDE_MUTATIONS += [template_text, entries]
