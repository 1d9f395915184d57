# SPDX-License-Identifier: Apache-2.0
import hashlib
import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta, digest, vocabulary_size, write_delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensor_file import DTYPES, nbytes

NAME = "model.layers.0.self_attn.q_proj.weight"
OTHER = "model.layers.0.mlp.up_proj.weight"


def golden_tensors() -> dict[str, torch.Tensor]:
    return {
        f"{NAME}_packed": torch.tensor([[[5], [-32768]]], dtype=torch.int16),
        f"{NAME}_scale": torch.tensor([[0.5, 0.25]]),
        f"{NAME}_shape": torch.tensor([2, 16]),
        f"{NAME}_lora_A": torch.arange(16).reshape(1, 16).to(torch.bfloat16),
        f"{NAME}_lora_B": torch.tensor([[1.0], [-2.0]], dtype=torch.bfloat16),
        f"{OTHER}_shape": torch.tensor([2, 3]),
        f"{OTHER}_lora_A": torch.tensor([[0x90, 0x0F]], dtype=torch.uint8),
        f"{OTHER}_lora_B": torch.tensor([[0x09], [0x06]], dtype=torch.uint8),
        f"{OTHER}_lora_scale": torch.tensor([0.5]),
        "model.norm.weight": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }


def golden_config() -> DeltaConfig:
    return DeltaConfig("base", "sha256:00", "", "dqrelo-paper", 0.125)


@pytest.fixture
def folder(tmp_path):
    write_delta(tmp_path, golden_config(), golden_tensors())
    return tmp_path


def test_golden_config_bytes(folder):
    assert (folder / "delta_config.json").read_text() == (
        "{\n"
        '  "base_fingerprint": "sha256:00",\n'
        '  "base_model_name_or_path": "base",\n'
        '  "digest": "sha256:'
        '1b9ddd5a61e4c3593f18f9bd994e20fc83d7aee90be29366ea419490cbe2846f",\n'
        '  "format_version": 1,\n'
        '  "method": "dqrelo-paper",\n'
        '  "ratio": 0.125\n'
        "}\n"
    )


