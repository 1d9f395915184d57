# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their fine-tunes and deltas, and a torch.empty that shows its use.

What answers for them is in servers.py and engines.py.
"""

import os

from support import model_runner

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if os.environ.setdefault(model_runner.VARIABLE, "0") == "1":
    model_runner.use_v2()  # before anything imports Triton or vLLM

import json
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.shapes import GROUPED, SHAPE, TIED, UNTIED
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dqrelo_kernels.cpu import build as cpu
from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

PLUGINS = ("servers", "engines", "gpu", "renamed", "wide")
pytest_plugins = [f"support.{name}" for name in PLUGINS]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files of engines first, then other engines, then many tests.

    Workers of xdist take files in this order, and so end at about the same time.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def order(item: pytest.Item) -> tuple[bool, bool, int]:
        found = files[item.path]
        slow, engines = (
            any(other.get_closest_marker(marker) for other in found)
            for marker in ("slow", "vllm")
        )
        return not engines, not slow, -len(found)

    items.sort(key=order)


CONFIGS: dict[str, PretrainedConfig] = {
    "llama-tied": LlamaConfig(**GROUPED, **TIED),
    "llama": LlamaConfig(**GROUPED, **UNTIED),
    "qwen2": Qwen2Config(**GROUPED, **TIED),
    "qwen3": Qwen3Config(**GROUPED, **UNTIED),
    "mixtral": MixtralConfig(**GROUPED, **UNTIED, num_local_experts=3),
}


@dataclass(frozen=True)
class Family:
    """A base, its fine-tunes, their deltas, and base + delta as checkpoints."""

    base: Path
    models: list[Path]
    deltas: list[Path]
    merged: list[Path]


def save_model(
    kind: str | PretrainedConfig,
    folder: Path,
    seed: int,
    scale: float = 0.02,
    dtype: torch.dtype = torch.float32,
    added_tokens: int = 0,
) -> Path:
    """A random model whose every parameter moved by ``scale``, seeded."""
    torch.manual_seed(0)
    words = SHAPE["vocab_size"] + added_tokens
    config = CONFIGS[kind] if isinstance(kind, str) else kind
    model = AutoModelForCausalLM.from_config(deepcopy(config)).to(dtype)
    if added_tokens:
        model.resize_token_embeddings(words, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer(words).save_pretrained(folder)
    return folder


def tokenizer(
    size: int = SHAPE["vocab_size"], shift: int = 0
) -> PreTrainedTokenizerFast:
    """One word a token, "w17" for token 17 or others by ``shift``; a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{(i + shift) % size}": i for i in range(size)}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made)
    wrapped.chat_template = (
        "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3"
    )
    return wrapped


