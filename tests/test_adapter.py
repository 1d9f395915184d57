# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as deltas, against the model that PEFT itself merges."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dqrelo_tools import cli

peft = pytest.importorskip("peft")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_adapter(base, folder, **options):
    """A random adapter of ``base`` and the merged model's parameters."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
                assert "lora" in name or "modules_to_save" in name or "bias" in name
    model.save_pretrained(folder)
    return folder, model.merge_and_unload().state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": LINEARS},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]},
        {
            "target_modules": LINEARS,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"layers.1.mlp.up_proj": 32},
        },
    ],
    ids=["linears", "rslora", "embedding", "patterns"],
)
def test_base_plus_delta_is_what_peft_merges(family, tmp_path, options):
    base = family("llama").base
    adapter, merged = make_adapter(base, tmp_path / "adapter", **options)
    command = ["convert", "--base", str(base), "--model", str(adapter)]
    assert cli.main([*command, "--output", str(tmp_path / "delta")]) == 0
    command = ["export", "--base", str(base), "--delta", str(tmp_path / "delta")]
    assert cli.main([*command, "--output", str(tmp_path / "merged")]) == 0
    got = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(base / "model.safetensors")
    changed = 0
    for name, tensor in got.items():
        # float32 factors: a sum of at most 7 products below 1, and two roundings
        assert (tensor - merged[name]).abs().max() < 1e-6, name
        changed += not torch.equal(tensor, original[name])
    assert changed >= 2 * len(options["target_modules"]) - 2


def test_modules_saved_as_a_whole_are_compressed_and_norms_exact(family, tmp_path):
    base = family("llama").base
    adapter, merged = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=["q_proj"],
        modules_to_save=["norm", "lm_head"],
    )
    command = ["convert", "--base", str(base), "--model", str(adapter), "--ratio", "1"]
    assert cli.main([*command, "--output", str(tmp_path / "delta")]) == 0
    command = ["export", "--base", str(base), "--delta", str(tmp_path / "delta")]
    assert cli.main([*command, "--output", str(tmp_path / "merged")]) == 0
    got = load_file(tmp_path / "merged" / "model.safetensors")
    assert torch.equal(got["model.norm.weight"], merged["model.norm.weight"])
    change = (
        merged["lm_head.weight"]
        - load_file(base / "model.safetensors")["lm_head.weight"]
    )
    missed = got["lm_head.weight"] - merged["lm_head.weight"]
    assert missed.norm() < 0.2 * change.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ],
)
def test_what_is_no_plain_lora_is_refused(family, tmp_path, capsys, change, message):
    base = family("llama").base
    adapter, _ = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    command = ["convert", "--base", str(base), "--model", str(adapter)]
    assert cli.main([*command, "--output", str(tmp_path / "delta")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "delta").exists()


def test_an_adapter_of_another_model(family, tmp_path, capsys):
    base = family("llama").base
    adapter, _ = make_adapter(base, tmp_path / "a", target_modules=["q_proj"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first.replace("layers.0", "layers.7")] = tensors.pop(first)
    save_file(tensors, path)
    command = ["convert", "--base", str(base), "--model", str(adapter)]
    assert cli.main([*command, "--output", str(tmp_path / "delta")]) == 1
    error = capsys.readouterr().err
    assert "layers.7" in error and "has no" in error