def test_golden_tensor_bytes(folder):
    raw = (folder / "delta_model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    start, end = header[f"{NAME}_packed"]["data_offsets"]
    assert header[f"{NAME}_packed"]["dtype"] == "I16"
    assert raw[8 + length :][start:end] == b"\x05\x00\x00\x80"
    start, end = header[f"{NAME}_lora_B"]["data_offsets"]
    assert raw[8 + length :][start:end] == b"\x80\x3f\x00\xc0"  # bfloat16 1, -2
    assert {name: spec["dtype"] for name, spec in header.items()} == {
        f"{NAME}_packed": "I16",
        f"{NAME}_scale": "F32",
        f"{NAME}_shape": "I64",
        f"{NAME}_lora_A": "BF16",
        f"{NAME}_lora_B": "BF16",
        f"{OTHER}_shape": "I64",
        f"{OTHER}_lora_A": "U8",
        f"{OTHER}_lora_B": "U8",
        f"{OTHER}_lora_scale": "F32",
        "model.norm.weight": "BF16",
    }


def test_digest_as_documented(folder):
    keys = {
        "base_fingerprint": "sha256:00",
        "base_model_name_or_path": "base",
        "format_version": 1,
        "method": "dqrelo-paper",
        "ratio": 0.125,
    }
    hasher = hashlib.sha256(json.dumps(keys, sort_keys=True).encode() + b"\n")
    raw = {
        f"{OTHER}_lora_A": ["uint8", [1, 2]],
        f"{OTHER}_lora_B": ["uint8", [2, 1]],
        f"{OTHER}_lora_scale": ["float32", [1]],
        f"{OTHER}_shape": ["int64", [2]],
        f"{NAME}_lora_A": ["bfloat16", [1, 16]],
        f"{NAME}_lora_B": ["bfloat16", [2, 1]],
        f"{NAME}_packed": ["int16", [1, 2, 1]],
        f"{NAME}_scale": ["float32", [1, 2]],
        f"{NAME}_shape": ["int64", [2]],
        "model.norm.weight": ["bfloat16", [2]],
    }
    tensors = golden_tensors()
    for name, spec in raw.items():
        hasher.update(json.dumps([name, *spec]).encode() + b"\n")
        hasher.update(bytes(tensors[name].contiguous().view(torch.uint8).flatten()))
    assert Delta(folder).config.digest == f"sha256:{hasher.hexdigest()}"


def test_the_number_of_tokens_is_a_key_where_there_are_fewer(tmp_path):
    """The digest covers it; without it the digest is the golden one."""
    assert vocabulary_size_of(tmp_path / "same", golden_tensors()) == 40
    added = {"lm_head.weight_added": torch.ones(2, 16)}
    assert vocabulary_size_of(tmp_path / "more", golden_tensors() | added) == 42
    tensors = golden_tensors()
    assert vocabulary_size_of(tmp_path / "fewer", tensors, vocab_size=31) == 31
    raw = json.loads((tmp_path / "fewer" / "delta_config.json").read_text())
    found, digests = raw.pop("digest"), set()
    for keys in (raw, {key: raw[key] for key in raw if key != "vocab_size"}):
        hasher = hashlib.sha256(json.dumps(keys, sort_keys=True).encode() + b"\n")
        for name in sorted(tensors):
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            line = json.dumps([name, dtype, list(tensors[name].shape)])
            hasher.update(line.encode() + b"\n")
            hasher.update(bytes(tensors[name].view(torch.uint8).flatten()))
        digests.add(f"sha256:{hasher.hexdigest()}")
    assert found in digests and len(digests) == 2
    with pytest.raises(DqreloError, match="2 tokens more than its base, and"):
        vocabulary_size_of(tmp_path / "both", tensors | added, vocab_size=31)


def vocabulary_size_of(folder, tensors, **keys) -> int:
    folder.mkdir()
    write_delta(folder, replace(golden_config(), **keys), tensors)
    assert Delta(folder).config == DeltaConfig.read(folder)
    return vocabulary_size(folder, 40)


def test_what_the_golden_matrix_means(folder):
    dense = Delta(folder).matrix(NAME).dense()
    signs = -torch.ones(2, 16)
    signs[0, [0, 2]] = 1  # word 5: bits 0 and 2
    signs[1, 15] = 1  # word -32768: bit 15
    low_rank = torch.tensor([[1.0], [-2.0]]) * torch.arange(16.0)
    assert torch.equal(dense, torch.tensor([[0.5], [0.25]]) * signs + low_rank)


def test_what_the_golden_integers_mean(folder):
    """Bytes 0x90, 0x0f are columns 0 and 2, and 1: -8, 1, 7 (a nibble less 8)."""
    a, b = torch.tensor([[-8.0, 7.0, 1.0]]), torch.tensor([[1.0], [-2.0]])
    assert torch.equal(Delta(folder).matrix(OTHER).dense(), b @ (0.5 * a))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version 2; this vllm-dqrelo reads version 1"),
        ({"format_version": None}, "format_version None"),
        ({"colour": 1}, "unknown key 'colour'"),
        ({"ratio": "big"}, "ratio must be a float, got 'big'"),
        ({"digest": None}, "digest must be a str"),
        ({"vocab_size": None}, "vocab_size must be a int, got None"),
        ({"vocab_size": 1.5}, "vocab_size must be a int, got 1.5"),
        ({"vocab_size": True}, "vocab_size must be at least 1, got True"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"vocab_size": 5}, "was changed after it was written"),
    ],
)
def test_unknown_configuration(folder, change, message):
    path = folder / "delta_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DqreloError, match=message):
        Delta(folder)


def test_missing_key_and_no_json(folder):
    path = folder / "delta_config.json"
    raw = json.loads(path.read_text())
    del raw["base_fingerprint"]
    path.write_text(json.dumps(raw))
    with pytest.raises(DqreloError, match="missing key 'base_fingerprint'"):
        Delta(folder)
    path.write_text("{")
    with pytest.raises(DqreloError, match="not valid JSON"):
        Delta(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="but not delta_config.json"):
        Delta(folder)


