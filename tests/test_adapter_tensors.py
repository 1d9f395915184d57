# SPDX-License-Identifier: Apache-2.0
"""Every tensor of an adapter is used, or refused by its name."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import CONFIG, TENSORS, convert, edit, error_of, make_adapter

from dqrelo_tools import cli

P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
A, B = f"{P}{Q}.lora_A.weight", f"{P}{Q}.lora_B.weight"
EMBEDDING, HEAD = f"{P}model.embed_tokens.weight", f"{P}lm_head.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_model):
    """``made(kind)``: a base and a plain adapter of it, made once."""
    root, known = tmp_path_factory.mktemp("made"), {}

    def get(kind):
        if kind not in known:
            base = save_model(kind, root / kind, seed=1)
            adapter = root / f"{kind}-adapter"
            known[kind] = base, make_adapter(base, adapter, target_modules=["q_proj"])
        return known[kind]

    return get


@pytest.fixture
def refused(made, tmp_path, capsys):
    """``refused(kind, change, **config)``: the message for an adapter so changed."""

    def get(kind, change=None, **config):
        base, plain = made(kind)
        adapter = shutil.copytree(plain, tmp_path / "adapter")
        return error_of(base, edit(adapter, change, **config), capsys)

    return get


def put(**tensors):
    """Other tensors in place of an adapter's, or beside them; None takes one away."""
    names = {"A": A, "B": B, "embedding": EMBEDDING, "head": HEAD}

    def change(known):
        new = known | {names.get(name, name): value for name, value in tensors.items()}
        return {name: value for name, value in new.items() if value is not None}

    return change


def ones(*shape):
    return torch.ones(*shape)


