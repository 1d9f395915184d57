# SPDX-License-Identifier: Apache-2.0
"""A fine-tune whose parameters have other names than its base's: logits as trained."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from shapes import GROUPED, SHAPE, TIED, UNTIED
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
    said = "beside the language model changed" in capsys.readouterr().err
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


def fused(tensors: Tensors, model: PreTrainedModel, transposed: bool) -> Tensors:
    """Experts side by side, as the model has them in memory."""
    state = model.state_dict()
    kept = {k: v for k, v in tensors.items() if ".experts." not in k}
    experts = {k: v for k, v in state.items() if ".experts." in k}
    return kept | {k: v.mT if transposed else v for k, v in experts.items()}


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


def adding(make: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """More tensors, made from those that are there."""
    return lambda tensors: tensors | make(tensors)


def in_layers(name: str, tensor: torch.Tensor) -> Tensors:
    return {f"model.layers.{i}.{name}": tensor.clone() for i in range(2)}


MASK = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
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


# What cannot be taken, and what explains it.
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "bias": (
        "llama",
        adding(lambda t: in_layers("self_attn.q_proj.bias", torch.ones(96))),
        "the fine-tune has biases that the base does not have",
    ),
    "attention bias": (
        "llama",
        adding(lambda t: in_layers("self_attn.bias", torch.ones(96))),
        "2 of 23 parameters of the fine-tune are not in the base",
    ),
    "adapter": (
        "llama",
        adding(
            lambda t: in_layers(
                "self_attn.q_proj.lora_A.default.weight", torch.ones(4, 96)
            )
        ),
        "it is stored with an adapter inside. Merge the adapter",
    ),
    "adapter's base layers": (
        "llama",
        lambda t: {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in t.items()},
        "with an adapter inside",
    ),
    "optimizer": (
        "llama",
        adding(lambda t: {f"optimizer.exp_avg.{k}": v.clone() for k, v in t.items()}),
        "states of an optimizer",
    ),
    "mlx": (
        "llama",
        adding(lambda t: in_layers("self_attn.q_proj.scales", torch.ones(96, 2))),
        "its weights are quantised",
    ),
    "classifier": (
        "llama",
        lambda t: (
            {"score.weight": torch.ones(2, 96)}
            | {k: v for k, v in t.items() if k != "lm_head.weight"}
        ),
        "its weights are those of a classifier",
    ),
    "layers": (
        "llama",
        lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
        "the fine-tune has 1 layers, the base has 2",
    ),
    "language model": (
        "llava",
        lambda t: {k: v for k, v in t.items() if k.startswith("language_model")},
        "only the language model is there",
    ),
    "empty": (
        "llama",
        lambda t: {k: torch.zeros(0) if "proj" in k else v for k, v in t.items()},
        "14 parameters of the fine-tune are empty",
    ),
    "float8": (
        "llama",
        lambda t: {
            k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in t.items()
        },
        "is F8_E4M3, expected BF16, F16 or F32",
    ),
    "nothing in common": (
        "llama",
        lambda t: {f"tensor_{i}": v for i, v in enumerate(t.values())},
        "21 of 21 parameters of the base are not in the fine-tune",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, pair, tmp_path, capsys):
    """In few lines, led by what explains it, and nothing is left behind."""
    name, change, message = REFUSED[kind]
    pair(name)
    edit(tmp_path / "model", change)
    capsys.readouterr()
    assert convert(tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 5
    assert not (tmp_path / "delta").exists()


def test_square_experts(tmp_path, capsys):
    """One of two matrices says whether both are transposed; alone, it is refused."""
    config = {**GROUPED, **UNTIED, **EXPERTS, "moe_intermediate_size": 48}
    kind = transformers.Qwen3MoeForCausalLM
    base = kind(kind.config_class(**config))
    base.save_pretrained(tmp_path / "base")
    model = tuned(base)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "plain")
    edit(tmp_path / "model", lambda tensors: fused(tensors, model, transposed=True))
    check(tmp_path, model)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    down = {name: tensor for name, tensor in plain.items() if "down_proj" in name}
    edit(
        tmp_path / "model",
        lambda t: {k: v for k, v in t.items() if "down_proj" not in k} | down,
    )
    assert convert(tmp_path) == 1
    assert "its matrices are square" in capsys.readouterr().err


def test_base_with_experts_side_by_side(pair, tmp_path, capsys):
    model = pair("qwen3-moe")
    edit(tmp_path / "base", lambda tensors: fused(tensors, build("qwen3-moe"), False))
    assert convert(tmp_path) == 1
    assert "the base has its experts side by side" in capsys.readouterr().err
    edit(tmp_path / "model", lambda tensors: fused(tensors, model, False))
    assert convert(tmp_path) == 1
    assert "was changed: only vectors and matrices can be" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtype(dtype, pair, tmp_path, capsys):
    """Of the fine-tune: read as it is."""
    pair("llama")
    edit(tmp_path / "model", lambda t: {k: v.to(dtype) for k, v in t.items()})
    assert convert(tmp_path) == 0


def test_scalars_and_empty_parameters(pair, tmp_path):
    """Of both: no matrix, nothing to divide by."""
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
