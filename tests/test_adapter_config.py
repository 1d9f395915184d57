# SPDX-License-Identifier: Apache-2.0
"""adapter_config.json: each key is read, has no part in it, or is refused by name."""

import dataclasses
import json
import random
import shutil

import peft
import pytest
import torch
from peft.utils.peft_types import PeftType
from support.adapters import (
    CONFIG,
    TOKENS,
    close,
    convert,
    edit,
    error_of,
    exported_logits,
    load_model,
    make_adapter,
)

from dqrelo_tools.adapter_config import (
    BASE_CHANGING_INITS,
    HARMLESS,
    PLAIN_INITS,
    PROMPTS,
    READ,
    REASONS,
    AdapterConfig,
    key_problems,
)
from vllm_dqrelo.format.errors import DqreloError

FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}


@pytest.fixture(scope="module")
def base(tmp_path_factory, save_model):
    return save_model("llama", tmp_path_factory.mktemp("base") / "base", seed=1)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "adapter"
    return make_adapter(base, folder, target_modules=["q_proj"])


@pytest.fixture
def adapter(plain, tmp_path):
    """A plain adapter, to be spoilt."""
    return shutil.copytree(plain, tmp_path / "adapter")


def default(field):
    """A field's default, as PEFT writes it."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def test_every_option_of_peft_is_decided():
    """A new one of PEFT's is refused when it is used, and belongs into the table."""
    decided = READ.keys() | HARMLESS | REASONS.keys() | {"peft_type"}
    assert FIELDS.keys() <= decided
    assert not READ.keys() & HARMLESS and not REASONS.keys() & (READ.keys() | HARMLESS)
    assert READ.keys() | HARMLESS >= {f.name for f in dataclasses.fields(AdapterConfig)}


@pytest.mark.parametrize(
    "name", sorted(FIELDS.keys() - {"peft_type", "target_modules"})
)
def test_the_default_of_every_option_is_taken(name):
    assert key_problems({name: default(FIELDS[name])}) == []


def test_a_config_as_peft_writes_it_has_the_same_values(adapter):
    config = AdapterConfig.read(adapter)
    saved = peft.LoraConfig.from_pretrained(adapter)
    for field in dataclasses.fields(AdapterConfig):
        want = getattr(saved, field.name)
        got = getattr(config, field.name)
        assert got == (sorted(want) if isinstance(want, set) else want) or not (
            got or want
        )


def test_defaults_are_pefts(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "target_modules": []}')
    config, want = AdapterConfig.read(tmp_path), peft.LoraConfig()
    assert (config.r, config.lora_alpha) == (want.r, want.lora_alpha)


USED = {
    "alora_invocation_tokens": [5, 6],
    "arrow_config": {"top_k": 2},
    "fan_in_fan_out": True,
    "kasa_config": {"beta": 0.1},
    "layer_replication": [[0, 2]],
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 8},
    "target_parameters": ["experts.gate_up_proj"],
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
    "the_next_option": "on",
    "another_option": 0,
}


@pytest.mark.parametrize("key", USED)
def test_an_option_that_changes_what_the_factors_mean(base, adapter, capsys, key):
    edit(adapter, **{key: USED[key]})
    error = error_of(base, adapter, capsys)
    assert f"{CONFIG}: {key} is " in error and "merge the adapter" in error


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_an_unknown_option_that_is_not_used(base, adapter, tmp_path, value):
    edit(adapter, the_next_option=value)
    assert convert(base, adapter, tmp_path / "delta") == 0


