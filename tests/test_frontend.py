# SPDX-License-Identifier: Apache-2.0
"""A delta's own tokenizer, chat template and generation config, offline.

The oracle is the merged checkpoint with the same files, run alone by vLLM.
"""

import gc
import json
import os
import shutil

import pytest
from support.engines import free

from vllm_dqrelo.format.errors import DqreloError

vllm = pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.vllm

TEXT = "w7 w8 w9 w300 w12"


@pytest.fixture(autouse=True)
def free_engines():
    yield
    free()


@pytest.fixture
def start():
    """``start(model)``: an engine with a tokenizer; with ``deltas=True`` of a base."""

    def engine(model, deltas=False, **options):
        if deltas:
            options["quantization"] = "dqrelo"
            room = {"delta_memory_gib": 0.001, "self_check": "never"}
            options["additional_config"] = {"dqrelo": room}
        return vllm.LLM(
            str(model),
            enforce_eager=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=32,
            **options,
        )

    return engine


def load(llm, name, folder):
    from vllm_dqrelo import load_delta

    return load_delta(llm, name, str(folder))


def outcome(outputs):
    (output,) = outputs
    completion = output.outputs[0]
    return (
        list(output.prompt_token_ids),
        list(completion.token_ids),
        completion.text.strip(),
        completion.finish_reason,
        completion.stop_reason,
    )


def asked(llm, chat, sampling=None, request=None):
    """A text and a conversation; sampling parameters by default."""
    options = {"sampling_params": sampling, "lora_request": request, "use_tqdm": False}
    return outcome(llm.generate(TEXT, **options)), outcome(llm.chat(chat, **options))


@pytest.mark.v2
def test_a_delta_answers_as_its_merged_checkpoint_does(family, own, start):
    """Prompt, stop tokens, default parameters, text; beside the base and others."""
    made, greedy = family("llama"), vllm.SamplingParams(temperature=0, max_tokens=12)
    expected, base, other = (
        asked(start(model), own.chat, sampling)
        for model, sampling in (
            (own.merged, None),
            (made.base, greedy),
            (made.merged[1], greedy),
        )
    )
    text, end = own.answer[:-1], own.answer[-1]
    words = " ".join(f"w{(token + 100) % 320}" for token in text)
    assert expected[1] == (own.prompt, own.answer, words, "stop", end)

    llm = start(made.base, deltas=True)
    request = load(llm, "own", own.delta)
    second = load(llm, "other", made.deltas[1])
    for _ in range(2):
        assert asked(llm, own.chat, None, request) == expected
        assert asked(llm, own.chat, greedy) == base
        assert asked(llm, own.chat, greedy, second) == other
    with pytest.raises(ValueError, match="make a call for each"):
        llm.generate([TEXT] * 2, greedy, lora_request=[request, None])


def test_an_explicit_template_of_the_server_is_the_base_s(family, own, start):
    made = family("llama")
    template = "{% for m in messages %}w1 {{ m['content'] }}{% endfor %}"
    llm = start(made.base, deltas=True, chat_template=template)
    request = load(llm, "own", own.delta)
    assert asked(llm, own.chat, None, request)[1][0] == own.prompt
    alone = start(made.base, chat_template=template)
    assert asked(llm, own.chat)[1][0] == asked(alone, own.chat)[1][0]


LOOP = "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2
BAD = [
    ("generation_config.json", "{", "is not valid JSON"),
    *[
        ("generation_config.json", json.dumps({"eos_token_id": v}), "eos_token_id is")
        for v in ("2", 3.0, True, [2, 999_999], [[2]], 320)
    ],
    ("generation_config.json", '{"temperature": NaN}', "temperature is nan"),
    ("generation_config.json", '{"max_new_tokens": -1}', "max_new_tokens is -1"),
    ("generation_config.json", '{"top_k": 9.5}', "top_k is 9.5"),
    ("tokenizer.json", "{", "is not valid JSON"),
    ("tokenizer.json", None, "a tokenizer that cannot be used"),
    ("tokenizer.json", "pipe", "is not a regular file"),
    ("tokenizer.json", "folder", "is not a regular file"),
    ("vocab.json", "link", "is a link to"),
    ("tokenizer_config.json", '{"eos_token": 5}', "a tokenizer that cannot be used"),
    ("chat_template.jinja", "{% if %}", "cannot be used: chat_template"),
    ("chat_template.jinja", "{{ 'a' | nothing }}", "No filter named 'nothing'"),
    ("chat_template.jinja", LOOP, "more time than is allowed"),
    ("chat_template.jinja", "{{ 'a' * 10 ** 11 }}", "bytes of memory"),
]


