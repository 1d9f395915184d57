# SPDX-License-Identifier: Apache-2.0
"""Tiny models, their fine-tunes and deltas, and a torch.empty that shows its use."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import json
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Mapping
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


def given(function):
    """A fixture that is ``function``; with importlib there is no importing it."""
    return pytest.fixture(scope="session", name=function.__name__)(lambda: function)


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
    # Greedy by default, and two tokens that end an answer.
    settings = {"top_k": 1, "max_new_tokens": 12, "eos_token_id": [answer[end], 319]}
    shutil.copytree(made.deltas[0], root / "delta")
    shutil.copytree(made.merged[0], root / "merged")
    for folder in (root / "delta", root / "merged"):
        words.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(settings))
    return Own(root / "delta", root / "merged", chat, prompt, answer[: end + 1])


@pytest.fixture(scope="session", name="server")
def server_fixture():
    """The function ``server``."""
    return server


SERVER_OPTIONS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
SERVER_OPTIONS += ["--max-num-seqs", "16", "--host", "127.0.0.1"]


@contextmanager
def server(command, log: Path, dies: bool = False):
    """Start a server, wait until it is ready, yield its address, end it.

    One that ``dies`` has to end by itself.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command), *SERVER_OPTIONS, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 300
        while not healthy(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
        if dies:
            process.wait(60)
        assert dies or process.poll() is None, log.read_text()[-4000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def healthy(port) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


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


PROMPTS = [
    [1, 5, 9, 33, 200, 77, 3, 8],
    [4, 4, 100, 300, 2],
    [7] * 40,  # two full blocks of 16 for the prefix cache
    [7] * 40 + [11, 12],
]


@pytest.fixture(name="prompts")
def prompts_fixture():
    """What the engines are asked."""
    return PROMPTS


@pytest.fixture(name="engine")
def engine_fixture():
    """The function ``engine``; memory is freed when the test has ended."""
    yield engine
    gc.unfreeze()  # an engine has frozen all that there was at its start
    gc.collect()


def engine(model, **options):
    """A model alone, or with quantization="dqrelo" a base with room for its deltas."""
    from vllm import LLM

    if "quantization" in options:
        room = {"dqrelo": {"delta_memory_gib": 0.001}}
        options.setdefault("additional_config", room)
    options.setdefault("max_model_len", 128)
    return LLM(
        str(model),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_num_seqs=32,
        enable_prefix_caching=True,
        **options,
    )


@pytest.fixture(name="load")
def load_fixture():
    """``load(llm, name, folder)``: the request of a delta."""
    from vllm_dqrelo import load_delta

    return lambda llm, name, folder: load_delta(llm, name, str(folder))


@pytest.fixture(name="manager_of")
def manager_of_fixture():
    """``manager_of(llm)``: the worker's delta manager, in this process."""

    def manager_of(llm):
        core = llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.lora_manager

    return manager_of


def sampling(max_tokens=8, prompt_logprobs=None):
    """Greedy, with logprobs."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        logprobs=1,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )


def answers(llm, prompts, requests=None, prompt_logprobs=None):
    """Tokens, their logprobs and the prompt's logprobs, of each prompt."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(prompt_logprobs=prompt_logprobs),
        lora_request=requests,
        use_tqdm=False,
    )
    return [answer_of(output) for output in outputs]


def answer_of(output):
    """Tokens, their logprobs and the prompt's logprobs, of a finished request."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob
        for token, step in zip(tokens, completion.logprobs, strict=True)
    ]
    prompt = [
        step[token].logprob
        for token, step in zip(
            output.prompt_token_ids, output.prompt_logprobs or [], strict=False
        )
        if step
    ]
    return tokens, logprobs, prompt


def difference(got, expected) -> float:
    """Largest difference of two answers' logprobs; infinite if the tokens differ."""
    if got[0] != expected[0]:
        return float("inf")
    pairs = [*zip(got[1], expected[1], strict=True)]
    if got[2]:  # prompt logprobs were asked for
        pairs += zip(got[2], expected[2], strict=True)
    return max(abs(one - other) for one, other in pairs)


save_model_fixture = given(save_model)
decode_fixture = given(decode)
sampling_fixture = given(sampling)
answers_fixture = given(answers)
answer_of_fixture = given(answer_of)
difference_fixture = given(difference)


@pytest.fixture(scope="session")
def alone(family):
    """``alone(kind)``: the answers of the base and of each merged checkpoint."""
    known = {}

    def get(kind):
        if kind not in known:
            made, known[kind] = family(kind), []
            for folder in [made.base, *made.merged]:
                llm = engine(folder)
                known[kind].append(answers(llm, PROMPTS, prompt_logprobs=1))
                del llm
                gc.unfreeze()
                gc.collect()
        return known[kind]

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
