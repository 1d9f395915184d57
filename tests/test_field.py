# SPDX-License-Identifier: Apache-2.0
"""What people bring is converted to what it computes, or refused with the cause."""

import re
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from support import field
from support import trainers as _  # noqa: F401  the rest of field.CASES
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from dqrelo_tools import cli

# Matrices keep 96 % of their change at --ratio 1 (4-bit factors and two sign planes);
# 15 of them, through two layers. A tensor that is left out costs far more.
LOST = 0.2
# Tokens that all of the models have.
IDS = torch.arange(3, 67).reshape(2, 32)


def logits(folder, base):
    """What transformers, or PEFT, computes of a model folder: [2, 32, vocabulary]."""
    config = AutoConfig.from_pretrained(base)
    kind = AutoModelForImageTextToText if config.sub_configs else AutoModelForCausalLM
    load = kind.from_pretrained
    if (folder / "adapter_config.json").is_file():
        model = load(base, dtype=torch.float32)
        stored = load_file(folder / "adapter_model.safetensors")
        head = stored.get("base_model.model.lm_head.weight")
        if head is not None:  # whoever loads such an adapter resizes the base first
            model.resize_token_embeddings(len(head), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(model, folder)
    else:
        model = load(folder, dtype=torch.float32, return_dict=True)
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("name", field.CASES)
def test_field(name, tmp_path, capsys):
    refusal = field.CASES[name](tmp_path)
    base, model, delta = (tmp_path / part for part in ("base", "model", "delta"))
    command = ["convert", "--base", base, "--model", model, "--output", delta]
    before = {*tmp_path.iterdir()}
    capsys.readouterr()
    code = cli.main([*map(str, command), "--ratio", "1"])
    said = capsys.readouterr()
    if refusal:
        (line,) = re.findall("^dqrelo: error: (?:.|\n)*", said.err, re.M)
        assert code == 1 and re.search(refusal, line) and not said.out, said
        assert {*tmp_path.iterdir()} == before
        return
    assert code == 0, said.err
    merged = tmp_path / "merged"
    command = ["export", "--base", base, "--delta", delta, "--output", merged]
    assert cli.main([*map(str, command)]) == 0
    oracle = tmp_path / "oracle" if (tmp_path / "oracle").is_dir() else model
    expected, got, plain = (logits(f, base) for f in (oracle, merged, base))
    assert got.shape == expected.shape
    known = min(expected.shape[-1], plain.shape[-1])
    change = (expected[..., :known] - plain[..., :known]).abs().max()
    assert (got - expected).abs().max() < LOST * change


def test_the_documents_name_every_case():
    text = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text()
    assert set(re.findall(r"`field:(\w+)`", text)) == set(field.CASES)
    files = set(re.findall(r"`(test_\w+\.py)`", text))
    assert files and all((Path(__file__).parent / name).is_file() for name in files)
