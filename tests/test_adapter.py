# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as deltas, against what PEFT computes with them."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.adapters import (
    LINEARS,
    TOKENS,
    close,
    convert,
    edit,
    exported_logits,
    load_model,
    make_adapter,
    opened_logits,
    peft,
    peft_logits,
)

from dqrelo_tools.adapter import Adapter
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.delta import Delta

Q = ["q_proj"]
ROWS = 3  # of tokens that are added, or cut
FIRST = 320  # of those that are added
UNTIED_TIED = ("llama", "llama-tied")


FACTORS = {
    "linears": ("llama", {"target_modules": LINEARS}),
    "rslora": ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "embedding": ("llama", {"target_modules": [*LINEARS, "embed_tokens", "lm_head"]}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEARS,
            "rank_pattern": {"q_proj": 7},
            "alpha_pattern": {"layers.1.mlp.up_proj": 32.5},
        },
    ),
    "regex": ("llama", {"target_modules": r".*layers\.1\..*(q|k)_proj"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "one layer": ("llama", {"target_modules": Q, "layers_to_transform": 1}),
    "layers of a pattern": (
        "llama",
        {
            "target_modules": Q,
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
    ),
    "excluded": (
        "llama",
        {"target_modules": "all-linear", "exclude_modules": ["up_proj"]},
    ),
    "gaussian": ("llama", {"target_modules": Q, "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": Q, "init_lora_weights": "orthogonal"}),
    "mica": ("llama", {"target_modules": Q, "init_lora_weights": "mica"}),
    "not a zero at first": ("llama", {"target_modules": Q, "init_lora_weights": False}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias of all": ("qwen2", {"target_modules": Q, "bias": "all"}),
    "bias of targets": ("qwen2", {"target_modules": Q, "bias": "lora_only"}),
    "norms": ("llama", {"target_modules": Q, "modules_to_save": ["norm"]}),
    "both biases": (
        "qwen2",
        {"target_modules": Q, "bias": "lora_only", "lora_bias": True},
    ),
    # One of two tied matrices is changed, or both.
    "tied embedding": ("llama-tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied both": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "tied still": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied head still": (
        "llama-tied",
        {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True},
    ),
    # Rows of the vocabulary.
    "tokens": ("llama", {"target_modules": Q, "trainable_token_indices": [3, 250]}),
    "tied tokens": (
        "llama-tied",
        {"target_modules": Q, "trainable_token_indices": [3, 250]},
    ),
    "tokens of both": (
        "llama",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [4]},
        },
    ),
    "tied tokens of both": (
        "llama-tied",
        {
            "target_modules": Q,
            "trainable_token_indices": {"embed_tokens": [9, 3], "lm_head": [4]},
        },
    ),
    "tied tokens of the head": (
        "llama-tied",
        {"target_modules": Q, "trainable_token_indices": {"lm_head": [4, 250]}},
    ),
    "tokens and a head": (
        "llama",
        {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [3]},
    ),
}
RESIZED = {
    "resized": {"target_modules": Q},
    "resized, factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "resized, tokens": {
        "target_modules": Q,
        "trainable_token_indices": [FIRST + 2, 3, FIRST],
    },
    "resized, tokens of both": {
        "target_modules": Q,
        "trainable_token_indices": {"embed_tokens": [3, FIRST], "lm_head": [3, FIRST]},
    },
}
WHOLE = {
    "dora": ("llama", {"target_modules": LINEARS, "use_dora": True}),
    "dora and biases": ("qwen2", {"target_modules": LINEARS, "use_dora": True}),
    "dora of both": (
        "llama",
        {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
    ),
    "dora of a tied embedding": (
        "llama-tied",
        {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    ),
    "dora, rslora": (
        "llama",
        {"target_modules": LINEARS, "use_dora": True, "use_rslora": True},
    ),
    "a head": ("llama", {"target_modules": Q, "modules_to_save": ["lm_head"]}),
    "a module": ("llama", {"target_modules": Q, "modules_to_save": ["mlp"]}),
    "tied head": ("llama-tied", {"target_modules": Q, "modules_to_save": ["lm_head"]}),
    "tied embedding": (
        "llama-tied",
        {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    ),
    "tied both": (
        "llama-tied",
        {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "tied still": (
        "llama-tied",
        {
            "target_modules": Q,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "tied head still": (
        "llama-tied",
        {
            "target_modules": Q,
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "many tokens": (
        "llama",
        {"target_modules": Q, "trainable_token_indices": [*range(10, 80)]},
    ),
}
CUT = {
    "cut": {"target_modules": Q},
    "cut, factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "cut, tokens": {"target_modules": Q, "trainable_token_indices": [3, 8]},
}
CUT_WHOLE = {
    "cut, whole": {
        "target_modules": Q,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "cut, dora": {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True},
}
RESIZED_WHOLE = {
    "resized, whole": {
        "target_modules": Q,
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
    "resized, embedding": {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
}


def cases(*tables):
    """The entries of tables; one without a base is tried with two."""
    found = []
    for name, entry in {k: v for table in tables for k, v in table.items()}.items():
        kinds, options = entry if isinstance(entry, tuple) else (UNTIED_TIED, entry)
        for kind in [kinds] if isinstance(kinds, str) else kinds:
            rows = ROWS * (name.startswith("resized") - name.startswith("cut"))
            found.append(pytest.param(kind, rows, options, id=f"{name}, {kind}"))
    return found


def vocabulary_of(delta):
    """How many tokens a fine-tune has."""
    return delta.config.vocab_size or FIRST + delta.added_tokens


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "rows", "options"), cases(FACTORS, RESIZED, CUT))
def test_factors_stay_as_they_are(base, tmp_path, kind, rows, options):
    adapter = make_adapter(base(kind), tmp_path / "adapter", rows, **options)
    assert convert(base(kind), adapter, tmp_path / "delta") == 0
    delta = Delta(tmp_path / "delta")
    assert delta.config.method == "lora" and vocabulary_of(delta) == FIRST + rows
    assert not any(delta.matrix(name).planes for name in delta.matrices)
    want = peft_logits(base(kind), adapter, rows)
    got = exported_logits(base(kind), tmp_path / "delta", tmp_path / "merged")
    assert close(got, want)
    plain = load_model(base(kind))(TOKENS).logits
    common = slice(min(FIRST, FIRST + rows))
    assert not close(want[..., common], plain[..., common])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "rows", "options"), cases(WHOLE, RESIZED_WHOLE, CUT_WHOLE)
)
def test_other_changes_are_compressed(base, tmp_path, kind, rows, options):
    """What is compressed is what PEFT computes; the error is that of a fine-tune."""
    adapter = make_adapter(base(kind), tmp_path / "adapter", rows, **options)
    want = peft_logits(base(kind), adapter, rows)
    assert close(opened_logits(base(kind), adapter), want)
    assert convert(base(kind), adapter, tmp_path / "delta") == 0
    delta = Delta(tmp_path / "delta")
    assert delta.config.method == "dqrelo" and vocabulary_of(delta) == FIRST + rows
    before = Checkpoint(base(kind))
    opened = Adapter(adapter, before, [str(base(kind))])
    assert opened.dense
    bound = 0.2 if "trainable_token_indices" in options else 0.1  # few rows, or all
    for name in opened.dense:
        change = opened.get(name).float() - before.get(name)
        missed = delta.matrix(name).dense() - change
        assert missed.norm() < bound * change.norm(), name
    got = exported_logits(base(kind), tmp_path / "delta", tmp_path / "merged")
    plain = load_model(base(kind))(TOKENS).logits
    common = slice(min(FIRST, FIRST + rows))
    missed, change = got - want, want[..., common] - plain[..., common]
    assert got.shape == want.shape and missed.norm() < bound * change.norm()


@pytest.mark.filterwarnings("ignore")
def test_factors_of_a_16_bit_adapter(base, tmp_path, save_model):
    """They keep their dtype, and a base of another one does not matter."""
    folder = save_model("llama", tmp_path / "base", seed=1, dtype=torch.bfloat16)
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=LINEARS)
    edit(adapter, lambda t: {n: v.bfloat16() for n, v in t.items()}, lora_alpha=16)
    assert convert(folder, adapter, tmp_path / "delta") == 0
    delta = Delta(tmp_path / "delta")
    assert {delta.matrix(n).lora_a.dtype for n in delta.matrices} == {torch.bfloat16}
    merged = peft.PeftModel.from_pretrained(
        load_model(folder), adapter
    ).merge_and_unload()
    before = Checkpoint(folder)
    for name in delta.matrices:
        want = merged.get_parameter(name) - before.get(name).float()
        # of one sum, PEFT rounds the product to 8 bits and the sum to 24
        assert (
            delta.matrix(name).dense() - want
        ).abs().max() < 2**-8 * want.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_a_rounded_copy_of_the_base_is_not_a_change(base, tmp_path):
    """PEFT saves the embedding beside its factors, in the dtype of training."""
    options = {"target_modules": ["embed_tokens", "lm_head"]}
    adapter = make_adapter(base("llama"), tmp_path / "adapter", **options)
    edit(
        adapter,
        lambda t: {n: v.bfloat16() if "base_layer" in n else v for n, v in t.items()},
    )
    assert convert(base("llama"), adapter, tmp_path / "delta") == 0
    delta = Delta(tmp_path / "delta")
    assert delta.config.method == "lora"
    assert {delta.matrix(name).rank for name in delta.matrices} == {4}


def test_an_adapter_brings_its_tokenizer(base, tmp_path, own):
    adapter = make_adapter(base("llama"), tmp_path / "adapter", target_modules=Q)
    words = own.merged / "tokenizer.json"
    shutil.copy(words, adapter)
    assert convert(base("llama"), adapter, tmp_path / "delta") == 0
    assert (tmp_path / "delta" / words.name).read_text() == words.read_text()


@pytest.mark.parametrize("named", ["someone/else-7B", "", None, "itself", "elsewhere"])
def test_the_base_that_it_names(base, tmp_path, capsys, named):
    folder, other = base("llama"), "someone" in str(named)
    names = {"itself": str(folder), "elsewhere": str(folder / ".." / folder.name) + "/"}
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=Q)
    edit(adapter, base_model_name_or_path=names.get(named, named))
    capsys.readouterr()
    assert convert(folder, adapter, tmp_path / "delta") == 0
    error = capsys.readouterr().err
    assert ("dqrelo: warning" in error) == other
    assert (f"{named}, and is converted for {folder}" in error) == other


@pytest.mark.filterwarnings("ignore")
def test_what_is_told(base, tmp_path, capsys):
    """Modules without factors, weights beside the adapter, an untied head, DoRA."""
    adapter = make_adapter(
        base("llama-tied"),
        tmp_path / "adapter",
        target_modules=[*Q, "embed_tokens", "lm_head"],
        use_dora=True,
    )
    edit(
        adapter,
        lambda t: {n: v for n, v in t.items() if "embed" in n or "q_proj" in n},
        loftq_config={"loftq_bits": 4},
    )
    for name in ("value_head", "optimizer"):
        save_file({"a": torch.zeros(1)}, adapter / f"{name}.safetensors")
    assert convert(base("llama-tied"), adapter, tmp_path / "delta") == 0
    error = capsys.readouterr().err
    for text in (
        "note: the LM head is no longer the embedding",
        "note: not of low rank (DoRA, or trained as a whole)",
        "at --ratio: model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight",
        "value_head.safetensors is left out: no model generates with it",
        "warning: " + str(adapter / "optimizer.safetensors") + " is left out",
        "warning: target_modules has lm_head, the file has no factors of it",
        "LoftQ",
    ):
        assert text in error


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")
def test_served_beside_each_other(base, tmp_path, engine, answers, load, prompts):
    """A head untied by an adapter, one that stays the base's, DoRA, added tokens."""
    folder = base("llama-tied")
    kinds = {
        "embedding": (0, {"target_modules": ["q_proj", "embed_tokens"]}),
        "head": (0, {"target_modules": Q, "modules_to_save": ["lm_head"]}),
        "resized": (ROWS, {"target_modules": Q, "use_dora": True}),
    }
    for name, (rows, options) in kinds.items():
        adapter = make_adapter(folder, tmp_path / name, rows, **options)
        assert (
            convert(folder, adapter, tmp_path / f"{name}-delta", "--ratio", ".2") == 0
        )
    room = {"dqrelo": {"delta_memory_gib": 0.002, "added_tokens": 8}}
    llm = engine(folder, quantization="dqrelo", max_loras=3, additional_config=room)
    loaded = {name: load(llm, name, tmp_path / f"{name}-delta") for name in kinds}
    order = [(prompt, name) for prompt in prompts for name in kinds]
    asked = [[prompt for prompt, _ in order], [loaded[name] for _, name in order]]
    for (prompt, name), answer in zip(
        order, answers(llm, *asked, prompt_logprobs=1), strict=True
    ):
        tokens, logprobs, of_prompt = answer
        every = torch.tensor([prompt + tokens])
        delta, merged = tmp_path / f"{name}-delta", tmp_path / f"{name}-{len(prompt)}"
        known = exported_logits(folder, delta, merged, every)[0, :-1].log_softmax(-1)
        assert known[len(prompt) - 1 :].argmax(-1).tolist() == tokens
        want = known.gather(1, every[0, 1:, None])[:, 0]
        got = torch.tensor(of_prompt + logprobs)
        assert (got - want).abs().max() <= 1e-4, (prompt, name)  # as in test_serving.py
