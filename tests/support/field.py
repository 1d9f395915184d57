# SPDX-License-Identifier: Apache-2.0
"""Small inputs of the kinds that people bring: a base, a fine-tune, and what is right.

``CASES`` has a function for each. It is given an empty folder, writes ``base`` and
``model`` there, and returns what is right: the words of a refusal, or ``EQUAL``. Where
transformers cannot read ``model``, ``oracle`` is the same model as transformers has it.
"""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

EQUAL = ""
TEXT = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

Tensors = dict[str, torch.Tensor]
CASES: dict[str, Callable[[Path], str]] = {}


def case(make: Callable[[Path], str]) -> Callable[[Path], str]:
    """Put a function into ``CASES``."""
    CASES[make.__name__] = make
    return make


def random_model(kind: str = "Llama", **options: Any) -> Any:
    """A model of random weights, float32."""
    torch.manual_seed(0)
    of = {"tie_word_embeddings": False, "initializer_range": 0.2} | options
    config = getattr(transformers, f"{kind}Config")(**TEXT, **TOKENS, **of)
    return getattr(transformers, f"{kind}ForCausalLM")(config).float()


def tuned(model: Any, seed: int = 1) -> Any:
    """A copy with other values everywhere."""
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def pair(folder: Path, base: Any = None) -> tuple[Path, Path]:
    """A base and its fine-tune, saved."""
    base = base or random_model()
    base.save_pretrained(folder / "base")
    tuned(base).save_pretrained(folder / "model")
    return folder / "base", folder / "model"


def respelled(folder: Path, change: Callable[[str], str], base: Any = None) -> Path:
    """A fine-tune whose tensors are called otherwise, and its oracle."""
    _, model = pair(folder, base)
    shutil.copytree(model, folder / "oracle")
    change_weights(model, lambda t: {change(name): v for name, v in t.items()})
    return model


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json; ``...`` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    path.write_text(json.dumps(kept, indent=2))


def change_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Replace the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = {k: v.contiguous() for k, v in change(load_file(path)).items()}
    save_file(tensors, path, {"format": "pt"})


def publish(folder: Path, **keys: Any) -> None:
    """Give a folder the config.json that transformers 4 wrote."""
    new = {"head_dim": ..., "rope_parameters": ..., "dtype": ...}
    change_config(folder, torch_dtype="float32", **new, **keys)


def published(folder: Path, base: Any, **keys: Any) -> str:
    """A base with the config.json of transformers 4, its fine-tune with today's."""
    base.save_pretrained(folder / "base")
    publish(folder / "base", **keys)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tuned(loaded).save_pretrained(folder / "model")
    return EQUAL


# config.json

LLAMA_3_1 = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}


@case
def llama_3_1(folder: Path) -> str:
    return published(folder, random_model(), **LLAMA_3_1)


@case
def mistral(folder: Path) -> str:
    keys = {"rope_theta": 10000.0, "sliding_window": 4096}
    return published(folder, random_model("Mistral"), **keys)


@case
def fsdp_architecture(folder: Path) -> str:
    _, model = pair(folder)
    change_config(model, architectures=["FSDPLlamaForCausalLM"])
    return EQUAL


@case
def trainer_stamps(folder: Path) -> str:
    _, model = pair(folder)
    stamps = {"gradient_checkpointing": True, "output_hidden_states": True}
    change_config(model, pretraining_tp=2, return_dict=False, **stamps)
    return EQUAL


@case
def another_window(folder: Path) -> str:
    _, model = pair(folder, random_model("Mistral"))
    change_config(model, sliding_window=8)
    return "sliding_window"


# Names


@case
def compiled(folder: Path) -> str:
    respelled(folder, "_orig_mod.{}".format)
    return EQUAL


@case
def inv_freq(folder: Path) -> str:
    _, model = pair(folder)
    names = (f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2))
    buffers = {name: torch.ones(16) for name in names}
    change_weights(model, lambda t: t | buffers)
    return EQUAL


@case
def qwen2_vl_as_published(folder: Path) -> str:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    vision = {"embed_dim": 64, "hidden_size": 128, "depth": 1, "num_heads": 2}
    text = {**TEXT, "rope_parameters": rope}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    base, _ = pair(folder, transformers.Qwen2VLForConditionalGeneration(config).float())

    def old(name: str) -> str:
        name = name.replace("model.language_model.", "model.")
        return name.replace("model.visual.", "visual.")

    change_weights(base, lambda t: {old(name): v for name, v in t.items()})
    return EQUAL


