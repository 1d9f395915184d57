# SPDX-License-Identifier: Apache-2.0
"""Deltas that need more room than a server has by default, and what makes room."""

import argparse
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

TOLERANCE = 1e-4  # as in test_serving.py
DEFAULT = 2 * 33  # of gate and up, 200 x 96 each: n k / 2 / (n + k)
KINDS = {
    "0.25": {"ratio": 0.25},
    "0.5": {"ratio": 0.5},
    "1": {"ratio": 1.0},
    "paper 0.25": {"ratio": 0.25, "method": "dqrelo-paper"},
    "paper 0.5": {"ratio": 0.5, "method": "dqrelo-paper"},
    "paper 1": {"ratio": 1.0, "method": "dqrelo-paper"},
    "budget": {"ratio": 0.0, "budget": 400_000},
    "adapter": {"ratio": 0.125},
    "added": {"ratio": 0.5},
}


@pytest.fixture(scope="session")
def wide(family, save_model, tmp_path_factory):
    """A base, and by kind a delta that takes more than the default, with its export."""
    base, root = family("llama").base, tmp_path_factory.mktemp("wide")
    made = {}
    for i, (kind, options) in enumerate(KINDS.items()):
        name = kind.replace(" ", "-")
        model = root / f"model-{name}"
        if kind == "adapter":
            adapter(base, model)
        else:
            more = 5 if kind == "added" else 0
            save_model("llama", model, seed=50 + i, added_tokens=more)
        delta = root / name
        convert(str(base), str(model), delta, **options)
        for file in [*delta.glob("tokenizer*")]:  # LLM has one tokenizer in a call
            file.unlink()
        export(str(base), delta, root / f"merged-{name}")
        made[kind] = (delta, root / f"merged-{name}")
    return base, made


def adapter(base, folder):
    """r = 128 on all linears of a model that is 96 wide."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(
        r=128, lora_alpha=16, target_modules="all-linear", init_lora_weights=False
    )
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def arguments(base, deltas=(), **options):
    """The arguments of ``vllm serve`` that make_room looks at."""
    modules = [SimpleNamespace(name=n, path=str(path)) for n, path in deltas]
    given = {
        "quantization": "dqrelo",
        "model_tag": str(base),
        "model": "",
        "revision": None,
        "served_model_name": None,
        "lora_modules": modules,
        "max_loras": 1,
        "additional_config": {},
    }
    return argparse.Namespace(**given | options)


def made_room(*given, **options) -> dict:
    """The dqrelo options that a server starts with."""
    from vllm_dqrelo.frontend.start import make_room

    parsed = arguments(*given, **options)
    make_room(parsed)
    return parsed.additional_config.get("dqrelo", {})


def suggested(message) -> dict:
    """The options that an error says to start with."""
    text = re.search(r"--additional-config '(.*?)'", message)[1]
    return json.loads(text)["dqrelo"]