def _set(key, value):
    return lambda tensors: tensors.__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda t: t.pop(f"{NAME}_scale"),
            "one of _packed and _scale without the other",
        ),
        (lambda t: t.pop(f"{NAME}_shape"), "tensor .*_shape is missing"),
        (lambda t: t.pop(f"{NAME}_lora_A"), "one of _lora_A and _lora_B"),
        (_set(f"{NAME}_scale", torch.tensor([[torch.nan]])), "_scale has a NaN"),
        (_set(f"{NAME}_scale", torch.ones(1, 3)), r"expected .* \[1, 2\] or \[1, 1\]"),
        (
            _set(f"{NAME}_packed", torch.zeros(1, 2, 2).short()),
            r"expected .* \[1, 2, 1\]",
        ),
        (_set(f"{NAME}_packed", torch.zeros(2, 1).short()), r"expected .* \[2, 2, 1\]"),
        (_set(f"{NAME}_packed", torch.zeros(1, 2, 1).int()), "int32"),
        (_set(f"{NAME}_packed", torch.zeros(()).short()), "_packed is"),
        (
            _set(f"{NAME}_lora_A", torch.zeros(0, 16).bfloat16()),
            r"expected .* \[1, 16\]",
        ),
        (_set(f"{NAME}_lora_scale", torch.ones(1)), "_lora_scale belongs to integer"),
        (lambda t: t.pop(f"{OTHER}_lora_scale"), "_lora_scale belongs to integer"),
        (_set(f"{OTHER}_lora_scale", torch.ones(2)), r"_lora_scale is .* \[1\]"),
        (_set(f"{OTHER}_lora_A", torch.zeros(1, 3).byte()), r"expected .* \[1, 2\]"),
        (
            _set(f"{OTHER}_lora_A", torch.tensor([[0x90, 0x1F]], dtype=torch.uint8)),
            "_lora_A has padding bits set",
        ),
        (
            _set(f"{OTHER}_lora_B", torch.tensor([[9], [0x16]], dtype=torch.uint8)),
            "_lora_B has padding bits set",
        ),
        (_set(f"{NAME}_shape", torch.tensor([2, 0])), "two positive int64"),
        (_set(f"{NAME}_shape", torch.tensor([2, 15])), "_lora_A is"),
        (_set(f"{NAME}_lora_B", torch.ones(2, 1)), "_lora_B is torch.float32"),
        (_set("model.norm.weight", torch.tensor([torch.inf])), "has a NaN or an inf"),
        (_set("model.norm.weight", torch.tensor([1])), "model.norm.weight is"),
    ],
)
def test_damaged_tensors(folder, damage, message):
    tensors = golden_tensors()
    damage(tensors)
    write_delta(folder, golden_config(), tensors)  # with a digest that fits
    with pytest.raises(DqreloError, match=message):
        Delta(folder)


def test_set_padding_bits(folder):
    tensors = golden_tensors()
    tensors[f"{NAME}_shape"] = torch.tensor([2, 15])
    tensors[f"{NAME}_lora_A"] = torch.zeros(1, 15, dtype=torch.bfloat16)
    write_delta(folder, golden_config(), tensors)
    with pytest.raises(DqreloError, match="padding bits set"):
        Delta(folder)


def test_every_single_flipped_byte_is_noticed(folder):
    for path in (folder / "delta_model.safetensors", folder / "delta_config.json"):
        sound = path.read_bytes()
        meaning = _meaning(folder)
        for i in range(len(sound)):
            path.write_bytes(sound[:i] + bytes([sound[i] ^ 0x11]) + sound[i + 1 :])
            try:
                assert _meaning(folder) == meaning, (path.name, i)
            except (DqreloError, OSError, UnicodeDecodeError):
                continue
        path.write_bytes(sound)


def _meaning(folder):
    """Everything that serving would read."""
    delta = Delta(folder)
    return (
        delta.config,
        {name: delta.matrix(name).dense().tolist() for name in delta.matrices},
        {name: delta.parameter(name).tolist() for name in delta.exact},
    )


def test_truncated_file_and_changed_tensor(folder):
    path = folder / "delta_model.safetensors"
    sound = path.read_bytes()
    path.write_bytes(sound[:-1])
    with pytest.raises(DqreloError, match="not a readable safetensors file"):
        Delta(folder)
    path.write_bytes(sound)
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path)
    with pytest.raises(DqreloError, match="changed after it was written"):
        Delta(folder)


@pytest.mark.parametrize("name", [*DTYPES, "F4", "F8_E8M0"])
def test_bytes_of_a_tensor_by_its_header(name):
    elements = {"F4": 3 * 6 // 2, "F8_E8M0": 3 * 6}.get(name)
    if elements is None:
        elements = torch.empty(3, 6, dtype=DTYPES[name]).nbytes
    assert nbytes(name, [3, 6]) == elements


@pytest.mark.parametrize("dtype", [None, 16, ["F16"], {"F16": 1}])
def test_a_dtype_that_is_not_text_is_refused(folder, dtype):
    path = folder / "delta_model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["dtype"] = dtype
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(DqreloError, match="has a dtype that is not text"):
        Delta(folder)


def test_all_problems_in_one_message(folder):
    tensors = golden_tensors()
    tensors[f"{NAME}_scale"] = torch.tensor([[torch.nan]])
    tensors["model.norm.weight"] = torch.tensor([torch.nan])
    write_delta(folder, golden_config(), tensors)
    with pytest.raises(
        DqreloError, match="_scale has a NaN.*\n.*norm.weight has a NaN"
    ):
        Delta(folder)


def test_digest_depends_on_everything():
    tensors = sorted(golden_tensors().items())
    whole = digest(golden_config(), tensors)
    assert digest(golden_config(), tensors[1:]) != whole
    assert digest(DeltaConfig("b", "sha256:00", "", "x", 0.125), tensors) != whole