DAMAGED = {
    "one factor missing": (put(B=None), A, "its other factor is not in the file"),
    "the other missing": (put(A=None), B, "its other factor is not in the file"),
    "of a wider model": (put(A=ones(4, 192)), A, "is [4, 192], expected [4, 96]"),
    "of a higher one": (put(B=ones(192, 4)), B, "is [192, 4], expected [96, 4]"),
    "of another rank": (
        put(A=ones(8, 96), B=ones(96, 8)),
        A,
        "is [8, 96], expected [4, 96]",
    ),
    "of two ranks": (put(A=ones(3, 96)), A, "is [3, 96], expected [4, 96]"),
    "of three dimensions": (put(A=ones(4, 96, 1)), A, "is [4, 96, 1], expected"),
    "a vector": (put(A=ones(4)), A, "is [4], expected"),
    "not gathered": (put(A=ones(0)), A, "is empty: it was saved while DeepSpeed"),
    "not a number": (put(A=ones(4, 96) * torch.nan), A, "has a NaN or an infinity"),
    "infinite": (put(B=ones(96, 4) * torch.inf), B, "has a NaN or an infinity"),
    "of integers": (put(A=ones(4, 96).long()), A, "is I64, expected BF16, F16 or F32"),
    "of 8 bits": (
        put(B=ones(96, 4).to(torch.float8_e4m3fn)),
        B,
        "is F8_E4M3, expected BF16, F16 or F32",
    ),
    "of 64 bits": (put(B=ones(96, 4).double()), B, "is F64, expected"),
    "of no module": (
        put(**{A.replace("layers.0", "layers.7"): ones(4, 96)}),
        "layers.7",
        "the base has no",
    ),
    "of a norm": (
        put(**{A.replace("self_attn.q_proj", "input_layernorm"): ones(4, 96)}),
        "input_layernorm",
        "only a matrix has factors",
    ),
    "of AdaLoRA": (put(**{f"{P}{Q}.lora_E": ones(4, 1)}), "lora_E", "not a factor"),
    "of VeRA": (put(**{f"{P}{Q}.vera_lambda_b": ones(4)}), "vera_lambda_b", "has no"),
    "a score": (put(**{f"{P}score.weight": ones(2, 96)}), "score", "has no score"),
    "another adapter": (
        put(**{A.replace(".weight", ".other.weight"): ones(4, 96)}),
        "lora_A.other.weight",
        "both are for",
    ),
    "a module not selected": (
        put(
            **{
                A.replace("q_proj", "o_proj"): ones(4, 96),
                B.replace("q_proj", "o_proj"): ones(96, 4),
            }
        ),
        "o_proj.lora_A.weight",
        "target_modules of adapter_config.json does not select its module",
    ),
    "a magnitude without DoRA": (
        put(**{f"{P}{Q}.lora_magnitude_vector": ones(96)}),
        Q,
        "use_dora is false, the file has a magnitude",
    ),
    "a whole one beside": (
        put(**{f"{P}{Q}.modules_to_save.weight": ones(96, 96)}),
        Q,
        "has factors, and is trained otherwise as well",
    ),
    "a whole one of another shape": (
        put(**{f"{P}model.norm.weight": ones(95)}),
        "model.norm.weight",
        "is [95], model.norm.weight is [96] in the base",
    ),
    "one head only": (
        put(head=ones(323, 96)),
        "lm_head.weight has 323",
        "without the other",
    ),
    "one embedding only": (
        put(embedding=ones(323, 96)),
        "embed_tokens.weight has 323",
        "without the other",
    ),
    "an original without factors": (
        put(**{f"{P}lm_head.base_layer.weight": ones(320, 96)}),
        "lm_head.base_layer.weight",
        "PEFT does not load it",
    ),
    "other values below factors": (
        put(**{f"{P}{Q}.weight": ones(96, 96)}),
        f"{Q}.weight",
        "PEFT does not load it",
    ),
    "no tensor": (lambda known: {}, "it has no tensors", ""),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_tensor_that_cannot_be_used(refused, what):
    change, name, message = DAMAGED[what]
    error = refused("llama", change)
    assert name in error and message in error


CONTRADICTED = {
    "use_dora": ({"use_dora": True}, "use_dora is true, the file has no magnitude"),
    "lora_bias": ({"lora_bias": True}, "the file has no bias of its lora_B"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "has lm_head, the file does"),
    "a module saved, and in factors": (
        {"modules_to_save": ["q_proj"]},
        "has q_proj, the file does not",
    ),
    "tokens": (
        {"trainable_token_indices": [3]},
        "are set, the file has no rows of an embedding",
    ),
    "tokens of a head": (
        {"trainable_token_indices": {"lm_head": [3]}},
        "are set, the file has no rows of lm_head",
    ),
    "rank_pattern": ({"rank_pattern": {"q_proj": 5}}, "expected [5, 96]"),
    "r": ({"r": 5}, "expected [5, 96]"),
    "target_modules": ({"target_modules": ["k_proj"]}, "does not select its module"),
    "layers": ({"layers_to_transform": [1]}, "does not select its module"),
    "exclude_modules": ({"exclude_modules": r".*\.q_proj"}, "does not select"),
    "all-linear": ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, Q),
    "lora_alpha": ({"lora_alpha": 1e308}, "is beyond float32"),
}


@pytest.mark.parametrize("what", CONTRADICTED)
def test_a_config_that_the_tensors_contradict(refused, what):
    config, message = CONTRADICTED[what]
    assert message in refused("llama", **config)


def test_a_bias_needs_one_in_the_base(refused):
    bias = {f"{P}{Q}.lora_B.bias": ones(96)}
    error = refused("llama", put(**bias), lora_bias=True)
    assert f"{Q}.lora_B.bias: the base has no {Q}.bias, which lora_bias adds" in error


def test_a_bias_that_the_config_denies(refused):
    error = refused("qwen2", put(**{f"{P}{Q}.lora_B.bias": ones(96)}))
    assert "lora_bias of adapter_config.json is false, the file has a bias" in error


TOKENS = f"{P}model.embed_tokens.token_adapter.trainable_tokens_delta"
OF_TOKENS = {
    "not in the config": (ones(2, 96), None, "is [2, 96], expected [0, 96]"),
    "too few": (ones(2, 96), [3], "is [2, 96], expected [1, 96]"),
    "twice": (ones(2, 96), [3, 3], "names rows of model.embed_tokens twice"),
    "of the head": (ones(1, 96), [3], "the file has no rows of an embedding"),
    "beyond": (ones(2, 96), [3, 320], "has no row 320, but 320"),
    "too wide": (ones(2, 97), [3, 4], "is [2, 97], expected [2, 96]"),
}


