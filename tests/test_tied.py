# SPDX-License-Identifier: Apache-2.0
"""LM heads that are the embedding, or not: what transformers loads is what is served.

The oracle is transformers, which loads the fine-tune from its folder.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.engines import free
from support.renamed import build, edit, logits, renaming, tuned
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from dqrelo_tools.cli import main
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint
from vllm_dqrelo.format.delta import Delta

EMBEDDING = "model.embed_tokens.weight"


def config(folder: Path, **keys) -> None:
    """Change keys of a config.json; a key is deleted by None."""
    path = folder / "config.json"
    changed = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({k: v for k, v in changed.items() if v is not None}))


def run(command: str, root: Path, *options: object) -> int:
    given = ["--base", root / "base", *options]
    return main([command, *map(str, given)])


def check(root: Path, auto=AutoModelForCausalLM) -> Delta:
    """Base + delta is what transformers makes of the fine-tune; the delta."""
    shutil.rmtree(root / "delta", ignore_errors=True)
    model = ["--model", root / "model"]
    output = ["--output", root / "delta", "--ratio", 1]
    assert run("convert", root, *model, *output) == 0
    delta = ["--delta", root / "delta"]
    assert run("verify", root, *delta, *model) == 0
    assert run("export", root, *delta, "--output", root / "merged") == 0
    expected = logits(auto.from_pretrained(root / "model").eval())
    plain = logits(auto.from_pretrained(root / "base").eval())
    got = logits(auto.from_pretrained(root / "merged").eval())
    assert (got - expected).abs().max() < (plain - expected).abs().max() / 10
    return Delta(root / "delta")


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tied base and its tied fine-tune."""
    base = build("llama-tied")
    base.save_pretrained(tmp_path / "base")
    tuned(base).save_pretrained(tmp_path / "model")
    return tmp_path


def with_head(tensors, scale: float = 0.0, name: str = HEAD):
    """A head beside the embedding, of its values but for ``scale``."""
    torch.manual_seed(3)
    embedding = tensors[EMBEDDING]
    return tensors | {name: embedding + scale * torch.randn_like(embedding)}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_equal_head(tied, prefix, capsys):
    """Stored twice, it is the tied one."""
    edit(tied / "model", with_head)
    edit(tied / "model", renaming(("", prefix)))
    if not prefix:
        assert HEAD not in check(tied).matrices
    else:  # which transformers does not load
        output = ["--output", tied / "delta"]
        assert run("convert", tied, "--model", tied / "model", *output) == 0
        assert HEAD not in Delta(tied / "delta").matrices
    assert "unti" not in capsys.readouterr().err


def test_trained_head(tied, capsys):
    """A head of other values unties the fine-tune, as transformers does it."""
    edit(tied / "model", lambda tensors: with_head(tensors, 0.05))
    assert HEAD in check(tied).matrices
    assert f"{HEAD} of the fine-tune has other values" in capsys.readouterr().err


def test_trained_head_in_a_wrapper(tied):
    """The same delta as without the wrapper."""
    edit(tied / "model", lambda tensors: with_head(tensors, 0.05))
    digest = check(tied).config.digest
    edit(tied / "model", renaming(("", "_orig_mod.")))
    shutil.rmtree(tied / "delta")
    output = ["--output", tied / "delta", "--ratio", 1]
    assert run("convert", tied, "--model", tied / "model", *output) == 0
    assert Delta(tied / "delta").config.digest == digest


def test_head_alone(tied):
    """Where only the head is stored, transformers takes it for the embedding."""
    edit(
        tied / "model",
        lambda t: {HEAD if name == EMBEDDING else name: x for name, x in t.items()},
    )
    delta = check(tied)
    assert EMBEDDING in delta.matrices
    assert HEAD not in delta.matrices


def test_untied_fine_tune_of_a_tied_base(tied):
    edit(tied / "model", lambda tensors: with_head(tensors, 0.05))
    config(tied / "model", tie_word_embeddings=False)
    assert HEAD in check(tied).matrices


def test_tied_fine_tune_of_an_untied_base(tied):
    edit(tied / "base", lambda tensors: with_head(tensors, 0.05))
    config(tied / "base", tie_word_embeddings=False)
    assert HEAD in check(tied).matrices


def test_head_that_is_not_stored(tied, capsys):
    """transformers would start with random values."""
    config(tied / "model", tie_word_embeddings=False)
    output = ["--output", tied / "delta"]
    assert run("convert", tied, "--model", tied / "model", *output) == 1
    assert "has no LM head, and its config.json" in capsys.readouterr().err
    assert not (tied / "delta").exists()


