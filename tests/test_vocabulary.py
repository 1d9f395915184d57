# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes with tokens that their base does not have."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import run
from support.shapes import SHAPE
from transformers import AutoModelForCausalLM, PhiConfig

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta, write_delta
from vllm_dqrelo.format.errors import DqreloError

ADDED = 5
TOLERANCE = 1e-4  # as in test_serving.py


@pytest.fixture(params=["llama-tied", "llama"])
def pair(request, tmp_path, save_model):
    """A base, and a fine-tune with ADDED tokens more."""
    base = save_model(request.param, tmp_path / "base", seed=1)
    model = save_model(request.param, tmp_path / "model", seed=2, added_tokens=ADDED)
    return base, model


def test_added_tokens_are_exact_and_the_rest_is_a_delta(pair, tmp_path):
    base, model = pair
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    options = ("--base", base, "--model", model)
    assert run("convert", *options, "--output", delta, "--ratio", "0.5") == 0
    assert run("verify", *options, "--delta", delta) == 0
    assert run("verify", "--base", base, "--delta", delta) == 0
    assert Delta(delta).added_tokens == ADDED
    assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
    got, want = (AutoModelForCausalLM.from_pretrained(m) for m in (merged, model))
    assert got.config.vocab_size == want.config.vocab_size
    old = AutoModelForCausalLM.from_pretrained(base)
    for part in ("get_input_embeddings", "get_output_embeddings"):
        mine, theirs, before = (getattr(m, part)().weight for m in (got, want, old))
        assert torch.equal(mine[-ADDED:], theirs[-ADDED:])
        change = theirs[:-ADDED] - before
        assert (mine - theirs).norm() < 0.05 * change.norm()
    words = json.loads((merged / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(words) == want.config.vocab_size


def test_added_tokens_of_an_lm_head_with_a_bias_are_refused(
    tmp_path, save_model, capsys
):
    config = PhiConfig(**SHAPE)
    base = save_model(config, tmp_path / "base", seed=1)
    model = save_model(config, tmp_path / "model", seed=2, added_tokens=ADDED)
    options = ("--base", base, "--model", model, "--output", tmp_path / "delta")
    assert run("convert", *options) == 1
    error = capsys.readouterr().err
    assert f"has {ADDED} tokens more than the base" in error and "lm_head.bias" in error
    assert not (tmp_path / "delta").exists()


def test_with_a_budget_too(pair, tmp_path):
    base, model = pair
    delta = tmp_path / "delta"
    options = ("--base", base, "--model", model, "--output", delta)
    assert run("convert", *options, "--budget", "120KB") == 0
    assert 0.9 * 120e3 < (delta / "delta_model.safetensors").stat().st_size <= 120e3
    assert Delta(delta).added_tokens == ADDED


def test_prompts_with_added_tokens(pair, tmp_path, capsys):
    """At a ratio that loses nearly nothing; the base cannot be compared."""
    base, model = pair
    delta, prompts = tmp_path / "delta", tmp_path / "prompts.txt"
    options = ("--base", base, "--model", model)
    assert run("convert", *options, "--output", delta, "--ratio", "1") == 0
    prompts.write_text("w7 w321 w9 w324 w11\n")
    capsys.readouterr()
    check = ("--delta", delta, "--prompts", prompts, "--json")
    assert run("verify", *options, *check) == 0
    fidelity = json.loads(capsys.readouterr().out)["fidelity"]
    assert fidelity["tokens"] == 5 and fidelity["base"] is None
    assert fidelity["delta"]["kl"] < 1e-3


def test_another_fine_tune_has_other_tokens(pair, tmp_path, capsys):
    base, model = pair
    delta = tmp_path / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", delta) == 0
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][-1] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = ("--base", base, "--model", model, "--delta", delta)
    assert run("verify", *options) == 1
    assert "embed_tokens.weight_added is stored as exact" in capsys.readouterr().err


@pytest.mark.parametrize(
    "shapes, problem",
    [
        ([(5, 96), (4, 96)], "different numbers of added tokens"),
        ([(96,)], "expected rows of a matrix"),
        ([()], "expected rows of a matrix"),
        ([(0, 96)], "expected rows of a matrix"),
    ],
)
def test_added_rows_that_cannot_be(tmp_path, shapes, problem):
    config = DeltaConfig("base", "", "", "dqrelo", 0.125)
    names = ("lm_head.weight_added", "model.embed_tokens.weight_added")
    tensors = {n: torch.ones(s) for n, s in zip(names, shapes, strict=False)}
    write_delta(tmp_path, config, tensors)
    with pytest.raises(DqreloError, match=problem):
        Delta(tmp_path)


# In a server.


@pytest.mark.vllm
@pytest.mark.v2
def test_added_tokens_are_of_their_own_model(
    family,
    alone,
    save_model,
    tmp_path,
    engine,
    answers,
    reference,
    difference,
    load,
    prompts,
):
    """Read and written by their fine-tune, and never written by another model."""
    made, expected = family("llama-tied"), alone("llama-tied")
    asked = [[1, 320, 9, 324, 3, 8], [321] * 20, *prompts]
    merged, requests = [], []
    for kind, tokens in (("llama-tied", 5), ("llama", 2)):
        model, folder = tmp_path / f"model-{tokens}", tmp_path / f"delta-{tokens}"
        save_model(kind, model, seed=tokens, added_tokens=tokens)
        edit_rows(model, tokens)
        convert(str(made.base), str(model), folder, 0.125)
        for file in folder.glob("tokenizer*"):  # LLM has one tokenizer in a call
            file.unlink()
        merged.append(tmp_path / f"merged-{tokens}")
        export(str(made.base), folder, merged[-1])
    own = [asked, [[token for token in p if token < 322] for p in asked]]
    known = [reference(model, some) for model, some in zip(merged, own, strict=True)]
    room = {"delta_memory_gib": 0.001, "added_tokens": 6, "self_check": "always"}
    llm = engine(made.base, quantization="dqrelo", additional_config={"dqrelo": room})
    requests = [load(llm, f"added-{t}", tmp_path / f"delta-{t}") for t in (5, 2)]
    mixed = [*own[0], *own[1], *prompts]
    whose = [requests[0]] * len(asked) + [requests[1]] * len(asked)
    got = answers(llm, mixed, whose + [None] * len(prompts), prompt_logprobs=1)
    want = [*known[0], *known[1], *expected[0]]
    for answer, reference in zip(got, want, strict=True):
        assert difference(answer, reference) <= TOLERANCE
    written = {token for tokens, _, _ in known[0] for token in tokens}
    assert max(written) >= 320  # or nothing above would be seen
    for name, columns in (
        ("model.embed_tokens", 95),
        ("model.layers.0.mlp.up_proj", 96),
    ):
        tensors = load_file(tmp_path / "delta-5" / "delta_model.safetensors")
        tensors[f"{name}.weight_added"] = torch.ones(5, columns)
        (tmp_path / name).mkdir()
        write_delta(tmp_path / name, Delta(tmp_path / "delta-5").config, tensors)
        with pytest.raises(Exception, match=f"{name}.weight_added is .* not rows of"):
            load(llm, name, tmp_path / name)


def edit_rows(model, tokens) -> None:
    """Make the added tokens likely."""
    tensors = load_file(model / "model.safetensors")
    for name in {"lm_head.weight", "model.embed_tokens.weight"} & tensors.keys():
        tensors[name][-tokens:] *= 4
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.vllm
def test_a_server_without_room_for_added_tokens(
    family, save_model, tmp_path, engine, load
):
    made = family("llama-tied")
    model = save_model("llama-tied", tmp_path / "model", seed=7, added_tokens=3)
    convert(str(made.base), str(model), tmp_path / "delta", 0.125)
    llm = engine(made.base, quantization="dqrelo")
    with pytest.raises(Exception, match='"added_tokens": 3'):
        load(llm, "added", tmp_path / "delta")