@pytest.mark.parametrize("what", OF_TOKENS)
def test_rows_that_do_not_fit(refused, what):
    rows, indices, message = OF_TOKENS[what]
    name = TOKENS
    if what == "of the head":
        name = TOKENS.replace("model.embed_tokens", "lm_head")
    error = refused("llama", put(**{name: rows}), trainable_token_indices=indices)
    assert message in error


TIED = {
    "two values of one matrix": (
        put(embedding=ones(323, 96), head=2 * ones(323, 96)),
        {},
        "differ, and the base has one matrix for both",
    ),
    "tied by the config, and one of them": (
        put(**{f"{P}lm_head.modules_to_save.weight": ones(320, 96)}),
        {"ensure_weight_tying": True},
        "the same values for both matrices",
    ),
    "rows beside factors": (
        put(
            **{
                TOKENS: ones(1, 96),
                f"{P}lm_head.lora_A.weight": ones(4, 96),
                f"{P}lm_head.lora_B.weight": ones(320, 4),
            }
        ),
        {"trainable_token_indices": [3], "target_modules": ["q_proj", "lm_head"]},
        "is tied to rows of trainable_token_indices, and is changed",
    ),
}


@pytest.mark.parametrize("what", TIED)
def test_tied_matrices_that_cannot_be_told(refused, what):
    change, config, message = TIED[what]
    assert message in refused("llama-tied", change, **config)


def test_what_no_model_generates_with_is_left_out(made, tmp_path, capsys):
    base, plain = made("llama")
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    names = ("v_head.summary.weight", f"{P}model.layers.0.rotary_emb.inv_freq")
    edit(adapter, put(**{name: ones(1, 96) for name in names}))
    capsys.readouterr()
    assert convert(base, adapter, tmp_path / "delta") == 0
    error = capsys.readouterr().err
    assert all(f"warning: {name} is left out" in error for name in names)


def test_all_reasons_are_listed(refused):
    error = refused("llama", put(A=ones(4, 192), B=ones(192, 4)))
    assert A in error and B in error


FILES = {
    "new_embeddings.safetensors": "has rows of added tokens apart from the adapter",
    "model.safetensors": "the folder holds a whole model as well, model.safetensors",
    "model-00001-of-00002.safetensors": "the folder holds a whole model as well",
}


@pytest.mark.parametrize("name", FILES)
def test_weights_beside_the_adapter(made, tmp_path, capsys, name):
    base, plain = made("llama")
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    save_file({"input_embeddings": ones(3, 96)}, adapter / name)
    assert FILES[name] in error_of(base, adapter, capsys)


def test_an_adapter_without_its_tensors(made, tmp_path, capsys):
    base, plain = made("llama")
    adapter = shutil.copytree(plain, tmp_path / "adapter")
    (adapter / TENSORS).rename(adapter / "adapter_model.bin")
    error = error_of(base, adapter, capsys)
    assert "pickle" in error and "adapter_model.bin" in error
    (adapter / "adapter_model.bin").unlink()
    assert f"it has {CONFIG}, but not its weights" in error_of(base, adapter, capsys)


def test_a_budget_is_for_what_is_compressed(made, tmp_path, capsys):
    base, adapter = made("llama")
    command = ["convert", "--base", base, "--model", adapter, "--budget", "1MB"]
    assert cli.main([*map(str, command), "--output", str(tmp_path / "delta")]) == 1
    assert "leave --budget out" in capsys.readouterr().err


def test_a_delta_is_compared_with_a_whole_model(made, tmp_path, capsys):
    base, adapter = made("llama")
    assert convert(base, adapter, tmp_path / "delta") == 0
    command = ["verify", "--base", base, "--delta", tmp_path / "delta"]
    assert cli.main([*map(str, command)]) == 0
    assert cli.main([*map(str, command), "--model", str(adapter)]) == 1
    assert "leave --model out, or merge the adapter" in capsys.readouterr().err
