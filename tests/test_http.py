# SPDX-License-Identifier: Apache-2.0
"""One real server through the openai client, and each of the two ways to start it."""

import concurrent.futures
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path

import openai
import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BIN = Path(sys.executable).parent
PROMPT = [1, 5, 9, 33, 200, 77, 3, 8]


@pytest.fixture(scope="module")
def expected(family):
    """Greedy answers of the base and each merged checkpoint, from transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    made = family("llama")
    found = {}
    folders = [made.base, *made.merged]
    for name, folder in zip(["base", "one", "two", "three"], folders, strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        output = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        found[name] = " ".join(f"w{token}" for token in output[0, len(PROMPT) :])
    assert len(set(found.values())) == 4
    return found


def complete(client, model, **options):
    answer = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=8, temperature=0, **options
    )
    return answer if options.get("stream") else answer.choices[0].text.strip()


@pytest.mark.v2
def test_dqrelo_serve(family, expected, server, tmp_path):
    made = family("llama")
    command = [BIN / "dqrelo", "serve", made.base, "--served-model-name", "base"]
    command += ["--delta", f"one={made.deltas[0]}", "--delta", f"two={made.deltas[1]}"]
    command += ["--delta-dir", made.base.parent]
    command += ["--delta-dir", family("llama-tied").base.parent]
    (tmp_path / "store").mkdir()
    command += ["--delta-dir", tmp_path / "store"]
    command += ["--max-loras", "2", "--additional-config"]
    command += ['{"dqrelo": {"delta_memory_gib": 0.001, "host_memory_gib": 0}}']
    with server(command, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        parents = {card.id: card.parent for card in client.models.list()}
        listed = {"base": None, "one": "base", "two": "base"}
        assert {name: parents[name] for name in listed} == listed

        names = ["base", "one", "two"] * 4
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(lambda name: complete(client, name), names))
        for name, answer in zip(names, answers, strict=True):
            assert answer == expected[name], name

        pieces = [part.choices[0].text for part in complete(client, "two", stream=True)]
        assert "".join(pieces).strip() == expected["two"]

        chats = {name: chat(client, name) for name in ("base", "one", "two")}
        assert len(set(chats.values())) == 3
        assert chat(client, "one", stream=True) == chats["one"]

        with pytest.raises(openai.NotFoundError, match="nobody"):
            complete(client, "nobody")

        # At run time: a third delta over two slots, a missing and a foreign one.
        load(url, "three", made.deltas[2])
        for name in ("three", "one", "three", "two"):
            assert complete(client, name) == expected[name]
        with pytest.raises(urllib.error.HTTPError) as error:
            load(url, "none", made.base.parent / "none")
        assert error.value.code == 404
        with pytest.raises(urllib.error.HTTPError) as error:
            load(url, "foreign", family("llama-tied").deltas[0])
        assert b"belongs to another base" in error.value.read()
        with pytest.raises(openai.NotFoundError):
            complete(client, "foreign")
        assert complete(client, "base") == expected["base"]

        # With no room in host memory, a delta that is not resident is read again.
        gone = shutil.copytree(made.deltas[0], tmp_path / "store" / "gone")
        write_other(gone)
        load(url, "gone", gone)
        shutil.rmtree(gone)
        with pytest.raises(openai.InternalServerError, match="is not a delta folder"):
            complete(client, "gone")
        with pytest.raises(openai.APIError, match="is not a delta folder"):
            list(complete(client, "gone", stream=True))
        assert complete(client, "one") == expected["one"]


def write_other(folder):
    """Another content, so that it is nobody else's delta in memory."""
    from safetensors.torch import load_file

    from vllm_dqrelo.format.delta import Delta, write_delta

    tensors = load_file(folder / "delta_model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    write_delta(folder, Delta(folder).config, tensors)


def chat(client, model, stream=False):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "w7 w8 w9"}],
        max_tokens=8,
        temperature=0,
        stream=stream,
    )
    if stream:
        return "".join(part.choices[0].delta.content or "" for part in answer)
    return answer.choices[0].message.content


def load(url, name, path):
    body = f'{{"lora_name": "{name}", "lora_path": "{path}"}}'.encode()
    request = urllib.request.Request(
        f"{url}/v1/load_lora_adapter", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request):
        pass


def test_vllm_serve(family, expected, server, tmp_path):
    """The option alone is enough; deltas are named as LoRA modules are."""
    made = family("llama")
    command = [BIN / "vllm", "serve", made.base, "--quantization", "dqrelo"]
    command += ["--lora-modules", f"one={made.deltas[0]}"]
    with server(command, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        assert complete(client, "one") == expected["one"]
        assert complete(client, str(made.base)) == expected["base"]
