# SPDX-License-Identifier: Apache-2.0
"""A delta's tokenizer: its template says in a sandbox what transformers says."""

import copy

import jinja2
import pytest

from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.frontend.tokenizer import own_tokenizer

CHAT = [
    {"role": "system", "content": "w7 {{ w1 }} ü 你 \u2028"},
    {"role": "user", "content": [{"type": "text", "text": "w8\nw9 "}]},
    {"role": "assistant", "content": "w10 w11"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"n": 1.5}}}]
DOCUMENTS = [{"title": "w12", "text": "w13"}]
TEMPLATE = """
{%- for m in messages %}
  {{ bos_token }}{{ m.role }} {{ m['content'] | tojson }}
  {%- generation %} {{ m.content }}{% endgeneration %}
{% endfor %}{{ tools | tojson(indent=2) }} {{ documents }} {{ colour }}
{% if add_generation_prompt %}w3{% endif %}"""


@pytest.fixture
def pair(save_model, tmp_path):
    """A tokenizer, and the same one with its template in a sandbox."""
    from transformers import AutoTokenizer

    save_model("llama-tied", tmp_path / "model", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"bos_token": "w1", "extra_special_tokens": ["w5"]})
    tokenizer.chat_template = {"default": TEMPLATE, "short": "{{ messages | length }}"}
    return tokenizer, own_tokenizer(tokenizer, "name")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": TOOLS, "documents": DOCUMENTS},
        {"add_generation_prompt": True, "colour": "red"},
        {"chat_template": "short"},
        {"chat_template": "{{ messages[0].content }}"},
        {"chat_template": "{{ m }}{{ messages[2].content }}{% set m = 1 %}"},
        {"tokenize": False},
        {"return_dict": False},
        {"return_dict": False, "truncation": True, "max_length": 4},
        {
            "chat_template": "{% for m in messages %}{{ m.content }} {% endfor %}w3",
            "continue_final_message": True,
            "tokenize": False,
        },
    ],
)
def test_it_renders_what_transformers_renders(pair, options):
    alone, apart = pair
    expected = alone.apply_chat_template(CHAT, **options)
    for tokenizer in (apart, copy.copy(apart), copy.deepcopy(apart)):
        assert tokenizer.apply_chat_template(CHAT, **options) == expected
        assert tokenizer.name_or_path == "name"
    assert alone.name_or_path != "name"


def test_what_a_template_says_of_a_conversation_is_said(pair):
    _, apart = pair
    with pytest.raises(jinja2.TemplateError, match="^no such role$"):
        apart.apply_chat_template(
            CHAT, chat_template="{{ raise_exception('no such role') }}"
        )
    with pytest.raises(jinja2.TemplateError, match="fails: 'a' is undefined"):
        apart.apply_chat_template(CHAT, chat_template="{{ a.b }}")


class PanicException(BaseException):
    """As native code that panics raises it."""


@pytest.mark.parametrize("error", [KeyError("w1"), PanicException("w1")])
def test_a_text_that_it_fails_on_is_refused(pair, monkeypatch, error):
    tokenizer, apart = pair

    def fail(*args, **kwargs):
        raise error

    for name in ("_encode_plus", "_decode"):
        monkeypatch.setattr(type(tokenizer), name, fail)
    for use in (lambda: apart("w1"), lambda: apart.encode("w1")):
        with pytest.raises(DqreloError, match="the tokenizer fails: .*w1"):
            use()
    with pytest.raises(DqreloError, match="the tokenizer fails: .*w1"):
        apart.decode([1])
    monkeypatch.setattr(type(tokenizer), "_decode", interrupt)
    with pytest.raises(KeyboardInterrupt):
        apart.decode([1])


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt
