# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes that lack the last tokens of their base, as after a trainer's resize."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import run
from support.engines import free
from support.shapes import GROUPED, SHAPE, TIED
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PhiConfig

from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta, write_delta
from vllm_dqrelo.format.side_files import TOKENIZER_FILES

TOKENS, FEWER = 320, 12
OWN = TOKENS - FEWER


def phi() -> PhiConfig:
    """Its LM head has a bias."""
    # The fine-tune does not have the base's last token.
    return PhiConfig(**SHAPE | {"pad_token_id": TOKENS - 1})


@pytest.fixture(params=["llama-tied", "llama", phi()], ids=["tied", "untied", "bias"])
def pair(request, tmp_path, save_model):
    """A base, and a fine-tune without its last FEWER tokens."""
    base = save_model(request.param, tmp_path / "base", seed=1)
    model = save_model(request.param, tmp_path / "model", seed=2, added_tokens=-FEWER)
    set_config(model, pad_token_id=0)
    return base, model


def logits(folder, prompt=(1, 5, 9, OWN - 1, 200)) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0]


def edit(folder, change) -> None:
    """``change`` the tensors of a model, a dictionary, in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def set_config(folder, **keys) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_the_export_is_the_fine_tune(pair, tmp_path):
    """At ratio 1: its shapes, its vocab_size, the logits that transformers computes."""
    base, model = pair
    delta, merged = tmp_path / "delta", tmp_path / "merged"
    options = ("--base", base, "--model", model)
    assert run("convert", *options, "--output", delta, "--ratio", "1") == 0
    assert DeltaConfig.read(delta).vocab_size == OWN
    assert run("verify", *options, "--delta", delta) == 0
    assert run("verify", "--base", base, "--delta", delta) == 0
    assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
    got, want = (load_file(f / "model.safetensors") for f in (merged, model))
    shapes = [{n: t.shape for n, t in tensors.items()} for tensors in (got, want)]
    assert shapes[0] == shapes[1]
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == OWN
    far = (logits(base)[:, :OWN] - logits(model)).norm()
    assert (logits(merged) - logits(model)).norm() < 0.1 * far
    words = json.loads((merged / "tokenizer.json").read_text())["model"]["vocab"]
    assert len(words) == OWN


def test_what_a_fine_tune_lacks_does_not_change(pair, tmp_path):
    """The delta's rows of these tokens are the base's, at any ratio."""
    base, model = pair
    for ratio in ("0.125", "0.5"):
        delta = tmp_path / ratio
        options = ("--base", base, "--model", model, "--output", delta)
        assert run("convert", *options, "--ratio", ratio) == 0
        opened = Delta(delta)
        heads = [n for n in opened.matrices if n.startswith("lm_head") or "embed" in n]
        assert heads
        for name in heads:
            change = opened.matrix(name).dense()
            assert change[:OWN].any() and not change[OWN:].any()
        if "lm_head.bias" in opened.exact:
            before = load_file(base / "model.safetensors")["lm_head.bias"]
            assert torch.equal(opened.parameter("lm_head.bias")[OWN:], before[OWN:])


def test_with_a_budget_too(pair, tmp_path):
    base, model = pair
    delta = tmp_path / "delta"
    options = ("--base", base, "--model", model, "--output", delta)
    assert run("convert", *options, "--budget", "120KB") == 0
    assert DeltaConfig.read(delta).vocab_size == OWN


def test_prompts_are_compared_over_the_tokens_of_the_fine_tune(pair, tmp_path, capsys):
    base, model = pair
    delta, prompts = tmp_path / "delta", tmp_path / "prompts.txt"
    options = ("--base", base, "--model", model)
    assert run("convert", *options, "--output", delta, "--ratio", "1") == 0
    prompts.write_text("w7 w300 w9 w304 w11\n")
    capsys.readouterr()
    check = ("--delta", delta, "--prompts", prompts, "--json")
    assert run("verify", *options, *check) == 0
    fidelity = json.loads(capsys.readouterr().out)["fidelity"]
    assert fidelity["tokens"] == 5
    assert fidelity["delta"]["kl"] < 1e-3
    of_base, own = (logits(f, (7, 300, 9, 304, 11)) for f in (base, model))
    p, q = own.log_softmax(-1), of_base[:, :OWN].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    assert fidelity["base"]["kl"] == pytest.approx(float(kl), rel=1e-3)


def test_the_delta_of_another_vocabulary(pair, tmp_path, capsys):
    """verify compares vocab_size with the fine-tune's, and with the base's."""
    base, model = pair
    delta = tmp_path / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", delta) == 0
    assert run("verify", "--base", base, "--model", base, "--delta", delta) == 1
    assert f"vocab_size is {OWN}, expected None" in capsys.readouterr().err


E = "model.embed_tokens.weight"
CHANGES = {
    "embedding only": (
        lambda model: edit(model, lambda t: t.update({E: t[E][:300]})),
        f"lm_head.weight has {TOKENS}, {E} has 300",
    ),
    "head only": (
        lambda model: edit(
            model, lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:300]})
        ),
        f"lm_head.weight has 300, {E} has {TOKENS}",
    ),
    "config only": (
        lambda model: set_config(model, vocab_size=300),
        f"vocab_size 300, but lm_head.weight has {TOKENS} rows",
    ),
    "rows only": (
        lambda model: edit(
            model,
            lambda t: t.update({n: t[n][:300] for n in (E, "lm_head.weight")}),
        ),
        f"vocab_size {TOKENS}, but lm_head.weight has 300 rows",
    ),
    "more rows only": (
        lambda model: edit(
            model,
            lambda t: t.update({n: t[n].repeat(2, 1) for n in (E, "lm_head.weight")}),
        ),
        f"vocab_size {TOKENS}, but lm_head.weight has 640 rows",
    ),
}


@pytest.mark.parametrize("how", CHANGES)
def test_a_vocabulary_resized_in_part_is_refused(how, tmp_path, save_model, capsys):
    """transformers does not load it either."""
    change, message = CHANGES[how]
    base = save_model("llama", tmp_path / "base", seed=1)
    model = save_model("llama", tmp_path / "model", seed=2)
    change(model)
    with pytest.raises((RuntimeError, ValueError)):
        AutoModelForCausalLM.from_pretrained(model)
    output = tmp_path / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", output) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("side", "rows", "message"),
    [
        ("base", [310], f"{E} of the base has a NaN or an infinity in 1 of its "),
        ("model", [3, 5, 6, 7, 8, 9], "in 6 of its 320 rows: 3, 5, 6, 7, 8, ..."),
        (
            "model",
            [321, 324],
            "fine-tune has a NaN or an infinity in 2 of its 325 rows: 321, 324.",
        ),
    ],
)
def test_rows_that_a_trainer_left_uninitialised(
    side, rows, message, tmp_path, save_model, capsys
):
    save_model("llama-tied", tmp_path / "base", seed=1)
    save_model("llama-tied", tmp_path / "model", seed=2, added_tokens=5)

    def spoil(tensors):
        tensors[E][rows, 1] = torch.nan

    edit(tmp_path / side, spoil)
    options = ("--base", tmp_path / "base", "--model", tmp_path / "model")
    assert run("convert", *options, "--output", tmp_path / "delta") == 1
    assert message in capsys.readouterr().err


def test_a_smaller_vocabulary_of_another_base(tmp_path, save_model, capsys):
    """A vocab_size that is not below the base's is refused by verify and export."""
    base = save_model("llama", tmp_path / "base", seed=1)
    model = save_model("llama", tmp_path / "model", seed=2, added_tokens=-FEWER)
    delta = tmp_path / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", delta) == 0
    opened = Delta(delta)
    rewrite(opened, tmp_path / "wrong", TOKENS)
    assert run("verify", "--base", base, "--delta", tmp_path / "wrong") == 1
    assert f"expected fewer than the base's {TOKENS}" in capsys.readouterr().err