@pytest.fixture(scope="session", name="save_model")
def save_model_fixture():
    """The function ``save_model``."""
    return save_model


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory):
    """``family(kind)``: a base of that kind with three fine-tunes, made once."""
    made: dict[str, Family] = {}

    def get(kind: str) -> Family:
        if kind not in made:
            root = tmp_path_factory.mktemp(kind)
            base = save_model(kind, root / "base", seed=1)
            models, deltas, merged = [], [], []
            kinds = ((0.125, "dqrelo"), (0.25, "dqrelo"), (0.0625, "dqrelo-paper"))
            for i, (ratio, method) in enumerate(kinds):
                models.append(save_model(kind, root / f"model-{i}", seed=2 + i))
                deltas.append(root / f"delta-{i}")
                merged.append(root / f"merged-{i}")
                convert(str(base), str(models[i]), deltas[i], ratio, method=method)
                export(str(base), deltas[i], merged[i])
            made[kind] = Family(base, models, deltas, merged)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory):
    """``base(kind)``: a base of that kind, made once."""
    root = tmp_path_factory.mktemp("bases")

    def get(kind: str) -> Path:
        folder = root / kind
        return folder if folder.is_dir() else save_model(kind, folder, seed=1)

    return get


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A base and its fine-tune, to be changed or damaged."""
    base = save_model("llama-tied", tmp_path / "base", seed=1)
    return base, save_model("llama-tied", tmp_path / "model", seed=2)


@dataclass(frozen=True)
class Own:
    """A fine-tune with a tokenizer, a template and a generation config of its own.

    Attributes:
        delta: a delta of the family's base.
        merged: the same as a checkpoint.
        chat: a conversation.
        prompt: its tokens, by the fine-tune's own files.
        answer: to it, greedily, with the token that ends it.
    """

    delta: Path
    merged: Path
    chat: list[dict[str, str]]
    prompt: list[int]
    answer: list[int]


@pytest.fixture(scope="session")
def own(family, tmp_path_factory: pytest.TempPathFactory) -> Own:
    """``family("llama")``'s first fine-tune, with files of its own."""
    made, root = family("llama"), tmp_path_factory.mktemp("own")
    words = tokenizer(shift=100)
    words.chat_template = "{% for m in messages %}w5 {{ m['content'] }} w6 {% endfor %}"
    chat = [{"role": "user", "content": "w7 w8 w9 w300 w12"}]
    prompt = words.apply_chat_template(chat)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(made.merged[0])
    answer = model.generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, len(prompt) :].tolist()
    end = next(i for i in range(3, 12) if answer[i] not in answer[:i])
    # Greedy, and two tokens that end an answer.
    settings = {
        "temperature": 0.0,
        "max_new_tokens": 12,
        "eos_token_id": [answer[end], 319],
    }
    shutil.copytree(made.deltas[0], root / "delta")
    shutil.copytree(made.merged[0], root / "merged")
    for folder in (root / "delta", root / "merged"):
        words.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return Own(root / "delta", root / "merged", chat, prompt, answer[: end + 1])


@pytest.fixture(scope="session", name="decode")
def decode_fixture():
    """The function ``decode``."""
    return decode


def decode(tensors: Mapping[str, torch.Tensor], name: str) -> np.ndarray:
    """What a stored matrix means, float64 [N, K], as docs/format.md words it."""
    stored = {
        key.removeprefix(name): tensor.cpu()
        for key, tensor in tensors.items()
        if key.startswith(name + "_")
    }
    n, k = stored["_shape"].tolist()
    out = np.zeros((n, k))
    if "_packed" in stored:
        words = stored["_packed"].numpy().view(np.uint16)
        word, bit = places(k, block=256, parts=16)
        signs = np.where(words[:, :, word] >> bit & 1, 1.0, -1.0)
        out += (stored["_scale"].double().numpy()[:, :, None] * signs).sum(axis=0)
    if "_lora_A" in stored:
        rank = len(stored["_lora_A"])
        a, b = (
            nibbles(stored[key].numpy(), columns)
            if stored[key].dtype == torch.uint8
            else stored[key].double().numpy()
            for key, columns in (("_lora_A", k), ("_lora_B", rank))
        )
        scale = stored.get("_lora_scale", torch.ones(rank)).double().numpy()
        out += b @ (scale[:, None] * a)
    return out


def nibbles(stored: np.ndarray, columns: int) -> np.ndarray:
    """Integers of four bits, two a byte."""
    byte, part = places(columns, block=64, parts=2)
    return (stored[:, byte] >> (4 * part) & 15).astype(np.float64) - 8


def places(columns: int, block: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """The word of each column and its place in the word."""
    words, places_ = [], []
    for column in range(columns):
        first = column // block * block
        width = -(-min(block, columns - first) // parts)
        words.append(first // parts + (column - first) % width)
        places_.append((column - first) // width)
    return np.array(words), np.array(places_)


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


@pytest.fixture(params=["torch", "native"])
def path(request, monkeypatch):
    """Twice: the ops in plain torch, and in native code."""
    monkeypatch.setenv("DQRELO_NATIVE", str(int(request.param == "native")))
    cpu.reset()
    if request.param == "native":
        try:
            cpu.build()
        except RuntimeError:
            pytest.skip("no C++ compiler: there is no native code to test")
        assert cpu.library()
    yield
    cpu.reset()
