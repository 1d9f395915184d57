# SPDX-License-Identifier: Apache-2.0
"""Random adapters of small models as PEFT saves them, and PEFT's answer of each."""

import json
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dqrelo_tools import cli
from dqrelo_tools.adapter import Adapter
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint
from vllm_dqrelo.format.tensors import ADDED

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = torch.arange(312).reshape(8, 39)  # the tests' vocabulary but for its end

# float32 logits of two layers: sums of 200 products each, in another order
TOLERANCE = 1e-5


def load_model(folder, rows=0):
    """A model, with ``rows`` more or fewer in its vocabulary, equal in each run."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if rows:
        torch.manual_seed(11)
        model.resize_token_embeddings(
            model.config.vocab_size + rows, mean_resizing=False
        )
    return model


def make_adapter(base, folder, rows=0, seed=5, **options):
    """Train an adapter of ``base`` at random and save it as PEFT does."""
    model = load_model(base, rows)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options
    )
    torch.manual_seed(seed)  # PEFT draws A
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def edit(folder, change=None, **config):
    """Change an adapter's tensors by a function, and keys of its configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if change:
        tensors = change(load_file(folder / TENSORS))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / TENSORS)
    return folder


@torch.no_grad()
def peft_logits(base, adapter, rows=0, tokens=TOKENS):
    """What PEFT computes with the saved adapter."""
    model = peft.PeftModel.from_pretrained(load_model(base, rows), adapter)
    return model.eval()(tokens).logits


@torch.no_grad()
def opened_logits(base, adapter, tokens=TOKENS):
    """What the model computes as which the adapter is opened, before compression."""
    before = Checkpoint(base)
    opened = Adapter(adapter, before, [str(base)])
    state = {name: before.get(name) for name in before}
    for name in opened:
        value = opened.get(name)
        if name.endswith(ADDED):
            name = name.removesuffix(ADDED)
            value = torch.cat((state[name], value))
        state[name] = value.float()
    config = AutoConfig.from_pretrained(base)
    config.tie_word_embeddings = HEAD not in state
    for name in {"model.embed_tokens.weight", HEAD} & state.keys():
        state[name] = state[name][: opened.vocab_size]
        config.vocab_size = len(state[name])
    model = AutoModelForCausalLM.from_config(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {*missing} <= {HEAD}
    return model.eval()(tokens).logits


@torch.no_grad()
def exported_logits(base, delta, output, tokens=TOKENS):
    """What base + delta computes, exported."""
    command = ["export", "--base", str(base), "--delta", str(delta)]
    assert cli.main([*command, "--output", str(output)]) == 0
    return load_model(output).eval()(tokens).logits


def convert(base, adapter, output, *options):
    """The exit code of a conversion at ratio 1."""
    command = ["convert", "--base", base, "--model", adapter, "--output", output]
    return cli.main([*map(str, command), "--ratio", "1", *options])


def error_of(base, adapter, capsys):
    """The message that refuses an adapter; nothing is left of the conversion."""
    before = sorted(Path(adapter).parent.iterdir())
    capsys.readouterr()
    assert convert(base, adapter, Path(adapter).parent / "delta") == 1
    assert sorted(Path(adapter).parent.iterdir()) == before
    _, _, error = capsys.readouterr().err.rpartition("dqrelo: error: ")
    return error


def close(got, want):
    """Whether logits are equal but for the order of sums."""
    assert got.shape == want.shape
    return float((got - want).abs().max()) <= TOLERANCE * (1 + float(want.abs().max()))
