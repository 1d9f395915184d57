# SPDX-License-Identifier: Apache-2.0
"""Bases as they were published, fine-tuned and saved with today's transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import run
from support.configs import ABSENT, TOKENS, build, changed, save, saved_again
from support.published import PUBLISHED
from transformers import (
    AutoModelForCausalLM,
)

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.model_config import ModelConfig


def tuned(folder: Path, output: Path) -> Path:
    """Loaded, all parameters changed and saved by today's transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return save(model, output)


@torch.no_grad()
def logits_of(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()(TOKENS).logits


@pytest.mark.parametrize(
    "kind", ["llama-3.1", "mistral-0.1", "qwen2.5", "gemma-3", "phi-3", "opt"]
)
def test_a_published_base_and_its_fine_tune_of_today(kind, tmp_path, capsys):
    published = PUBLISHED[kind]
    base = save(build(published), tmp_path / "base", published)
    model = tuned(base, tmp_path / "model")
    path = model / "config.json"
    stamps = {"unsloth_version": "2025.9.1", "gradient_checkpointing": True}
    name = published["architectures"][0]
    config = json.loads(path.read_text()) | stamps | {"architectures": [f"FSDP{name}"]}
    path.write_text(json.dumps(config))
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    pair = ("--base", base, "--model", model)
    assert run("convert", *pair, "--output", delta, "--ratio", 1) == 0
    assert run("advise", *pair) == 0
    assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
    assert "warning" not in capsys.readouterr().err
    assert_close(base, model, merged)


def assert_close(base: Path, model: Path, merged: Path) -> None:
    """The fine-tune's logits, but for the 4% of each change that 1/1 leaves."""
    before, expected, got = map(logits_of, (base, model, merged))
    assert (got - expected).norm() < 0.08 * (expected - before).norm()


def test_a_fine_tune_that_untied_a_head_tied_by_default(tmp_path, capsys):
    """Gemma's config.json has no tie_word_embeddings; the exported one has."""
    published = PUBLISHED["gemma-3"]
    base = save(build(published), tmp_path / "base", published)
    assert Checkpoint(base).tied and "lm_head.weight" not in Checkpoint(base)
    model = tuned(base, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    path = model / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(config))
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    pair = ("--base", base, "--model", model)
    assert run("convert", *pair, "--output", delta, "--ratio", 1) == 0
    assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
    assert_close(base, model, merged)
    written = json.loads((merged / "config.json").read_text())
    assert written["tie_word_embeddings"] is False


def test_added_tokens_are_written_wherever_the_vocabulary_is(tmp_path):
    """SmolVLM's config.json has vocab_size twice."""
    published = PUBLISHED["smolvlm"]
    base = save(build(published), tmp_path / "base", published)
    grown = changed(published, {"vocab_size": 324, "text_config.vocab_size": 324})
    model = save(build(grown), tmp_path / "model", grown)
    tensors = load_file(model / "model.safetensors")
    vision = {
        n: t for n, t in load_file(base / "model.safetensors").items() if t.ndim > 2
    }
    save_file(tensors | vision, model / "model.safetensors", metadata={"format": "pt"})
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    pair = ("--base", base, "--model", model)
    assert run("convert", *pair, "--output", delta) == 0
    assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
    written = json.loads((merged / "config.json").read_text())
    assert written["vocab_size"] == written["text_config"]["vocab_size"] == 324


def test_tokens_added_to_a_vocabulary_of_the_class_s_size(tmp_path):
    """config.json may leave vocab_size out, in text_config, too."""
    config = ModelConfig("config.json", {"model_type": "llama"})
    assert config.vocab_size == 32000
    nested = {"model_type": "idefics3", "text_config": {"model_type": "qwen2"}}
    assert ModelConfig("config.json", nested).vocab_size == 151936
    with pytest.raises(DqreloError, match="a/config.json: vocab_size is True, not"):
        ModelConfig("a/config.json", {"vocab_size": True}).vocab_size  # noqa: B018


@pytest.mark.parametrize("kind", PUBLISHED)
@pytest.mark.parametrize("said", [ABSENT, True, False])
def test_tied_is_what_transformers_ties(kind, said):
    config = changed(PUBLISHED[kind], {"tie_word_embeddings": said})
    model = build(config)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    expected = head.weight is embedding.weight
    assert ModelConfig("config.json", config).tied == expected
    assert ModelConfig("config.json", saved_again(config)).tied == expected
    assert ModelConfig("config.json", saved_again(config)).vocab_size == 320


@pytest.mark.vllm
@pytest.mark.parametrize("kind", PUBLISHED)
def test_tied_is_what_vllm_reads(kind, tmp_path):
    from vllm.transformers_utils.config import get_config

    config = changed(PUBLISHED[kind], {"tie_word_embeddings": ABSENT})
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = get_config(tmp_path, trust_remote_code=False)
    assert ModelConfig("config.json", config).tied == read.tie_word_embeddings