def rewrite(delta, folder, vocab_size) -> None:
    folder.mkdir()
    tensors = load_file(delta.folder / "delta_model.safetensors")
    write_delta(folder, replace(delta.config, vocab_size=vocab_size), tensors)


# In a server.

TOLERANCE = 1e-4  # as in test_serving.py
# Logits of at most 2 in size: masked before that cap, a token would be likely.
CAPPED = Gemma3TextConfig(**GROUPED, **TIED, final_logit_softcapping=2.0)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "room"),
    [
        pytest.param(CAPPED, 3, marks=pytest.mark.slow, id="cap"),
        pytest.param(phi(), 0, marks=pytest.mark.slow, id="bias"),
    ],
)
def test_a_mixed_batch_equals_each_model_alone(
    kind, room, save_model, tmp_path, engine, load, prompts
):
    """The base, fewer tokens, and where there is room for them more: every logprob."""
    base = save_model(kind, tmp_path / "base", seed=1)
    edit(base, make_the_last_tokens_likely)
    sizes, folders, deltas = [TOKENS], [base], []
    for added in (-FEWER, -FEWER - 4, 2)[: 2 + bool(room)]:
        model, delta = tmp_path / f"model{added}", tmp_path / f"delta{added}"
        save_model(kind, model, seed=50 + added, added_tokens=added)
        edit(model, make_the_last_tokens_likely)
        for file in TOKENIZER_FILES:  # LLM has one tokenizer in a call
            (model / file).unlink(missing_ok=True)
        set_config(model, pad_token_id=0)
        options = ("--base", base, "--model", model, "--output", delta)
        assert run("convert", *options) == 0
        merged = tmp_path / f"merged{added}"
        assert run("export", "--base", base, "--delta", delta, "--output", merged) == 0
        sizes, deltas = [*sizes, TOKENS + added], [*deltas, delta]
        folders = [*folders, merged]
    expected = []
    for folder in folders:
        llm = engine(folder, max_logprobs=-1)
        expected.append(distributions(llm, prompts))
        del llm
        free()
    options = {"delta_memory_gib": 0.001, "added_tokens": room, "self_check": "always"}
    llm = engine(
        base,
        quantization="dqrelo",
        max_logprobs=-1,
        additional_config={"dqrelo": options},
    )
    requests = [None, *(load(llm, folder.name, folder) for folder in deltas)]
    models = range(len(requests))
    order = [(p, m) for p in range(len(prompts)) for m in models]
    got = distributions(
        llm, [prompts[p] for p, _ in order], [requests[m] for _, m in order]
    )
    for (p, m), answer in zip(order, got, strict=True):
        assert far_apart(answer, expected[m][p], sizes[m]) <= TOLERANCE, (p, m)
    # The test can fail: the base writes tokens that a fine-tune lacks.
    assert max(token for tokens, _ in expected[0] for token in tokens) >= OWN
    # Steps of the base alone, and sampling.
    for answer, reference in zip(distributions(llm, prompts), expected[0], strict=True):
        assert far_apart(answer, reference, TOKENS) <= TOLERANCE
    for m in models:
        assert max(sampled(llm, requests[m])) < sizes[m]
    assert max(sampled(llm, None)) >= OWN


