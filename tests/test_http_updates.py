# SPDX-License-Identifier: Apache-2.0
"""A trainer updates a delta of a running server; chats in Anthropic's form."""

import shutil
import sys
from pathlib import Path

import openai
import pytest
from support.catalogue import fill

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BIN = Path(sys.executable).parent
IDS = {"return_token_ids": True, "ignore_eos": True}


# Refuses a system message that is not the first message.
STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system first') }}{% endif %}w5 {{ m['content'] }} w6 "
    "{% endfor %}"
)


@pytest.fixture(scope="module")
def store(family, own, tmp_path_factory):
    """A catalogue of good and bad deltas."""
    root = tmp_path_factory.mktemp("store")
    fill(root, family, own)
    shutil.copytree(own.delta, root / "strict")
    (root / "strict" / "chat_template.jinja").write_text(STRICT)
    return root


@pytest.fixture(scope="module")
def client(family, store, server, tmp_path_factory):
    command = [BIN / "dqrelo", "serve", family("llama").base, "--delta-dir", store]
    command += ["--served-model-name", "base", "--delta-endpoints"]
    command += ["--max-loras", "2", "--additional-config"]
    command += ['{"dqrelo": {"delta_memory_gib": 0.001, "self_check": "never"}}']
    with server(command, tmp_path_factory.mktemp("log") / "log") as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_name_is_updated_while_requests_run(client, store, family, alone, prompts):
    """By new folders, and by one that is replaced; a failed update changes nothing."""
    steps, deltas = store / "steps", family("llama").deltas

    def ask(model, tokens=8, **options):
        options |= {"logprobs": 1, "temperature": 0, "extra_body": IDS}
        return client.completions.create(
            model=model, prompt=prompts[2], max_tokens=tokens, **options
        )

    def check(model, number):
        tokens, logprobs, _ = alone("llama")[number][2]  # the cache has the prompt
        (answer,) = ask(model).choices
        assert answer.token_ids == tokens
        assert answer.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)

    def load(folder):
        body = {"lora_name": "trained", "load_inplace": True, "lora_path": str(folder)}
        client.post("/load_lora_adapter", body=body, cast_to=str)

    for number, folder in enumerate(("1", "2", "2"), 1):
        if number > 1:
            whole = ask("trained", 60).choices[0].token_ids
            stream = ask("trained", 60, stream=True)
            first = next(stream)
        shutil.copytree(deltas[number - 1], steps / folder, dirs_exist_ok=True)
        if number < 3:
            load(steps / folder)
        else:
            body = {"load_inplace": True}
            client.post("/dqrelo/deltas/trained/load", body=body, cast_to=object)
        check("trained", number)
        check("base", 0)
        if number > 1:
            assert tokens_of([first, *stream]) == whole
        with pytest.raises(openai.BadRequestError, match="was changed after it was"):
            load(store / "flipped")
        check("trained", number)


def test_a_chat_in_anthropics_form_is_rendered_as_its_model_does(client, store, own):
    """System messages move to the front only where the model's template asks for it."""
    inline = [("user", "w7 w8"), ("system", "w9 w10"), ("user", "w11")]
    first = [("system", "w1 w2"), *inline]
    moved = [("system", "w1 w2w9 w10"), inline[0], inline[2]]  # vLLM joins by nothing
    chats = {"base": first, "own": first, "strict": moved}
    body = {"system": "w1 w2", "messages": messages(inline)}
    disabled = {"thinking": {"type": "disabled"}}
    for name, chat in chats.items():
        expected = client.chat.completions.create(
            model=name,
            messages=messages(chat),
            max_tokens=4,
            temperature=0,
        )
        body["model"] = name
        for more in ({}, disabled):
            asked = body | {"max_tokens": 4, "temperature": 0} | more
            answer = client.post("/messages", body=asked, cast_to=object)
            tokens = expected.usage.prompt_tokens
            assert answer["usage"]["input_tokens"] == tokens, name
            (content,) = answer["content"]
            assert content["text"] == expected.choices[0].message.content
            counted = client.post(
                "/messages/count_tokens", body=body | more, cast_to=object
            )
            assert counted["input_tokens"] == tokens


def messages(chat):
    """Role and content of each message, as an API takes them."""
    return [{"role": role, "content": content} for role, content in chat]


def tokens_of(parts):
    """The tokens of a stream; a busy server puts several of them into one part."""
    some = (getattr(part.choices[0], "token_ids", None) for part in parts)
    return [token for tokens in some for token in tokens or []]
