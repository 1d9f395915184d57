# SPDX-License-Identifier: Apache-2.0
"""A delta's own tokenizer, chat template and generation config, offline.

The oracle is the merged checkpoint with the same files, run alone by vLLM.
"""

import gc
import shutil

import pytest

vllm = pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.vllm

TEXT = "w7 w8 w9 w300 w12"


@pytest.fixture(autouse=True)
def free_engines():
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def start():
    """``start(model)``: an engine with a tokenizer; with ``deltas=True`` of a base."""

    def engine(model, deltas=False, **options):
        if deltas:
            options["quantization"] = "dqrelo"
            options["additional_config"] = {"dqrelo": {"delta_memory_gib": 0.001}}
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "cannot be used"),
        ("tokenizer.json", None, "cannot be used"),
        ("generation_config.json", "{", "cannot be used"),
    ],
)
def test_files_that_cannot_be_used_are_refused(
    family, own, start, tmp_path, name, content, message
):
    """At registration; the engine goes on, and what was there stays."""
    made = family("llama")
    llm = start(made.base, deltas=True)
    request = load(llm, "own", own.delta)
    expected = asked(llm, own.chat, None, request)
    folder = tmp_path / "delta"
    shutil.copytree(own.delta, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(Exception, match=rf"{folder} has files of its own .*{message}"):
        load(llm, "own", folder)
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


def test_the_same_files_are_held_once(family, own, start, tmp_path):
    llm = start(family("llama").base, deltas=True)
    shutil.copytree(own.delta, tmp_path / "copy")
    requests = [load(llm, "one", own.delta), load(llm, "two", tmp_path / "copy")]
    one, two = map(llm.llm_engine.frontends.of, requests)
    assert one is two is not None
    plain = load(llm, "plain", family("llama").deltas[1])
    assert llm.llm_engine.frontends.of(plain) is None
