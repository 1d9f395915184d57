# SPDX-License-Identifier: Apache-2.0
"""Two config.json are equal if transformers computes the same with both."""

import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from support.command import run
from support.configs import (
    ABSENT,
    NOT_BUILT,
    VALUES,
    build,
    changed,
    compare,
    logits,
    parsed,
    rounding,
    said,
    save,
    saved_again,
)
from support.published import LLAMA3_ROPE, LONG_ROPE, PUBLISHED

from dqrelo_tools.configs import READ_ANYWAY
from vllm_dqrelo.format.model_config import INERT


@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_and_saved_again_are_equal(kind, use_diff, caplog):
    config = PUBLISHED[kind]
    again = saved_again(config, use_diff)
    assert again != config
    assert compare(config, again) == compare(again, config) == []
    assert not said(caplog)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_no_key_that_does_not_compute_changes_logits(kind, caplog):
    config = PUBLISHED[kind]
    stamped = changed(
        config,
        {
            **{key: 0.3 for key in ("attention_dropout", "resid_pdrop", "layerdrop")},
            **{"eos_token_id": [7, 8], "pad_token_id": 9, "initializer_range": 0.5},
            **{"gradient_checkpointing": True, "pretraining_tp": 2},
            **{"temperature": 0.7, "do_sample": True, "top_k": 5},
            **{"id2label": {"0": "no", "1": "yes", "2": "maybe"}},
            **{"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.5},
            "unsloth_version": "2025.9.1",
        },
    )
    assert compare(config, stamped) == []
    assert not said(caplog)
    assert torch.equal(logits(config), logits(stamped))


@pytest.mark.parametrize("kind", ["llama-3.1", "mixtral", "opt"])
def test_each_inert_key_changes_no_logits(kind, caplog):
    config = PUBLISHED[kind]
    config = config | {"architectures": ["LlamaForCausalLM"]}
    expected = logits(config)
    keys = {*INERT, "attention_dropout", "dropout", "embd_pdrop", "layerdrop"}
    for key in sorted(keys):
        value = VALUES.get(key, 0.75 if "drop" in key else "x" if key[0] == "_" else 3)
        other = changed(config, {key: value})
        assert compare(config, other) == [], key
        if key not in NOT_BUILT:
            bound = rounding(expected) if key == "experts_implementation" else 0
            assert (logits(other) - expected).abs().max() <= bound, key
    assert not said(caplog)


WINDOW = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1}
COMPUTES = [
    ("llama-2", {"rms_norm_eps": 0.1}, "rms_norm_eps is 0.1, the base has 1e-05"),
    ("llama-2", {"hidden_act": "gelu"}, "hidden_act is 'gelu', the base has 'silu'"),
    ("llama-2", {"rope_theta": 500.0}, "rope_parameters.rope_theta is 500.0"),
    ("llama-2", {"rope_scaling": {"type": "linear", "factor": 2}}, "factor is 2"),
    ("llama-2", {"num_attention_heads": 2}, "num_attention_heads is 2, the base has 4"),
    ("llama-2", {"num_hidden_layers": 1}, "num_hidden_layers is 1, the base has 2"),
    ("llama-2", {"attention_bias": True}, "attention_bias is True"),
    ("llama-2", {"mlp_bias": True}, "mlp_bias is True, the base has False"),
    ("llama-3.1", {"rope_scaling": ABSENT}, "factor is absent, the base has 8.0"),
    ("llama-3.1", {"rope_scaling.factor": 32.0}, "factor is 32.0, the base has 8.0"),
    ("llama-3.1", {"rope_scaling.low_freq_factor": 2.0}, "low_freq_factor is 2.0"),
    ("mistral-0.1", {"sliding_window": 4}, "sliding_window is 4, the base has 8"),
    ("mistral-0.1", {"sliding_window": None}, "sliding_window is None"),
    ("mistral-0.2", {"sliding_window": 8}, "sliding_window is 8, the base has None"),
    ("qwen2.5", WINDOW, "layer_types is ['full_attention', 'sliding_attention']"),
    ("qwen2.5", {"rope_theta": 500.0}, "rope_theta is 500.0, the base has 1000000.0"),
    ("qwen3", {"head_dim": ABSENT}, "head_dim is 128, the base has 32"),
    ("gemma-3", {"rope_local_base_freq": 50}, "sliding_attention.rope_theta is 50"),
    ("gemma-3", {"rope_theta": 50}, "rope_parameters.full_attention.rope_theta is 50"),
    ("gemma-3", {"sliding_window": 4}, "sliding_window is 4, the base has 8"),
    ("gemma-3", {"sliding_window_pattern": 1}, "layer_types is ['full_attention', 'f"),
    ("gemma-3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
    ("gemma-3", {"final_logit_softcapping": 2.0}, "final_logit_softcapping is 2.0"),
    ("gemma-3", {"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
    ("phi-3", {"rope_scaling.short_factor": [2.0] * 8}, "short_factor is [2.0, 2.0,"),
    ("phi-3", {"original_max_position_embeddings": 32}, "position_embeddings is 32"),
    ("phi-3", {"max_position_embeddings": 4096}, "position_embeddings is 4096"),
    ("phi", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("phi", {"layer_norm_eps": 0.1}, "layer_norm_eps is 0.1, the base has 1e-05"),
    ("phi", {"qk_layernorm": True}, "qk_layernorm is True, the base has False"),
    ("gpt-neox", {"rotary_pct": 0.5}, "rope_parameters.partial_rotary_factor is 0.5"),
    ("gpt-neox", {"rotary_emb_base": 50}, "rope_theta is 50, the base has 10000"),
    ("gpt-neox", {"use_parallel_residual": False}, "use_parallel_residual is False"),
    ("opt", {"activation_function": "gelu"}, "activation_function is 'gelu'"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ("mixtral", {"sliding_window": 4}, "sliding_window is 4, the base has None"),
    ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob is True"),
    ("qwen2-moe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ("qwen2-vl", {"rms_norm_eps": 0.1}, "text_config.rms_norm_eps is 0.1"),
    ("qwen2-vl", {"rope_theta": 50.0}, "text_config.rope_parameters.rope_theta is 50"),
    ("smolvlm", {"text_config.rms_norm_eps": 0.1}, "text_config.rms_norm_eps is 0.1"),
    ("idefics3", {"text_config.rope_theta": 5.0}, "rope_parameters.rope_theta is 5.0"),
]


@pytest.mark.parametrize(("kind", "changes", "told"), COMPUTES)
def test_what_computes_is_refused_by_name(kind, changes, told):
    config = PUBLISHED[kind]
    other = changed(config, changes)
    for model in (other, saved_again(other)):
        found = compare(config, model)
        assert told in "\n".join(found)
        assert len(found) <= 5
    got = logits(other)
    assert not torch.equal(got, logits(config))


MAMBA = {"model_type": "mamba2", "head_dim": 8, "num_heads": 16, "hidden_size": 64}
OTHERS = [
    {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None},
    {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"},
    {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "summary_use_proj": True},
    {"model_type": "falcon", "n_head": 71, "n_layer": 32, "alibi": False},
    {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh"},
    {"model_type": "deepseek_v3", "rope_theta": 10000, "aux_loss_alpha": 0.001},
    {"model_type": "granite", "logits_scaling": 8.0, "rope_theta": 10000.0},
    {"model_type": "olmo2", "clip_qkv": None, "rope_theta": 500000},
    {"model_type": "llama4", "text_config": {"rope_theta": 500000.0}},
    MAMBA | {"time_step_limit": [0.0, float("inf")]},
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["model_type"])
def test_other_models_are_equal_when_saved_again(config, caplog):
    for use_diff in (True, False):
        assert compare(config, saved_again(config, use_diff)) == []
    assert not said(caplog)


def test_ropes_of_all_kinds_are_equal_when_saved_again(caplog):
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    for rope in (
        {"type": "linear", "factor": 2},
        {"type": "dynamic", "factor": 2.0},
        yarn,
        LLAMA3_ROPE,
        LONG_ROPE | {"original_max_position_embeddings": 64},
        {"type": "default"},
        None,
    ):
        config = PUBLISHED["llama-2"] | {"rope_scaling": rope}
        assert compare(config, saved_again(config)) == []
    config = PUBLISHED["llama-2"] | {"rope_scaling": yarn}
    defaults = {"beta_fast": 32, "beta_slow": 1.0, "truncate": True, "mscale": None}
    assert compare(config, config | {"rope_scaling": yarn | defaults}) == []
    first = PUBLISHED["phi-3"] | {"rope_scaling": LONG_ROPE | {"type": "su"}}
    assert compare(first, saved_again(PUBLISHED["phi-3"])) == []
    assert not said(caplog)


def test_defaults_written_out_equal_defaults_left_out(caplog):
    config = PUBLISHED["qwen2.5"]
    layers = {"layer_types": ["full_attention"] * 2, "sliding_window": None}
    for changes in (
        {"head_dim": 16},
        {"head_dim": None},
        {"hidden_act": ABSENT},
        {"hidden_act": "swish"},
        {"use_sliding_window": ABSENT, "sliding_window": ABSENT, **layers},
        {"use_sliding_window": True, "max_window_layers": 2},
        {"rope_theta": ABSENT, "rope_parameters": {"rope_theta": 1000000}},
        {"rms_norm_eps": 1e-5, "architectures": ABSENT},
        {"model_type": ABSENT},
        {"attention_bias": None, "qk_norm": False},
    ):
        assert compare(config, changed(config, changes)) == [], changes
    assert not said(caplog)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("gemma-3", "sliding_window_pattern"), ("phi", "partial_rotary_factor")],
)
def test_keys_that_a_class_turned_into_others_may_be_left_out(kind, key, caplog):
    again = saved_again(PUBLISHED[kind])
    assert key in again
    other = changed(again, {key: ABSENT})
    assert compare(again, other) == compare(PUBLISHED[kind], other) == []
    assert torch.equal(logits(again), logits(other))
    assert not said(caplog)


def test_flat_and_nested_are_equal(caplog):
    """As transformers 4.52 saved Qwen2-VL: both at once."""
    config = PUBLISHED["qwen2-vl"]
    text = {k: v for k, v in config.items() if k not in ("vision_config", "model_type")}
    both = config | {"text_config": text | {"model_type": "qwen2_vl_text"}}
    assert compare(config, both) == []
    assert compare(saved_again(config), both) == []


@pytest.mark.parametrize(
    ("kind", "size"), [("llama-3.1", 512), ("llama-3.1", 128), ("qwen2-vl", 512)]
)
def test_another_longest_sequence_is_noted(kind, size, caplog):
    config = PUBLISHED[kind]
    caplog.set_level("INFO")
    assert compare(config, config | {"max_position_embeddings": size}) == []
    (record,) = said(caplog)
    assert f"max_position_embeddings is {size}, the base has 256" in record.message
    assert record.levelname == "INFO"


def test_more_learnt_positions_are_refused_by_their_shape(tmp_path, capsys):
    published = PUBLISHED["opt"]
    longer = published | {"max_position_embeddings": 512}
    base = save(build(published), tmp_path / "base", published)
    model = save(build(longer), tmp_path / "model", longer)
    pair = ("--base", base, "--model", model, "--output", tmp_path / "d")
    assert run("convert", *pair) == 1
    shapes = "embed_positions.weight is [514, 64], the base has [258, 64]"
    assert shapes in capsys.readouterr().err


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "of another day"])
def test_another_longest_sequence_where_it_computes_is_refused(rope):
    scaling = {**LONG_ROPE, "type": rope, "factor": 2.0}
    config = PUBLISHED["llama-2"] | {"rope_scaling": scaling}
    (found,) = compare(config, config | {"max_position_embeddings": 512})[:1]
    assert "max_position_embeddings is 512, the base has 256" in found


def test_yarn_of_a_length_that_is_not_given(caplog):
    """It is of max_position_embeddings, then, and of its own where it is given."""
    yarn = {"type": "yarn", "factor": 4.0}
    config = PUBLISHED["llama-2"] | {"rope_scaling": yarn}
    assert compare(config, config | {"max_position_embeddings": 512})
    yarn["original_max_position_embeddings"] = 64
    assert compare(config, config | {"max_position_embeddings": 512}) == []


def test_unknown_keys_are_warned_of(caplog):
    config = PUBLISHED["smolvlm"]
    changes = {"my_stamp": [1, 2], "mine": False, "text_config.use_resampler": ABSENT}
    other = changed(config, changes | {"text_config.neftune_noise_alpha": 5})
    assert compare(config, other) == []
    first, second = (record.message for record in said(caplog))
    assert "my_stamp is [1, 2], the base has absent" in first
    assert "text_config.neftune_noise_alpha is 5, the base has 0.0" in second
    assert {record.levelname for record in said(caplog)} == {"WARNING"}


def test_undeclared_keys_that_are_read_anyway_are_refused():
    config = PUBLISHED["qwen2.5"]
    for key, value in {"head_dim": 32, "qk_norm": True, "is_causal": False}.items():
        (found,) = compare(config, config | {key: value})
        assert f"config.json: {key} is {value}" in found


@pytest.mark.parametrize("kind", PUBLISHED)
def test_all_keys_that_transformers_reads_are_known(kind):
    """The keys in each class's own code: every ``getattr(config, "key")``."""
    config = parsed(PUBLISHED[kind])
    module = importlib.import_module(
        inspect.getmodule(type(config)).__name__.replace("configuration_", "modeling_")
    )
    source = Path(inspect.getsourcefile(module)).read_text()
    read = set(
        re.findall(r'getattr\(\s*(?:self\.)?(?:text_)?config,\s*"(\w+)"', source)
    )
    declared = set(vars(config)) | set(vars(config.get_text_config()))
    assert read - declared - INERT <= READ_ANYWAY.keys()


def test_another_head_or_model_is_said_in_one_line():
    config = PUBLISHED["llama-2"]
    other = config | {"architectures": ["LlamaForSequenceClassification"]}
    (found,) = compare(config, other)
    assert "LlamaForSequenceClassification, the base has LlamaForCausalLM: " in found
    (found,) = compare(config, PUBLISHED["mistral-0.2"])
    assert found == "config.json: model_type is 'mistral', the base has 'llama'"
    neither = changed(config, {"model_type": ABSENT, "architectures": ABSENT})
    (found,) = compare(config, neither)
    assert found.endswith("write the base's into b/config.json")


def test_phimoe_computes_with_its_jitter():
    config = {"model_type": "phimoe", "hidden_size": 64, "router_jitter_noise": 0.01}
    (found,) = compare(config, config | {"router_jitter_noise": 0.2})
    assert "router_jitter_noise is 0.2" in found


def test_a_model_type_that_transformers_does_not_know(caplog):
    config = PUBLISHED["llama-3.1"] | {"model_type": "of-my-own", "n_things": 3}
    stamps = {"attention_dropout": 0.5, "temperature": 0.5, "dtype": "float32"}
    assert compare(config, config | stamps) == []
    theta, rope = config["rope_theta"], config["rope_scaling"]
    again = changed(config, {"rope_scaling": ABSENT, "rope_theta": ABSENT})
    again["rope_parameters"] = {**rope, "rope_theta": theta}
    assert compare(config, again) == []
    (found,) = compare(config, config | {"n_things": 4})
    assert found == "config.json: n_things is 4, the base has 3"
    (found,) = compare(config, config | {"top_k": 4})  # of a router, perhaps
    assert found == "config.json: top_k is 4, the base has absent"
    assert not said(caplog)


def test_values_that_transformers_refuses_are_compared_as_written(caplog):
    config = PUBLISHED["llama-2"] | {"num_attention_heads": 5, "head_dim": 16}
    assert compare(config, config | {"dtype": "float16"}) == []
    assert "not a multiple" in caplog.text and "key by key" in caplog.text
    (found,) = compare(config, config | {"rms_norm_eps": 0.1})
    assert "rms_norm_eps is 0.1" in found


BROKEN = [
    ([1], "is not a JSON object"),
    ({"vocab_size": "320"}, "'vocab_size' expected int, got str"),
    ({"model_type": "my-own", "vocab_size": "320"}, "vocab_size is '320', not an int"),
    ({"num_hidden_layers": 2.5}, "'num_hidden_layers' expected int, got float"),
    ({"rope_scaling": "llama3"}, "rope_parameters"),
    ({"text_config": 3, "model_type": "qwen2_vl"}, "text_config"),
    ({"model_type": 3}, "model_type is None, the base has 'llama'"),
    ({"to_json_string": 3, "rms_norm_eps": 0.1}, "rms_norm_eps is 0.1"),
]


@pytest.mark.parametrize(("change", "told"), BROKEN)
def test_a_broken_config_is_one_error(tmp_path, save_model, capsys, change, told):
    base = save_model("llama", tmp_path / "base", seed=1)
    model = save_model("llama", tmp_path / "model", seed=2)
    path = model / "config.json"
    if isinstance(change, dict):
        change = json.loads(path.read_text()) | change
    path.write_text(json.dumps(change))
    assert run("convert", "--base", base, "--model", model, "--output", tmp_path / "d")
    error = capsys.readouterr().err
    assert error.count("dqrelo: error:") == 1 and told in error, error
    assert str(model) in error
    assert not (tmp_path / "d").exists()


def test_a_rope_theta_that_contradicts_is_refused():
    """transformers does not read it beside rope_parameters; others do."""
    again = saved_again(PUBLISHED["llama-3.1"])
    assert compare(again, again | {"rope_theta": 500000.0}) == []
    (found,) = compare(again, again | {"rope_theta": 1000.0})
    assert found == "config.json: rope_theta is 1000.0, the base has absent"


def test_a_quantised_base_is_compared_with_the_plain_one_by_what_it_means():
    """convert --base-quantized: the quantiser saved with another transformers."""
    plain = PUBLISHED["llama-3.1"]
    quantised = saved_again(plain) | {"quantization_config": {"quant_method": "gptq"}}
    assert compare(plain, quantised) == []
    (found,) = compare(plain, quantised | {"rms_norm_eps": 0.1})
    assert "rms_norm_eps is 0.1" in found
