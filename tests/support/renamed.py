# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes whose parameters have other names than their base's, and what is right."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.shapes import GROUPED, SHAPE, TIED, UNTIED
from transformers import PreTrainedModel

from dqrelo_tools.cli import main
from vllm_dqrelo.format.delta import Delta

Tensors = dict[str, torch.Tensor]
PROMPT = torch.tensor([[1, 5, 9, 33, 200, 77, 3, 8]])
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
TEXT = {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
MROPE = {"rope_parameters": {**TEXT["rope_parameters"], "mrope_section": [4, 6, 6]}}
EXPERTS = {"moe_intermediate_size": 40, "num_experts": 4, "num_experts_per_tok": 2}

# name: (class, options of its config)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaForCausalLM", {**GROUPED, **UNTIED}),
    "llama-tied": ("LlamaForCausalLM", {**GROUPED, **TIED}),
    "gpt-neox": ("GPTNeoXForCausalLM", {**SHAPE, **UNTIED}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, **UNTIED}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, **UNTIED, "num_local_experts": 3}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {**GROUPED, **UNTIED, **EXPERTS}),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {
                "embed_dim": 64,
                "hidden_size": SHAPE["hidden_size"],
                "depth": 1,
                "num_heads": 2,
            },
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {
                "hidden_size": 64,
                "out_hidden_size": SHAPE["hidden_size"],
                "depth": 1,
                "num_heads": 2,
                "intermediate_size": 64,
            },
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
        },
    ),
    "llava-tied": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {**TEXT, **TIED, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            **TIED,
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {"text_config": {**GROUPED, "head_dim": 32}, "vision_config": VISION},
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": VISION,
            "pad_token_id": 0,
        },
    ),
}


def build(name: str) -> PreTrainedModel:
    """A random model."""
    torch.manual_seed(0)
    kind = getattr(transformers, MODELS[name][0])
    return kind(kind.config_class(**copy.deepcopy(MODELS[name][1]))).float().eval()


def tuned(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every parameter moved."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROMPT).logits[0].float()


def edit(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a checkpoint in place."""
    path = folder / "model.safetensors"
    tensors = {k: v.contiguous() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def renaming(*pairs: tuple[str, str]) -> Callable[[Tensors], Tensors]:
    """Replace what names begin with; the first pair that fits."""

    def rename(name: str) -> str:
        for old, new in pairs:
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

    return lambda tensors: {rename(name): t for name, t in tensors.items()}


def convert(root: Path, model: str = "model") -> int:
    shutil.rmtree(root / "delta", ignore_errors=True)
    arguments = ["--base", root / "base", "--model", root / model]
    output = ["--output", root / "delta", "--ratio", "1"]
    return main(["convert", *map(str, arguments + output)])


def check(root: Path, model: PreTrainedModel) -> None:
    """The delta is that of the fine-tune with the base's names, to the bit.

    Exported, its logits are the fine-tune's, but for what 4-bit factors leave.
    """
    assert convert(root, "plain") == 0
    expected = Delta(root / "delta").config.digest
    assert convert(root) == 0
    assert Delta(root / "delta").config.digest == expected
    arguments = ["--base", root / "base", "--delta", root / "delta"]
    given = ["--model", root / "model"]
    assert main(["verify", *map(str, arguments + given)]) == 0
    shutil.rmtree(root / "merged", ignore_errors=True)
    output = ["--output", root / "merged"]
    assert main(["export", *map(str, arguments + output)]) == 0
    kind = type(model)
    expected = logits(model)
    before = (logits(kind.from_pretrained(root / "base")) - expected).abs().max()
    merged, loading = kind.from_pretrained(root / "merged", output_loading_info=True)
    assert not loading["missing_keys"]
    after = (logits(merged) - expected).abs().max()
    assert before > 0.05
    assert after < before / 10


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[str], PreTrainedModel]:
    """Save a base and a fine-tune, twice: one of them stays as it is saved."""

    def save(name: str) -> PreTrainedModel:
        base = build(name)
        model = tuned(base)
        base.save_pretrained(tmp_path / "base")
        model.save_pretrained(tmp_path / "model")
        model.save_pretrained(tmp_path / "plain")
        return model

    return save


def within(layer: str) -> Callable[[Tensors], Tensors]:
    """A wrapper inside of names, as activation checkpointing puts it there."""
    return lambda tensors: {
        name.replace(".self_attn.", f".{layer}.self_attn.").replace(
            ".mlp.", f".{layer}.mlp."
        ): tensor
        for name, tensor in tensors.items()
    }


def adding(make: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """More tensors, made from those that are there."""
    return lambda tensors: tensors | make(tensors)


def in_layers(name: str, tensor: torch.Tensor) -> Tensors:
    return {f"model.layers.{i}.{name}": tensor.clone() for i in range(2)}


MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()


def fused(tensors: Tensors, model: PreTrainedModel, transposed: bool) -> Tensors:
    """Experts side by side, as the model has them in memory."""
    state = model.state_dict()
    kept = {k: v for k, v in tensors.items() if ".experts." not in k}
    experts = {k: v for k, v in state.items() if ".experts." in k}
    return kept | {k: v.mT if transposed else v for k, v in experts.items()}