# Tied embeddings


def tied_with_head(folder: Path, noise: float) -> str:
    _, model = pair(folder, random_model(tie_word_embeddings=True))

    def change(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"]
        head = embedding + noise * torch.randn(embedding.shape)
        return tensors | {"lm_head.weight": head}

    change_weights(model, change)
    return EQUAL


@case
def tied_head_trained(folder: Path) -> str:
    return tied_with_head(folder, 0.05)


@case
def tied_head_saved_twice(folder: Path) -> str:
    return tied_with_head(folder, 0)


# Vocabulary


@case
def fewer_rows(folder: Path) -> str:
    _, model = pair(folder)
    change_config(model, vocab_size=500)
    change_weights(
        model, lambda t: {k: v[:500] if len(v) == 512 else v for k, v in t.items()}
    )
    return EQUAL


# Folders


@case
def only_a_checkpoint(folder: Path) -> str:
    _, model = pair(folder)
    model.rename(folder / "checkpoint-500")
    model.mkdir()
    (folder / "checkpoint-500").rename(model / "checkpoint-500")
    return "checkpoint-500"


@case
def gguf(folder: Path) -> str:
    _, model = pair(folder)
    (model / "model.safetensors").unlink()
    (model / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    return "GGUF"


@case
def fsdp_shards(folder: Path) -> str:
    _, model = pair(folder)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model_fsdp_0").mkdir()
    (model / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    return "merge-weights"


@case
def torn_generation_config(folder: Path) -> str:
    _, model = pair(folder)
    (model / "generation_config.json").write_text("{")
    return "generation_config.json"


@case
def eos_is_a_string(folder: Path) -> str:
    _, model = pair(folder)
    (model / "generation_config.json").write_text('{"eos_token_id": "2"}')
    return "eos_token_id"


# Adapters

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def adapter(folder: Path, tensors: Tensors, **options: Any) -> Path:
    """A LoRA adapter of q_proj of the first layer, written by hand."""
    random_model().save_pretrained(folder / "base")
    model = folder / "model"
    model.mkdir()
    save_file(tensors, model / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    config |= {"target_modules": ["q_proj"]} | options
    (model / "adapter_config.json").write_text(json.dumps(config))
    return model


def factors(columns: int = 128) -> Tensors:
    torch.manual_seed(3)
    a, b = torch.randn(4, columns), torch.randn(columns, 4)
    return {f"{Q_PROJ}.lora_A.weight": 0.1 * a, f"{Q_PROJ}.lora_B.weight": b}


@case
def adapter_of_rank_0(folder: Path) -> str:
    adapter(folder, factors(), r=0)
    return "r is 0"


@case
def adapter_of_a_wider_model(folder: Path) -> str:
    adapter(folder, factors(256))
    return r"256.*128"


@case
def adapter_with_a_bias(folder: Path) -> str:
    """The base has no bias there, so that a delta has no place for it."""
    bias = {f"{Q_PROJ}.lora_B.bias": torch.randn(128)}
    adapter(folder, factors() | bias, lora_bias=True)
    return "bias"


@case
def adapter_with_added_tokens(folder: Path) -> str:
    base, whole = random_model().state_dict(), {}
    torch.manual_seed(3)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = torch.nn.functional.pad(base[name], (0, 0, 0, 4))
        whole[f"base_model.model.{name}"] = rows + 0.05 * torch.randn(rows.shape)
    adapter(folder, factors() | whole)
    return EQUAL


@case
def adapter_of_another_name(folder: Path) -> str:
    adapter(folder, factors(), base_model_name_or_path="someone/else-7B")
    return EQUAL


def trained(folder: Path, tied: bool, **options: Any) -> None:
    """An adapter that PEFT makes and saves."""
    random_model(tie_word_embeddings=tied).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(base, config)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape)
    model.eval().save_pretrained(folder / "model")


@case
def lora_on_a_tied_embedding(folder: Path) -> str:
    trained(folder, True, target_modules=["q_proj", "embed_tokens"])
    return EQUAL


@case
def ensure_weight_tying(folder: Path) -> str:
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained(folder, True, target_modules=["q_proj"], **options)
    return EQUAL


@case
def pissa(folder: Path) -> str:
    trained(folder, False, target_modules=["q_proj"], init_lora_weights="pissa")
    return "pissa"