WRONG = [
    ("r", 0),
    ("r", -4),
    ("r", True),
    ("r", 4.0),
    ("r", "4"),
    ("r", None),
    ("r", 10**30),
    ("lora_alpha", None),
    ("lora_alpha", "16"),
    ("lora_alpha", True),
    ("lora_alpha", float("nan")),
    ("lora_alpha", float("inf")),
    ("lora_alpha", 10**400),
    ("lora_alpha", [16]),
    ("rank_pattern", {"q_proj": 0}),
    ("rank_pattern", {"q_proj": 2.5}),
    ("rank_pattern", {"(": 4}),
    ("rank_pattern", ["q_proj"]),
    ("alpha_pattern", {"q_proj": "8"}),
    ("alpha_pattern", {"[": 8}),
    ("alpha_pattern", {"q_proj": float("nan")}),
    ("target_modules", 7),
    ("target_modules", None),
    ("target_modules", "("),
    ("target_modules", ["q_proj", 1]),
    ("exclude_modules", {"q_proj": 1}),
    ("modules_to_save", "lm_head"),
    ("modules_to_save", [1]),
    ("layers_to_transform", "0"),
    ("layers_to_transform", [0.5]),
    ("layers_pattern", 4),
    ("trainable_token_indices", "3"),
    ("trainable_token_indices", [-1]),
    ("trainable_token_indices", {"embed_tokens": 3}),
    ("bias", "some"),
    ("bias", None),
    ("use_rslora", "yes"),
    ("use_dora", 1),
    ("lora_bias", []),
    ("ensure_weight_tying", 1),
    ("init_lora_weights", 3),
    ("init_lora_weights", "magic"),
    ("loftq_config", [4]),
]


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_is_named(base, adapter, capsys, key, value):
    edit(adapter, **{key: value})
    error = error_of(base, adapter, capsys)
    assert f"{CONFIG}: {key} is " in error and ", expected " in error


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"LORA"', "[" * 10**5, "{}", "\x00", "NaN"]
)
def test_what_is_not_a_config(base, adapter, capsys, text):
    (adapter / CONFIG).write_text(text)
    error = error_of(base, adapter, capsys)
    assert CONFIG in error and len(error) < 400


KINDS = sorted(kind.value for kind in PeftType if kind != PeftType.LORA)


@pytest.mark.parametrize("kind", [*KINDS, "lora", None, 3, []])
def test_another_kind_of_adapter(base, adapter, capsys, kind):
    edit(adapter, peft_type=kind)
    error = error_of(base, adapter, capsys)
    assert f"peft_type is {kind!r}, expected 'LORA'" in error
    assert ("cannot be served" in error) == (kind in PROMPTS)
    assert ("merge_and_unload" in error) == (kind not in PROMPTS)


@pytest.mark.parametrize("kind", [*BASE_CHANGING_INITS, "pissa_niter_16", "OLoRA"])
def test_a_start_that_changed_the_base(base, adapter, capsys, kind):
    edit(adapter, init_lora_weights=kind)
    error = error_of(base, adapter, capsys)
    assert f"init_lora_weights is {kind!r}" in error
    assert "path_initial_model_for_weight_conversion" in error


@pytest.mark.parametrize("kind", [*PLAIN_INITS, "Gaussian", True, False, None])
def test_a_start_that_did_not(base, adapter, tmp_path, kind):
    edit(adapter, init_lora_weights=kind)
    assert convert(base, adapter, tmp_path / "delta") == 0


def test_which_starts_change_the_base():
    """PEFT itself is asked, with one layer."""
    for kind in ("orthogonal", "mica", "gaussian", "olora", "pissa", "pissa_niter_2"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        before = model[0].weight.detach().clone()
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=kind)
        layer = peft.get_peft_model(model, config).base_model.model[0]
        same = torch.equal(layer.base_layer.weight, before)
        assert same == (key_problems({"init_lora_weights": kind}) == []), kind


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_pefts_conversion_is_the_way_out(base, tmp_path, kind):
    """Two factors for each, of which one takes the other's start away again."""
    model = load_model(base)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=kind
    )
    model = peft.get_peft_model(model, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
        want = model.eval()(TOKENS).logits
    model.save_pretrained(
        tmp_path / "plain",
        path_initial_model_for_weight_conversion=str(tmp_path / "start"),
    )
    assert convert(base, tmp_path / "plain", tmp_path / "delta") == 0
    got = exported_logits(base, tmp_path / "delta", tmp_path / "merged")
    assert close(got, want)


BARE = {"peft_type": "LORA", "target_modules": []}
VALUES = [None, True, False, 0, 1, -1, 2.5, 1e400, float("nan"), 10**400, "", "q_proj"]
VALUES += ["(", "\ud800", [], [1], ["a"], [None], {}, {"a": 1}, {"(": []}, {"a": {}}]


def test_no_config_is_a_traceback(adapter):
    """Random values of random keys: read, or refused."""
    keys = [*FIELDS, "unknown", ""]
    choose = random.Random(3)
    for _ in range(2000):
        raw = {key: choose.choice(VALUES) for key in choose.sample(keys, 3)}
        (adapter / CONFIG).write_text(json.dumps(BARE | raw))
        try:
            config = AdapterConfig.read(adapter)
        except DqreloError as error:
            assert len(str(error)) < 3000
        else:
            config.scaling("model.layers.0.q_proj")
            config.targets("model.layers.0.q_proj")
            config.saves("lm_head")
            config.tokens("model.embed_tokens")
