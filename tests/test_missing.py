# SPDX-License-Identifier: Apache-2.0
"""Names that differ: the message leads with what explains them."""

from collections.abc import Callable

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.renamed import (
    EXPERTS,
    Tensors,
    adding,
    build,
    check,
    convert,
    edit,
    fused,
    in_layers,
    tuned,
)
from support.shapes import GROUPED, UNTIED

# What cannot be taken, and what explains it.
REFUSED: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "bias": (
        "llama",
        adding(lambda t: in_layers("self_attn.q_proj.bias", torch.ones(96))),
        "the fine-tune has biases that the base does not have",
    ),
    "attention bias": (
        "llama",
        adding(lambda t: in_layers("self_attn.bias", torch.ones(96))),
        "2 of 23 parameters of the fine-tune are not in the base",
    ),
    "adapter": (
        "llama",
        adding(
            lambda t: in_layers(
                "self_attn.q_proj.lora_A.default.weight", torch.ones(4, 96)
            )
        ),
        "it is stored with an adapter inside. Merge the adapter",
    ),
    "adapter's base layers": (
        "llama",
        lambda t: {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in t.items()},
        "with an adapter inside",
    ),
    "optimizer": (
        "llama",
        adding(lambda t: {f"optimizer.exp_avg.{k}": v.clone() for k, v in t.items()}),
        "states of an optimizer",
    ),
    "mlx": (
        "llama",
        adding(lambda t: in_layers("self_attn.q_proj.scales", torch.ones(96, 2))),
        "its weights are quantised",
    ),
    "classifier": (
        "llama",
        lambda t: (
            {"score.weight": torch.ones(2, 96)}
            | {k: v for k, v in t.items() if k != "lm_head.weight"}
        ),
        "its weights are those of a classifier",
    ),
    "layers": (
        "llama",
        lambda t: {k: v for k, v in t.items() if ".layers.1." not in k},
        "the fine-tune has 1 layers, the base has 2",
    ),
    "language model": (
        "llava",
        lambda t: {k: v for k, v in t.items() if k.startswith("language_model")},
        "only the language model is there",
    ),
    "empty": (
        "llama",
        lambda t: {k: torch.zeros(0) if "proj" in k else v for k, v in t.items()},
        "14 parameters of the fine-tune are empty",
    ),
    "float8": (
        "llama",
        lambda t: {
            k: v.to(torch.float8_e4m3fn) if "q_proj" in k else v for k, v in t.items()
        },
        "is F8_E4M3, expected BF16, F16 or F32",
    ),
    "nothing in common": (
        "llama",
        lambda t: {f"tensor_{i}": v for i, v in enumerate(t.values())},
        "21 of 21 parameters of the base are not in the fine-tune",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind, pair, tmp_path, capsys):
    """In few lines, led by what explains it, and nothing is left behind."""
    name, change, message = REFUSED[kind]
    pair(name)
    edit(tmp_path / "model", change)
    capsys.readouterr()
    assert convert(tmp_path) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") <= 5
    assert not (tmp_path / "delta").exists()


def test_square_experts(tmp_path, capsys):
    """One of two matrices says whether both are transposed; alone, it is refused."""
    config = {**GROUPED, **UNTIED, **EXPERTS, "moe_intermediate_size": 48}
    kind = transformers.Qwen3MoeForCausalLM
    base = kind(kind.config_class(**config))
    base.save_pretrained(tmp_path / "base")
    model = tuned(base)
    model.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "plain")
    edit(tmp_path / "model", lambda tensors: fused(tensors, model, transposed=True))
    check(tmp_path, model)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    down = {name: tensor for name, tensor in plain.items() if "down_proj" in name}
    edit(
        tmp_path / "model",
        lambda t: {k: v for k, v in t.items() if "down_proj" not in k} | down,
    )
    assert convert(tmp_path) == 1
    assert "its matrices are square" in capsys.readouterr().err


def test_base_with_experts_side_by_side(pair, tmp_path, capsys):
    model = pair("qwen3-moe")
    edit(tmp_path / "base", lambda tensors: fused(tensors, build("qwen3-moe"), False))
    assert convert(tmp_path) == 1
    assert "the base has its experts side by side" in capsys.readouterr().err
    edit(tmp_path / "model", lambda tensors: fused(tensors, model, False))
    assert convert(tmp_path) == 1
    assert "was changed: a delta has only vectors and" in capsys.readouterr().err
