# SPDX-License-Identifier: Apache-2.0
"""The ways in which ``fuzz.py`` spoils a delta folder."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from vllm_dqrelo.format.config import CONFIG_NAME, DeltaConfig
from vllm_dqrelo.format.delta import weight_files, write_delta

INDEX = "delta_model.safetensors.index.json"
DTYPES = ["BOOL", "U8", "I8", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32"]
DTYPES += ["F32", "F64", "I64", "U64", "C64", "F4", "X9", "", "f32"]
TORCH_DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16]
TORCH_DTYPES += [torch.bfloat16, torch.int32, torch.float32, torch.float64, torch.int64]
NUMBERS = [0, -1, 1, 2, 7, 255, 2**31, 2**40, 2**62, 2**63, 10**30, 0.5, -(2**63)]
VALUES: list[Any] = [None, True, "", "x", "sha256:", "\0", "\ud800", [], {}, [1], 1e308]
VALUES += [*NUMBERS, float("nan"), float("inf"), "x" * 100_000, {"a": {"b": []}}]
NAMES = [
    "",
    "x",
    "_shape",
    "_packed",
    "x_lora_A",
    "x_scale_scale",
    "../x",
    "model.norm",
]
NAMES += ["model.layers.9.mlp.up_proj.weight", "model.norm.weight_added", "\u202e"]
NAMES += ["model.layers.0.self_attn.qkv_proj.weight", "model.norm.bias", "x" * 5000]
NAMES += ["model.layers.0.self_attn.q_proj.weight_added", "lm_head.weight_added"]
NAMES += ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.embed_tokens.bias"]


class Case:
    """A folder to be spoiled: a copy of a sound delta, and chance."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.config, self.weights = folder / CONFIG_NAME, weight_files(folder)[0]

    def pick(self, choices: Any) -> Any:
        """One of them."""
        return self.rng.choice(list(choices))

    def edit_config(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the parsed delta_config.json."""
        raw = json.loads(self.config.read_text())
        change(raw)
        self.config.write_text(json.dumps(raw))

    def edit_header(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the parsed header of the tensors' file; the data stay in place."""
        content = self.weights.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        data = content[8 + size :]
        self.weights.write_bytes(struct.pack("<Q", len(text)) + text + data)

    def edit_tensors(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the tensors, and make the digest that of the result."""
        config, tensors = DeltaConfig.read(self.folder), load_all(self.folder)
        change(tensors)
        for file in self.folder.glob("delta_*"):
            file.unlink()
        write_delta(self.folder, config, tensors)

    def entry(self, header: dict[str, Any]) -> dict[str, Any]:
        """The header's entry of some tensor."""
        return header[self.pick(sorted(header.keys() - {"__metadata__"}))]


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a sound delta."""
    return {
        k: v
        for file in weight_files(folder)
        # load_file of safetensors 0.8.0 keeps 64 bytes a tensor for good.
        for k, v in sorted(load(file.read_bytes()).items())
    }


# The ways to spoil a folder; a docstring each, because the table prints them.


def config_value(case: Case) -> None:
    """delta_config.json: another value"""
    case.edit_config(lambda raw: raw.update({case.pick(raw): case.pick(VALUES)}))


def config_keys(case: Case) -> None:
    """delta_config.json: a key less or more"""

    def change(raw: dict[str, Any]) -> None:
        if case.rng.random() < 0.5:
            del raw[case.pick(raw)]
        else:
            raw[case.pick(("extra", "", "__class__", "Digest"))] = case.pick(VALUES)

    case.edit_config(change)


def config_text(case: Case) -> None:
    """delta_config.json: not JSON, not text, nested, huge, no file"""
    text = case.config.read_bytes()
    at = case.rng.randrange(len(text))
    deep = case.pick((1_000, 100_000))
    content = [
        text[:at],
        b"",
        b"[]",
        b"null",
        b"\xff\xfe" + text,
        text.decode().encode("utf-16"),
        text[:at] + bytes([case.rng.randrange(256)]) + text[at + 1 :],
        text + text,
        b"[" * deep,
        b"[" * deep + b"]" * deep,
        b'{"a":' * deep + b"1" + b"}" * deep,
        b'{"ratio": ' + b"9" * deep + b"}",
    ]
    chosen = case.rng.randrange(len(content) + 2)
    case.config.unlink()
    if chosen < len(content):
        case.config.write_bytes(content[chosen])
    elif chosen == len(content):
        case.config.mkdir()
    else:
        sparse(case.config, 2**33)


def header_dtype(case: Case) -> None:
    """safetensors header: another dtype"""
    case.edit_header(lambda h: case.entry(h).update(dtype=case.pick(DTYPES)))


def header_shape(case: Case) -> None:
    """safetensors header: another shape, huge, negative, nested"""

    def change(header: dict[str, Any]) -> None:
        entry = case.entry(header)
        shape = list(entry["shape"])
        number = case.pick(NUMBERS)
        if shape:
            shape[case.rng.randrange(len(shape))] = number
        others = [shape, shape[::-1], [*shape, 1], shape * 2, [[1]], None, number, []]
        entry["shape"] = case.pick(others)

    case.edit_header(change)


def header_offsets(case: Case) -> None:
    """safetensors header: offsets that overlap, run backwards, leave the file"""

    def change(header: dict[str, Any]) -> None:
        entry = case.entry(header)
        start, end = entry["data_offsets"]
        other = case.pick(NUMBERS)
        choices = [
            [end, start],
            [start, other],
            [other, end],
            [start],
            [start, end + 8],
        ]
        choices += [case.entry(header)["data_offsets"], None, {}, [start + 1, end + 1]]
        entry["data_offsets"] = case.pick(choices)

    case.edit_header(change)


def header_names(case: Case) -> None:
    """safetensors header: a tensor renamed, missing, added, twice"""

    def change(header: dict[str, Any]) -> None:
        name = case.pick(header.keys() - {"__metadata__"})
        chosen = case.rng.randrange(4)
        if chosen == 0:
            header[case.pick(NAMES)] = header.pop(name)
        elif chosen == 1:
            del header[name]
        elif chosen == 2:
            header[case.pick(NAMES)] = header[name]
        else:
            header["__metadata__"] = case.pick(VALUES)

    case.edit_header(change)


def header_text(case: Case) -> None:
    """safetensors header: another length, not JSON, nested"""
    content = case.weights.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    chosen = case.rng.randrange(4)
    if chosen == 0:
        number = case.rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1])
        case.weights.write_bytes(struct.pack("<Q", number) + content[8:])
        return
    deep = case.pick((200, 100_000))
    texts = [b'{"a":' * deep + b"1" + b"}" * deep, b"[" * deep, b"\xff" * size]
    text = texts[chosen - 1]
    case.weights.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def bytes_changed(case: Case) -> None:
    """tensors' file: bytes changed"""
    content = bytearray(case.weights.read_bytes())
    for _ in range(case.pick((1, 1, 4, 100))):
        content[case.rng.randrange(len(content))] = case.rng.randrange(256)
    case.weights.write_bytes(content)


def file_cut(case: Case) -> None:
    """tensors' file: truncated, longer, empty, huge and sparse"""
    size = case.weights.stat().st_size
    chosen = case.rng.randrange(4)
    if chosen == 0:
        os.truncate(case.weights, case.rng.randrange(size))
    elif chosen == 1:
        with case.weights.open("ab") as file:
            file.write(bytes(case.rng.randrange(1, 100)))
    elif chosen == 2:
        case.weights.write_bytes(b"")
    else:
        declare(case, 2**40)


def declare(case: Case, size: int) -> None:
    """A sound header that declares a tensor of so many bytes, in a sparse file."""
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    name = case.pick(("model.norm.weight", "model.norm.weight_packed"))
    text = json.dumps({name: entry}).encode()
    case.weights.write_bytes(struct.pack("<Q", len(text)) + text)
    sparse(case.weights, 8 + len(text) + size)


def sparse(path: Path, size: int) -> None:
    """Make a file as long as that, of zeros that take no room."""
    path.touch()
    os.truncate(path, size)


def folder_entries(case: Case) -> None:
    """folder: links, pipes, folders in the place of files, files missing"""
    path = case.pick((case.config, case.weights))
    path.unlink()
    chosen = case.rng.randrange(8)
    targets = [path, Path("/dev/zero"), Path("/dev/null"), Path("/proc/self/maps")]
    targets += [case.folder, Path("/nowhere")]
    if chosen < len(targets):
        path.symlink_to(targets[chosen])
    elif chosen == len(targets):
        os.mkfifo(path)


def wrong_digest(case: Case) -> None:
    """wrong digest or fingerprint"""
    key = case.pick(("digest", "base_fingerprint"))
    other = f"sha256:{case.rng.getrandbits(256):064x}"
    case.edit_config(lambda raw: raw.update({key: case.pick((other, other[7:], ""))}))


def index_text(case: Case) -> None:
    """shards: an index that is not one, leaves the folder, or is wrong"""
    index = case.folder / INDEX
    raw = json.loads(index.read_text())
    names, files = list(raw["weight_map"]), sorted(set(raw["weight_map"].values()))
    name = case.pick(names)
    outside = case.folder.parent / f"outside-{files[0]}"
    shutil.copy(case.folder / files[0], outside)
    others = [*files, "../" + outside.name, str(outside), ".", "", "\0", 3, None, INDEX]
    changes: list[Callable[[], object]] = [
        lambda: raw["weight_map"].update({name: case.pick(others)}),
        lambda: raw["weight_map"].pop(name),
        lambda: raw["weight_map"].update({case.pick(NAMES): files[0]}),
        lambda: raw.update(weight_map=case.pick(VALUES)),
        lambda: raw.pop("weight_map"),
        lambda: (case.folder / case.pick(files)).unlink(),
        lambda: raw["weight_map"].update(dict.fromkeys(names, "../" + outside.name)),
    ]
    case.pick(changes)()
    texts = [json.dumps(raw)] * 8 + ["", "[]", "null", "[" * 100_000, '{"weight_map"']
    index.write_text(case.pick(texts))


def tensor_value(case: Case) -> None:
    """sound digest: NaN or infinity"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        floats = [k for k, v in tensors.items() if v.is_floating_point()]
        tensor = tensors[case.pick(floats)]
        value = case.pick((float("nan"), float("inf"), -float("inf")))
        tensor.view(-1)[case.rng.randrange(tensor.numel())] = value

    case.edit_tensors(change)


def tensor_shape(case: Case) -> None:
    """sound digest: a tensor of another shape"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = case.pick(tensors)
        tensor = tensors[name]
        others = [tensor[None], tensor[:0], tensor.flatten()[:1], tensor.flatten()]
        others += [torch.cat((tensor, tensor)), tensor[:-1], tensor.flatten()[0]]
        if tensor.ndim == 2:
            others += [tensor.T, tensor[:, :-1], tensor[:, :1], tensor[:, :0]]
        others = [o for o in others if o.shape != tensor.shape]
        tensors[name] = case.pick(others).clone()

    case.edit_tensors(change)


def tensor_dtype(case: Case) -> None:
    """sound digest: a tensor of another dtype"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = case.pick(tensors)
        tensors[name] = tensors[name].to(case.pick(TORCH_DTYPES))

    case.edit_tensors(change)


def tensor_names(case: Case) -> None:
    """sound digest: a tensor missing, renamed, added"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = case.pick(tensors)
        chosen = case.rng.randrange(3)
        new = case.pick([*NAMES, case.pick(tensors) + "_added"]) or "empty"
        if chosen == 0:
            del tensors[name]
        elif chosen == 1:
            tensors[new] = tensors.pop(name)
        else:
            tensors[new] = tensors[name].clone()

    case.edit_tensors(change)


def matrix_shape(case: Case) -> None:
    """sound digest: P_shape says something else"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = case.pick(k for k in tensors if k.endswith("_shape"))
        n, k = tensors[name].tolist()
        pairs = [(k, n), (n + 1, k), (n, k + 1), (0, k), (n, 0), (-n, k), (n, 2**62)]
        pairs += [(2**40, 2**40), (-(2**63), k), (n, k - 1), (1, 1)]
        tensors[name] = torch.tensor(case.pick(p for p in pairs if p != (n, k)))

    case.edit_tensors(change)


def other_numbers(case: Case) -> None:
    """sound digest: other finite numbers, as large as they get"""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors[case.pick(k for k in tensors if not k.endswith("_shape"))]
        kind = torch.finfo if tensor.is_floating_point() else torch.iinfo
        limits = kind(tensor.dtype)
        value = case.pick((limits.min, limits.max, 0, 1))
        tensor.view(-1)[case.rng.randrange(tensor.numel())] = value

    case.edit_tensors(change)


MUTATIONS = [config_value, config_keys, config_text, wrong_digest]
MUTATIONS += [header_dtype, header_shape, header_offsets, header_names, header_text]
MUTATIONS += [bytes_changed, file_cut, folder_entries, index_text]
MUTATIONS += [tensor_value, tensor_shape, tensor_dtype, tensor_names, matrix_shape]
MUTATIONS += [other_numbers]
