# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their fine-tunes and deltas, and a torch.empty that shows its use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 96,  # less than a block of signs
    "intermediate_size": 200,  # not a whole number of words
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama-tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, tie_word_embeddings=False),
}


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes, their deltas, and base + delta as checkpoints."""

    base: Path
    models: list[Path]
    deltas: list[Path]
    merged: list[Path]


@pytest.fixture(scope="session", name="save_model")
def save_model_fixture():
    """The function ``save_model``; with importlib there is no importing it."""
    return save_model


def save_model(
    kind: str,
    folder: Path,
    seed: int,
    scale: float = 0.02,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A random model whose every parameter moved by ``scale``, seeded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).to(dtype)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, "w17" for token 17, and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(SHAPE["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made)
    wrapped.chat_template = (
        "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3"
    )
    return wrapped


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory):
    """``family(kind)``: a base of that kind with three fine-tunes, made once."""
    made: dict[str, Family] = {}

    def get(kind: str) -> Family:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            base = save_model(kind, root / "base", seed=1)
            models, deltas, merged = [], [], []
            for i, ratio in enumerate((0.125, 0.25, 0.0625)):
                models.append(save_model(kind, root / f"model-{i}", seed=2 + i))
                deltas.append(root / f"delta-{i}")
                merged.append(root / f"merged-{i}")
                convert(str(base), str(models[i]), deltas[i], ratio)
                export(str(base), deltas[i], merged[i])
            made[kind] = Family(base, models, deltas, merged)
        return made[kind]

    return get


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest):
    """Fill torch.empty with NaN (or the largest integer): unwritten output shows."""
    if request.node.get_closest_marker("vllm"):
        return
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        if tensor.dtype in (torch.int16, torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    monkeypatch.setattr(torch, "empty", poisoned)