def make_the_last_tokens_likely(tensors) -> None:
    for name in {"lm_head.weight", "lm_head.bias", E} & tensors.keys():
        tensors[name][-FEWER:] *= 4


def distributions(llm, prompts, requests=None):
    """Greedy tokens, and the logprobs of all tokens at every place, of each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=6, logprobs=-1, prompt_logprobs=-1, detokenize=False
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling,
        lora_request=requests,
        use_tqdm=False,
    )
    return [
        (
            list(output.outputs[0].token_ids),
            [*output.prompt_logprobs[1:], *output.outputs[0].logprobs],
        )
        for output in outputs
    ]


def far_apart(got, expected, size) -> float:
    """Largest difference of two logprobs; infinite if they are of other tokens."""
    (tokens, places), (others, known) = got, expected
    if tokens != others or len(places) != len(known):
        return float("inf")
    furthest = 0.0
    for place, reference in zip(places, known, strict=True):
        if not place.keys() == reference.keys() == set(range(size)):
            return float("inf")
        furthest = max(
            furthest, *(abs(place[t].logprob - reference[t].logprob) for t in place)
        )
    return furthest


def sampled(llm, request) -> set[int]:
    """Tokens of answers at a temperature that makes all of them likely."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=2, n=64, max_tokens=8, top_k=300, seed=3, detokenize=False
    )
    (output,) = llm.generate(
        {"prompt_token_ids": [1, 5, 9]}, sampling, lora_request=request, use_tqdm=False
    )
    return {token for answer in output.outputs for token in answer.token_ids}