def test_equal_head_of_the_base(tied):
    """The fingerprint does not know it."""
    fingerprint = Checkpoint(tied / "base").fingerprint()
    edit(tied / "base", with_head)
    assert Checkpoint(tied / "base").fingerprint() == fingerprint
    assert HEAD not in check(tied).matrices


def test_trained_head_of_the_base(tied, capsys):
    """Such a base is untied in vLLM and in transformers, and is another base."""
    fingerprint = Checkpoint(tied / "base").fingerprint()
    edit(tied / "base", lambda tensors: with_head(tensors, 0.05))
    assert Checkpoint(tied / "base").fingerprint() != fingerprint
    assert HEAD in check(tied).matrices
    assert f"{HEAD} of the base has other values" in capsys.readouterr().err


def test_prompts_of_an_untied_fine_tune(tied, tmp_path, save_model, capsys):
    """``verify --prompts`` unties the base as well."""
    from conftest import tokenizer

    edit(tied / "model", lambda tensors: with_head(tensors, 0.05))
    tokenizer().save_pretrained(tied / "model")
    model = ["--model", tied / "model"]
    assert run("convert", tied, *model, "--output", tied / "delta", "--ratio", 1) == 0
    (tmp_path / "prompts").write_text("w1 w5 w9 w33\n")
    options = ["--delta", tied / "delta", "--prompts", tmp_path / "prompts", "--json"]
    capsys.readouterr()
    assert run("verify", tied, *model, *options) == 0
    found = json.loads(capsys.readouterr().out)["fidelity"]
    assert found["delta"]["kl"] < found["base"]["kl"] / 50


@pytest.mark.parametrize("generation", ["old", "new"])
def test_head_of_a_multimodal_model(generation, tmp_path):
    """Under either of its names, against a base that is tied."""
    base = build("llava-tied")
    base.save_pretrained(tmp_path / "base")
    tuned(base).save_pretrained(tmp_path / "model")
    embedding = "language_model.model.embed_tokens.weight"
    head = {"old": "language_model.lm_head.weight", "new": HEAD}[generation]
    torch.manual_seed(3)
    edit(
        tmp_path / "model",
        lambda t: t | {head: t[embedding] + 0.05 * torch.randn_like(t[embedding])},
    )
    assert HEAD in check(tmp_path, AutoModelForImageTextToText).matrices


def test_gpt_neox_calls_it_otherwise(tmp_path):
    """A tied fine-tune of an untied base, whose head is called embed_out."""
    base = build("gpt-neox")
    base.save_pretrained(tmp_path / "base")
    tuned(base).save_pretrained(tmp_path / "model")
    edit(
        tmp_path / "model",
        lambda t: {k: v for k, v in t.items() if k != "embed_out.weight"},
    )
    config(tmp_path / "model", tie_word_embeddings=True)
    assert "embed_out.weight" in check(tmp_path).matrices


@pytest.mark.vllm
@pytest.mark.parametrize("scale", [0.0, pytest.param(0.05, marks=pytest.mark.slow)])
def test_served_base_with_a_head(
    scale, tied, engine, answers, load, difference, prompts
):
    """Base, tied and untied fine-tune in one batch, each as it is alone."""
    edit(tied / "base", lambda tensors: with_head(tensors, scale))
    shutil.copytree(tied / "model", tied / "untied")
    edit(tied / "untied", lambda tensors: with_head(tensors, 0.1))
    known = []
    for name in ("model", "untied"):
        folder = tied / f"delta-{name}"
        assert run("convert", tied, "--model", tied / name, "--output", folder) == 0
        output = ["--output", tied / f"merged-{name}"]
        assert run("export", tied, "--delta", folder, *output) == 0
    for name in ("base", "merged-model", "merged-untied"):
        llm = engine(tied / name)
        known.append(answers(llm, prompts, prompt_logprobs=1))
        del llm
        free()
    llm = engine(tied / "base", quantization="dqrelo")
    deltas = [load(llm, n, tied / f"delta-{n}") for n in ("model", "untied")]
    for request, expected in zip([None, *deltas], known, strict=True):
        got = answers(llm, prompts, [request] * len(prompts), prompt_logprobs=1)
        for answer, one in zip(got, expected, strict=True):
            assert difference(answer, one) <= 1e-4
