# SPDX-License-Identifier: Apache-2.0
"""Adapters whose tensors are called otherwise than PEFT calls them on the base."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.adapters import (
    CONFIG,
    TENSORS,
    close,
    convert,
    edit,
    exported_logits,
    make_adapter,
    peft_logits,
)
from support.shapes import GROUPED, SHAPE

from dqrelo_tools import cli
from vllm_dqrelo.format.delta import Delta

Q = ["q_proj"]


def renamed(old, new):
    """An adapter's tensors with another spelling in their names."""
    return lambda tensors: {n.replace(old, new): v for n, v in tensors.items()}


P = "base_model.model."
SPELLINGS = {
    "names of adapters": renamed(".weight", ".default.weight"),
    "own names of adapters": renamed(".weight", ".mine.weight"),
    "as in the model": renamed(P, ""),
    "compiled": renamed(P, P + "_orig_mod."),
    "compiled by layer": renamed("layers.0.", "layers.0._orig_mod."),
    "FSDP": renamed("self_attn.", "_fsdp_wrapped_module.self_attn."),
    "checkpointed": renamed("layers.1.", "layers.1._checkpoint_wrapped_module."),
    "nested": renamed(P, P + P),
    "DDP": renamed(P, "module." + P),
    "value head": renamed(P, "pretrained_model." + P),
    "stored twice": lambda t: t | {n.replace(P, ""): v.clone() for n, v in t.items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_are_read_through(base, tmp_path, capsys, spelling):
    adapter = make_adapter(base("llama"), tmp_path / "adapter", target_modules=Q)
    assert convert(base("llama"), adapter, tmp_path / "plain") == 0
    assert "note: names" not in capsys.readouterr().err
    edit(adapter, SPELLINGS[spelling])
    assert convert(base("llama"), adapter, tmp_path / "delta") == 0
    notes = capsys.readouterr().err.count("names without wrappers: ")
    assert notes == (not spelling.endswith("names of adapters"))
    digests = {Delta(tmp_path / name).config.digest for name in ("plain", "delta")}
    assert len(digests) == 1


@pytest.mark.parametrize("prefix", ["thinker.", "language_model.", "a.b."])
def test_another_prefix(base, tmp_path, capsys, prefix):
    """That of the whole model, of which the base is a part."""
    adapter = make_adapter(base("llama"), tmp_path / "adapter", target_modules=Q)
    assert convert(base("llama"), adapter, tmp_path / "plain") == 0
    edit(adapter, renamed(P, P + prefix))
    assert convert(base("llama"), adapter, tmp_path / "delta") == 0
    assert "note: names as the base has them: 2, for" in capsys.readouterr().err
    digests = {Delta(tmp_path / name).config.digest for name in ("plain", "delta")}
    assert len(digests) == 1


def test_experts_one_by_one(base, tmp_path):
    """As PEFT saved them when transformers had a module for each."""
    folder = base("mixtral")
    names = ["q_proj", "w1", "w2", "w3"]
    torch.manual_seed(5)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(names)):
            n, k = tensor.shape
            tensors[f"{P}{module}.lora_A.weight"] = 0.1 * torch.randn(4, k)
            tensors[f"{P}{module}.lora_B.weight"] = 0.1 * torch.randn(n, 4)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / TENSORS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": names}
    (adapter / CONFIG).write_text(json.dumps(config))
    assert convert(folder, adapter, tmp_path / "delta") == 0
    want = peft_logits(folder, adapter)
    assert close(exported_logits(folder, tmp_path / "delta", tmp_path / "m"), want)


@pytest.fixture
def multimodal(tmp_path):
    """A base with a vision part, and a LoRA of its language part by PEFT."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"embed_dim": 64, "hidden_size": SHAPE["hidden_size"], "depth": 1}
    config = transformers.Qwen2VLConfig(
        text_config=GROUPED | {"rope_parameters": rope},
        vision_config=vision | {"num_heads": 2},
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).float()
    model.save_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj")
    trained = peft.get_peft_model(model, options)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(300)[None]
    with torch.no_grad():
        return tmp_path / "base", tmp_path / "adapter", trained.eval()(tokens).logits


GENERATIONS = {  # of the base and of the adapter: the published one, and today's
    "as made": ((), ()),
    "base published": ((("model.language_model.", "model."),), ()),
    "both published": (
        (("model.language_model.", "model."),),
        (("model.language_model.", "model."),),
    ),
    "adapter published": ((), (("model.language_model.", "model."),)),
    "of the language model alone": (
        (("model.language_model.", "language_model.model."),),
        (("model.language_model.", "model."),),
    ),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_another_generation_of_names(multimodal, tmp_path, generation):
    base, adapter, want = multimodal
    of_base, of_adapter = GENERATIONS[generation]
    for folder, file, pairs in (
        (base, "model.safetensors", (("model.visual.", "visual."), *of_base)),
        (adapter, TENSORS, of_adapter),
    ):
        tensors = load_file(folder / file)
        for old, new in pairs if of_base or folder == adapter else ():
            tensors = {name.replace(old, new): t for name, t in tensors.items()}
        save_file(tensors, folder / file, {"format": "pt"})
    edit(adapter, target_modules=Q)
    assert convert(base, adapter, tmp_path / "delta") == 0
    output = tmp_path / "merged"
    command = ["export", "--base", base, "--delta", tmp_path / "delta"]
    assert cli.main([*map(str, command), "--output", str(output)]) == 0
    kind = transformers.Qwen2VLForConditionalGeneration
    merged = kind.from_pretrained(output, dtype=torch.float32).eval()
    assert close(merged(torch.arange(300)[None]).logits, want)
