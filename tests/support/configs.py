# SPDX-License-Identifier: Apache-2.0
"""What the tests of config.json share: models of it, and what is said of two."""

import copy
import json
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dqrelo_tools.configs import config_differences
from vllm_dqrelo.format.model_config import INERT, ModelConfig

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 20, 21, 22, 23, 24, 25, 26, 27, 28]])
ABSENT = object()
# Keys of how weights are stored and outputs returned: no model is built with others.
NOT_BUILT = {
    "compression_config",
    "dtype",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "use_return_dict",
}
# Values of keys that change no logits, where 3 would not do.
VALUES = {
    "architectures": ["FSDPLlamaForCausalLM"],
    "attn_implementation": "sdpa",  # the default; eager rounds otherwise
    "_attn_implementation": "sdpa",
    "auto_map": {"AutoConfig": "elsewhere--configuration_x.XConfig"},
    "bos_token_id": 9,
    "eos_token_id": [9, 10],
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "num_labels": 3,
    "pad_token_id": 9,
    "problem_type": "regression",
    "sep_token_id": 9,
    "experts_implementation": "eager",
    "initializer_range": 0.9,
    "output_hidden_states": True,
    "output_router_logits": True,
    "init_std": 0.9,
    "router_aux_loss_coef": 0.9,
    "use_cache": False,
    "_name_or_path": "someone/else",
}


def compare(base: dict, model: dict) -> list[str]:
    pair = [
        ModelConfig(f"{name}/config.json", raw)
        for name, raw in zip("ab", (base, model), strict=True)
    ]
    return config_differences(*pair)


def said(caplog) -> list:
    """What the tools said, and not transformers."""
    return [r for r in caplog.records if r.name.startswith("dqrelo_tools")]


def changed(config: dict, changes: dict) -> dict:
    """With other values under dotted keys; ABSENT takes a key out."""
    config = copy.deepcopy(config)
    for dotted, value in changes.items():
        *parts, key = dotted.split(".") if dotted not in INERT else [dotted]
        level = config
        for part in parts:
            level = level[part]
        level.pop(key, None)
        if value is not ABSENT:
            level[key] = value
    return config


def parsed(config: dict):
    return CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))


def saved_again(config: dict, use_diff: bool = True) -> dict:
    """What transformers writes when it saves a model of that config."""
    return json.loads(parsed(config).to_json_string(use_diff=use_diff))


def build(config: dict) -> torch.nn.Module:
    """A model in float32; the weights are the same for the same shapes."""
    vision = "vision_config" in config
    kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
    read = parsed(config)
    read.dtype = read.get_text_config().dtype = None
    model = kind.from_config(read, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def logits(config: dict) -> torch.Tensor:
    output = build(config)(TOKENS)
    return output[0] if isinstance(output, tuple) else output.logits


def rounding(logits: torch.Tensor) -> torch.Tensor:
    """What float32 sums of 128 terms, the longest here, differ by in another order."""
    return 128 * torch.finfo(torch.float32).eps * logits.abs().max()


def save(model, folder: Path, config: dict | None = None) -> Path:
    model.save_pretrained(folder)
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder
