# SPDX-License-Identifier: Apache-2.0
"""A fine-tune whose parameters have other names than its base's: logits as trained."""

import json

import pytest
import torch
from support.renamed import (
    MASK,
    adding,
    check,
    convert,
    edit,
    fused,
    in_layers,
    renaming,
    within,
)

from dqrelo_tools.cli import main
from vllm_dqrelo.format.delta import Delta

PREFIXES = {
    "torch.compile": renaming(("", "_orig_mod.")),
    "data parallel": renaming(("", "module.")),
    "both": renaming(("", "module._orig_mod.")),
    "peft": renaming(("", "base_model.model.")),
    "trl": renaming(("", "pretrained_model.")),
    "fsdp": within("_fsdp_wrapped_module"),
    "checkpointing": within("_checkpoint_wrapped_module"),
    "compiled layers": within("_orig_mod"),
    "parallel layers": within("module"),
    "deepspeed": renaming(("", "module._forward_module.")),
    "missing": renaming(("model.", "")),
    "twice": renaming(("model.", "model.model.")),
    "unknown": renaming(("", "policy.actor.")),
    "language model": renaming(("", "language_model.")),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_prefix(prefix, kind, pair, tmp_path, capsys):
    model = pair(kind)
    edit(tmp_path / "model", PREFIXES[prefix])
    check(tmp_path, model)
    notes = [x for x in capsys.readouterr().err.splitlines() if "note: the fine" in x]
    assert len(notes) == 2  # of convert, and of verify
    assert "for instance" in notes[0]


# What transformers 5 saves, and what it has in memory: both have been published.
GENERATIONS = {
    "qwen2-vl": [
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
    ],
    "qwen2.5-vl": [
        ("model.", "model.language_model."),
        ("visual.", "model.visual."),
    ],
    "llava": [
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "gemma3": [
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
    "gpt-neox": [("embed_out.", "lm_head.")],
    "idefics3": [("model.", "")],
}


@pytest.mark.parametrize("side", ["base", "model"])
@pytest.mark.parametrize("kind", GENERATIONS)
def test_other_generation(kind, side, pair, tmp_path, capsys):
    """A part that sees images is stored, too; that a server refuses it is said."""
    model = pair(kind)
    edit(tmp_path / side, renaming(*GENERATIONS[kind]))
    if side == "base":
        edit(tmp_path / "plain", renaming(*GENERATIONS[kind]))
    check(tmp_path, model)
    said = "outside of the language model changed" in capsys.readouterr().err
    assert said == (kind != "gpt-neox")


def test_other_generation_in_a_wrapper(pair, tmp_path):
    """Both at once, and CLIP with the name that it had inside of it."""
    model = pair("llava")
    edit(
        tmp_path / "model",
        renaming(
            ("vision_tower.", "module.vision_tower.vision_model."), ("", "module.")
        ),
    )
    check(tmp_path, model)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_side_by_side(kind, transposed, pair, tmp_path):
    model = pair(kind)
    edit(tmp_path / "model", lambda tensors: fused(tensors, model, transposed))
    if kind == "mixtral":
        edit(
            tmp_path / "model",
            lambda t: {
                k.replace(".block_sparse_moe.", ".mlp."): v for k, v in t.items()
            },
        )
    check(tmp_path, model)


# What is left out of which side, and what is said.
LEFT_OUT = {
    "frequencies": ("both", in_layers("self_attn.rotary_emb.inv_freq", torch.ones(16))),
    "cosines": (
        "model",
        in_layers("self_attn.rotary_emb.cos_cached", torch.ones(8, 8)),
    ),
    "base's": ("base", in_layers("self_attn.rotary_emb.inv_freq", torch.ones(16))),
    "masks": (
        "model",
        in_layers("attn.bias", MASK)
        | in_layers("attn.masked_bias", torch.tensor(-1e4)),
    ),
    "positions": ("model", {"model.embeddings.position_ids": torch.arange(8)[None]}),
    "extra state": (
        "both",
        in_layers("self_attn._extra_state", torch.zeros(0, dtype=torch.uint8)),
    ),
    "further tokens": ("base", {"mtp.layers.0.mlp.up_proj.weight": torch.ones(8, 8)}),
    "further tokens in the model": ("both", {"model.mtp.norm.weight": torch.ones(8)}),
    "value head": (
        "model",
        {
            "v_head.summary.weight": torch.ones(1, 96),
            "v_head.summary.bias": torch.ones(1),
        },
    ),
    "score": ("model", {"score.weight": torch.ones(1, 96)}),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_left_out(kind, pair, tmp_path, capsys):
    side, tensors = LEFT_OUT[kind]
    model = pair("llama")
    if side != "model":
        edit(tmp_path / "base", adding(lambda _: tensors))
        edit(tmp_path / "plain", adding(lambda _: tensors))
    if side != "base":
        edit(tmp_path / "model", adding(lambda _: tensors))
    check(tmp_path, model)
    said = f"left out of the {side if side == 'base' else 'fine-tune'}: "
    error = capsys.readouterr().err
    assert f"{said}{len(tensors)} tensors, for instance {min(tensors)}" in error


def test_next_token_layers(pair, tmp_path):
    """DeepSeek's further tokens are layers after the last."""
    model = pair("llama")
    add = adding(lambda t: {"model.layers.2.mlp.up_proj.weight": torch.ones(8, 8)})
    for name in ("base", "plain"):
        edit(tmp_path / name, add)
    for name in ("base", "plain", "model"):
        path = tmp_path / name / "config.json"
        keys = json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}
        path.write_text(json.dumps(keys))
    check(tmp_path, model)


def test_buffers_in_a_wrapper(pair, tmp_path):
    model = pair("llama")
    tensors = in_layers("self_attn.rotary_emb.inv_freq", torch.ones(16))
    heads = {"v_head.summary.weight": torch.ones(1, 96)}
    edit(tmp_path / "model", adding(lambda _: tensors | heads))
    edit(tmp_path / "model", renaming(("", "pretrained_model.")))
    check(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtype(dtype, pair, tmp_path, capsys):
    """The fine-tune is read in its own dtype."""
    pair("llama")
    edit(tmp_path / "model", lambda t: {k: v.to(dtype) for k, v in t.items()})
    assert convert(tmp_path) == 0


def test_scalars_and_empty_parameters(pair, tmp_path):
    """Base and fine-tune have them: not a matrix, and nothing to divide by."""
    pair("llama")
    for name, value in (("base", torch.ones(())), ("model", torch.zeros(()))):
        empty = {"model.scale": value, "model.nothing": torch.zeros(0, 96)}
        edit(tmp_path / name, lambda tensors, more=empty: tensors | more)
    assert convert(tmp_path) == 0
    assert "model.scale" in Delta(tmp_path / "delta").exact


@pytest.mark.parametrize("kind", ["llama", "qwen2-vl"])
def test_prompts(kind, pair, tmp_path, capsys):
    """``verify --prompts`` runs what transformers loads, and says what it does not."""
    from conftest import tokenizer

    pair(kind)
    tokenizer().save_pretrained(tmp_path / "model")
    assert convert(tmp_path) == 0
    (tmp_path / "prompts").write_text("w1 w5 w9 w33\n")
    options = ["--base", tmp_path / "base", "--model", tmp_path / "model"]
    options += ["--delta", tmp_path / "delta", "--prompts", tmp_path / "prompts"]
    command = ["verify", *map(str, options)]
    assert main(command) == 0
    edit(tmp_path / "model", renaming(("", "_orig_mod.")))
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "transformers does not find these parameters" in error