def test_files_that_cannot_be_used_are_refused(family, own, start, tmp_path):
    """At registration, by file; the engine goes on, and what was there stays."""
    llm = start(family("llama").base, deltas=True)
    request = load(llm, "own", own.delta)
    expected = asked(llm, own.chat, None, request)
    for i, (name, content, message) in enumerate(BAD):
        folder = tmp_path / f"delta-{i}"
        shutil.copytree(own.delta, folder)
        path = folder / name
        path.unlink(missing_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        elif content == "folder":
            path.mkdir()
        elif content == "link":
            path.symlink_to(folder / "nothing")
        elif content is not None:
            path.write_text(content)
        for _ in range(2):
            with pytest.raises(DqreloError) as error:
                load(llm, "bad", folder)
            said = str(error.value)
            assert str(folder) in said and name in said and message in said, said
            assert "/tmp/tmp" not in said and len(said) < 1000, said
    assert asked(llm, own.chat, None, request) == expected


def test_tokens_that_end_an_answer_hold_back_for_min_tokens(family, own, start):
    llm = start(family("llama").base, deltas=True)
    request = load(llm, "own", own.delta)
    sampling = vllm.SamplingParams(temperature=0, min_tokens=12, max_tokens=12)
    answer = asked(llm, own.chat, sampling, request)[1][1]
    assert len(answer) == 12 and answer[: len(own.answer) - 1] == own.answer[:-1]
    assert not {own.answer[-1], 319} & {*answer}


def test_a_template_that_fails_on_one_conversation_fails_that_request(
    family, own, start, tmp_path
):
    """Also where it would keep the whole server from running."""
    llm = start(family("llama").base, deltas=True)
    folder = tmp_path / "delta"
    shutil.copytree(own.delta, folder)
    text = (folder / "chat_template.jinja").read_text()
    cases = {"w1": LOOP, "w2": "{{ 'a' * 10 ** 11 }}", "w3": "{{ raise_exception(1) }}"}
    for word, what in cases.items():
        text += f"{{% if messages[0]['content'] == '{word}' %}}{what}{{% endif %}}"
    (folder / "chat_template.jinja").write_text(text)
    request = load(llm, "some", folder)
    reasons = ("more time than is allowed", "bytes of memory", "^1$")
    for word, reason in zip(cases, reasons, strict=True):
        chat = [{"role": "user", "content": word}]
        with pytest.raises(VLLMValidationError, match=reason):
            llm.chat(chat, lora_request=request, use_tqdm=False)
    assert outcome(llm.chat(own.chat, lora_request=request, use_tqdm=False))[0]


def test_a_request_that_the_engine_could_not_decode_stays_here(family, own, start):
    """The second line: whatever may have been overlooked when the files were read."""
    llm = start(family("llama").base, deltas=True)
    request = load(llm, "own", own.delta)
    profile = llm.llm_engine.profiles.of(request)
    sound = profile.attributes["generation_config_fields"]
    profile.attributes["generation_config_fields"] = {"eos_token_id": ["2"]}
    with pytest.raises(VLLMValidationError, match="own cannot be sent to the engine"):
        llm.generate(TEXT, lora_request=request, use_tqdm=False)
    profile.attributes["generation_config_fields"] = sound
    assert outcome(llm.generate(TEXT, lora_request=request, use_tqdm=False))


def test_what_is_used_is_what_was_checked(family, own, start, tmp_path):
    """A folder that changes after that is another delta's."""
    llm = start(family("llama").base, deltas=True)
    folder = tmp_path / "delta"
    shutil.copytree(own.delta, folder)
    request = load(llm, "own", folder)
    expected = asked(llm, own.chat, None, request)
    for path in folder.glob("*"):
        if path.name != "delta_config.json" and not path.name.startswith("delta_model"):
            path.unlink()
            os.mkfifo(path)
    assert asked(llm, own.chat, None, request) == expected


def test_tokens_that_the_model_does_not_have_are_refused(family, own, start, tmp_path):
    from transformers import AutoTokenizer

    llm = start(family("llama").base, deltas=True)
    folder = tmp_path / "delta"
    shutil.copytree(own.delta, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["w320"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(Exception, match="tokens up to 320, but .* up to 319 only"):
        load(llm, "added", folder)


def test_what_vllm_does_with_the_base_s_tokens_is_refused(family, own, start):
    from vllm.sampling_params import StructuredOutputsParams

    llm = start(family("llama").base, deltas=True)
    request = load(llm, "own", own.delta)
    sampling = vllm.SamplingParams(
        structured_outputs=StructuredOutputsParams(choice=["w1"])
    )
    with pytest.raises(
        VLLMValidationError, match="structured_outputs is not available"
    ):
        llm.generate(TEXT, sampling, lora_request=request, use_tqdm=False)


def test_a_delta_that_was_unloaded_is_refused(family, own, start):
    llm = start(family("llama").base, deltas=True)
    request = load(llm, "own", own.delta)
    llm.llm_engine.remove_lora(request.lora_int_id)
    with pytest.raises(VLLMValidationError, match="own was unloaded"):
        llm.generate(TEXT, lora_request=request, use_tqdm=False)
    again = load(llm, "own", own.delta)
    assert outcome(llm.generate(TEXT, lora_request=again, use_tqdm=False))


def test_the_tokenizers_of_a_delta_that_was_unloaded_are_freed(family, own, start):
    """Also those that vLLM has in a pool of several threads, and in its caches."""
    from transformers import PreTrainedTokenizerBase

    def held():
        gc.collect()
        return sum(isinstance(o, PreTrainedTokenizerBase) for o in gc.get_objects())

    llm = start(family("llama").base, deltas=True)
    before = held()
    request = load(llm, "own", own.delta)
    assert asked(llm, own.chat, None, request) and held() > before
    llm.llm_engine.remove_lora(request.lora_int_id)
    assert held() == before


def test_the_same_files_are_held_once(family, own, start, tmp_path):
    llm = start(family("llama").base, deltas=True)
    shutil.copytree(own.delta, tmp_path / "copy")
    requests = [load(llm, "one", own.delta), load(llm, "two", tmp_path / "copy")]
    one, two = map(llm.llm_engine.profiles.of, requests)
    assert one is two is not None
    plain = load(llm, "plain", family("llama").deltas[1])
    assert llm.llm_engine.profiles.of(plain) is None
