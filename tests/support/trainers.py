# SPDX-License-Identifier: Apache-2.0
"""What trainers and their tools write: more of ``field.CASES``."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.field import (
    EQUAL,
    Tensors,
    case,
    change_config,
    change_weights,
    pair,
    random_model,
    respelled,
    tuned,
)


@case
def transformers_trainer(folder: Path) -> str:
    """Its folder has pickles of the optimizer, and earlier checkpoints."""
    _, model = pair(folder)
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth"):
        (model / name).write_bytes(b"pickle")
    (model / "trainer_state.json").write_text("{}")
    shutil.copytree(model, model / "checkpoint-500")
    return EQUAL


@case
def trl_with_a_value_head(folder: Path) -> str:
    model = respelled(folder, "pretrained_model.{}".format)
    head = {"v_head.summary.weight": torch.ones(1, 128)}
    change_weights(model, lambda t: t | head | {"v_head.summary.bias": torch.ones(1)})
    return EQUAL


@case
def trl_reward_model(folder: Path) -> str:
    _, model = pair(folder)
    change_config(model, architectures=["LlamaForSequenceClassification"])

    def change(tensors: Tensors) -> Tensors:
        kept = {k: v for k, v in tensors.items() if not k.startswith("lm_head")}
        return kept | {"score.weight": torch.ones(1, 128)}

    change_weights(model, change)
    return "ForSequenceClassification"


@case
def chat_tokens_added(folder: Path) -> str:
    """As by TRL's setup_chat_format: two tokens, padded to a multiple of 64."""
    base = random_model()
    base.save_pretrained(folder / "base")
    model = tuned(base)
    torch.manual_seed(5)
    model.resize_token_embeddings(514, pad_to_multiple_of=64, mean_resizing=False)
    model.save_pretrained(folder / "model")
    return EQUAL


@case
def axolotl_compiled_in_parallel(folder: Path) -> str:
    respelled(folder, "module._orig_mod.{}".format)
    return EQUAL


@case
def activations_checkpointed(folder: Path) -> str:
    def wrapped(name: str) -> str:
        return name.replace(".mlp.", "._checkpoint_wrapped_module.mlp.")

    respelled(folder, lambda name: f"_fsdp_wrapped_module.{wrapped(name)}")
    return EQUAL


@case
def llama_factory(folder: Path) -> str:
    _, model = pair(folder)
    (model / "Modelfile").write_text("FROM .")
    (model / "all_results.json").write_text("{}")
    change_config(model, use_cache=False, attention_dropout=0.1)
    return EQUAL


@case
def unsloth_merged(folder: Path) -> str:
    """Its config.json kept how the base was quantised for training."""
    _, model = pair(folder)
    shutil.copytree(model, folder / "oracle")
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    stamps = {"unsloth_version": "2025.3.1", "unsloth_fixed": True}
    change_config(model, quantization_config=how, **stamps)
    return EQUAL


def sharded(model: Path, name: str, index: str | None) -> None:
    """Two files in the place of model.safetensors, with an index or without."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, some in enumerate((names[::2], names[1::2]), start=1):
        file = name.format(number)
        save_file({k: tensors[k] for k in some}, model / file, {"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (model / index).write_text(text)


@case
def unsloth_shards_without_an_index(folder: Path) -> str:
    _, model = pair(folder)
    sharded(model, "model-0000{}-of-00002.safetensors", None)
    return "without their index"


@case
def unsloth_in_4_bits(folder: Path) -> str:
    _, model = pair(folder)
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_config(model, quantization_config=how)

    def change(tensors: Tensors) -> Tensors:
        name = "model.layers.0.mlp.up_proj.weight"
        packed = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
        return tensors | {name: packed, f"{name}.absmax": torch.ones(512)}

    change_weights(model, change)
    return "bitsandbytes"


@case
def deepspeed_placeholders(folder: Path) -> str:
    """ZeRO-3 without gathering saves tensors without elements."""
    _, model = pair(folder)
    change_weights(model, lambda t: {k: torch.empty(0) for k in t})
    return "zero_to_fp32"


@case
def deepspeed_gathered(folder: Path) -> str:
    model = respelled(folder, "module.{}".format)
    (model / "zero_to_fp32.py").write_text("")
    (model / "global_step500").mkdir()
    return EQUAL


@case
def deepspeed_shards(folder: Path) -> str:
    _, model = pair(folder)
    (model / "model.safetensors").unlink()
    (model / "zero_to_fp32.py").write_text("")
    (model / "global_step500").mkdir()
    return "zero_to_fp32"


@case
def torchtune(folder: Path) -> str:
    _, model = pair(folder)
    shutil.copytree(model, folder / "oracle")
    index = "model.safetensors.index.json"
    sharded(model, "ft-model-0000{}-of-00002.safetensors", index)
    return EQUAL


@case
def torchtune_above_its_epoch(folder: Path) -> str:
    _, model = pair(folder)
    model.rename(folder / "epoch_0")
    model.mkdir()
    (folder / "epoch_0").rename(model / "epoch_0")
    return "epoch_0"


@case
def torchtune_consolidated(folder: Path) -> str:
    _, model = pair(folder)
    (model / "model.safetensors").unlink()
    (model / "consolidated.00.pth").write_bytes(b"x")
    (model / "params.json").write_text("{}")
    return "consolidated"


@case
def mergekit(folder: Path) -> str:
    """In 16 bits, with a copy of the tied head and the tokenizer's vocabulary."""
    base = random_model(tie_word_embeddings=True).bfloat16()
    _, model = pair(folder, base)
    change_config(model, vocab_size=500)

    def change(tensors: Tensors) -> Tensors:
        embedding = tensors["model.embed_tokens.weight"][:500]
        copies = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding}
        return tensors | {name: value.clone() for name, value in copies.items()}

    change_weights(model, change)
    (model / "mergekit_config.yml").write_text("merge_method: linear")
    return EQUAL
