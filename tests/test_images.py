# SPDX-License-Identifier: Apache-2.0
"""Requests with images: a mixed batch against transformers running each checkpoint."""

import base64
import concurrent.futures
import io
import shutil
import sys
from pathlib import Path

import openai
import pytest
from support import images
from support.image_answers import (
    BESIDE,
    EVERYTHING,
    KINDS,
    LANGUAGE,
    TOKENS,
    alone,
    asked,
    batch,
    check,
    compressed,
    differ,
    make,
    save,
    start,
)
from support.images import picture
from transformers import AutoProcessor, AutoTokenizer

from dqrelo_tools.convert import convert

vllm = pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.vllm


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_each_model_alone(kind, engine, load, tmp_path):
    """The same images asked of the base and of two deltas; the tower is the base's."""
    models, deltas = make(kind, tmp_path, [LANGUAGE, LANGUAGE])
    base, prompts = models[0], asked(*images.MADE[kind]()[2:])
    expected = [alone(model, prompts) for model in models]
    differ(expected)

    llm = start(engine, base)
    requests = [None, *(load(llm, f"delta-{i}", d) for i, d in enumerate(deltas))]
    # Blocks with an image are found again by the model that they are of, by no other.
    for m, is_cached in [(0, False), (0, True), (1, False), (2, False), (1, True)]:
        (got,) = batch(llm, [prompts[3]], requests[m], None)
        check(got, expected[m][3])
        assert bool(got[2]) == is_cached, m
    order = [(p, m) for p in range(len(prompts)) for m in range(len(models))]
    for prompt_logprobs in (0, None):
        found = batch(
            llm,
            [prompts[p] for p, _ in order],
            [requests[m] for _, m in order],
            prompt_logprobs,
        )
        for (p, m), got in zip(order, found, strict=True):
            check(got, expected[m][p])

    other = save(kind, tmp_path / "beside", 4, LANGUAGE + BESIDE)
    convert(str(base), str(other), tmp_path / "delta", 0.25)
    message = r"\d+ of its parameters, such as \S+, are outside of the language model"
    with pytest.raises(Exception, match=message):
        load(llm, "beside", tmp_path / "delta")


@pytest.fixture
def pair(tmp_path):
    """An Idefics3, its fine-tune's delta, and that as a checkpoint."""
    base = save("idefics3", tmp_path / "base", 1)
    return base, *compressed(base, save("idefics3", tmp_path / "tuned", 2), tmp_path)


@pytest.mark.slow
def test_compiled_as_vllm_does_by_default(engine, load, pair, tmp_path):
    """Steps of the base alone run other code than steps with deltas."""
    base, delta, merged = pair
    tuned = save("idefics3", tmp_path / "everything", 3, EVERYTHING)
    (folder := tmp_path / "tower").mkdir()
    tower, merged_tower = compressed(base, tuned, folder)
    prompts = asked("<image>")
    expected = [alone(model, prompts) for model in (base, merged, merged_tower)]
    options = {"enforce_eager": False, "enable_tower_connector_lora": True}
    llm = start(engine, base, **options)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    assert mode != vllm.config.CompilationMode.NONE
    requests = [None, load(llm, "delta", delta), load(llm, "tower", tower)]
    for models in ([0], [1], [2, 0, 1], [0]):
        order = [(p, m) for p in range(len(prompts)) for m in models]
        given = [prompts[p] for p, _ in order]
        found = batch(llm, given, [requests[m] for _, m in order])
        for (p, m), got in zip(order, found, strict=True):
            check(got, expected[m][p])


@pytest.mark.slow
def test_added_tokens_next_to_images(engine, load, tmp_path):
    """An embedding that was changed and extended; placeholders never meet it."""
    base = save("idefics3", tmp_path / "base", 1)
    tuned = save("idefics3", tmp_path / "tuned", 2, added_tokens=3)
    delta, merged = compressed(base, tuned, tmp_path)
    room = {"dqrelo": {"delta_memory_gib": 0.001, "added_tokens": 8}}
    prompts, more = asked("<image>")[:3], [320, 5, 322]
    expected = alone(merged, prompts, more), alone(base, prompts, [4])
    llm = start(engine, base, additional_config=room)
    request = load(llm, "delta", delta)
    words = llm.get_tokenizer()

    def ask(ending, request):
        given = [
            {
                "prompt_token_ids": words(text)["input_ids"] + ending,
                **({"multi_modal_data": {"image": pictures}} if pictures else {}),
            }
            for text, pictures in prompts
        ]
        sampling = vllm.SamplingParams(max_tokens=TOKENS, temperature=0)
        made = llm.generate(given, sampling, lora_request=request, use_tqdm=False)
        return [[*m.prompt_token_ids, *m.outputs[0].token_ids] for m in made]

    for _ in range(2):
        assert ask(more, request) == [tokens for tokens, _ in expected[0]]
        assert ask([4], None) == [tokens for tokens, _ in expected[1]]


def conversation(*pictures, text="w7 w8 w9"):
    """One message: pictures as data: URLs, then text."""
    parts = []
    for image in pictures:
        image.save(buffer := io.BytesIO(), "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def rendered(folder, pictures, text="w7 w8 w9"):
    """What the chat template of a model makes of it, and the pictures."""
    parts = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    processor = AutoProcessor.from_pretrained(folder)
    words = [{"role": "user", "content": parts}]
    return processor.apply_chat_template(words), pictures


def give_template(delta, merged):
    """A chat template of its own for a delta, and for the delta as a checkpoint."""
    processor = AutoProcessor.from_pretrained(merged)
    template = f"w100 w101 {processor.chat_template}"
    processor.chat_template = processor.tokenizer.chat_template = template
    processor.tokenizer.save_pretrained(delta)
    processor.save_pretrained(merged)


@pytest.mark.slow
def test_template_and_vocabulary_of_its_own(engine, load, pair, tmp_path):
    """A delta's template is used with images; another vocabulary is text only."""
    base, delta, merged = pair
    pictures = [picture(1), picture(2, 30, 70)]
    give_template(delta, merged)
    expected = [alone(m, [rendered(m, pictures)])[0][0] for m in (base, merged)]
    assert expected[1][:2] == [100, 101] != expected[0][:2]
    llm = start(engine, base)
    request = load(llm, "template", delta)
    sampling = vllm.SamplingParams(max_tokens=TOKENS, temperature=0)

    def chat(request, *pictures):
        (made,) = llm.chat(
            conversation(*pictures), sampling, lora_request=request, use_tqdm=False
        )
        return [*made.prompt_token_ids, *made.outputs[0].token_ids]

    for _ in range(2):
        assert chat(None, *pictures) == expected[0]
        assert chat(request, *pictures) == expected[1]

    other = shutil.copytree(delta, tmp_path / "other")
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w250"', '"w2500"'))
    request = load(llm, "vocabulary", other)
    assert chat(request)[:2] == [100, 101]
    with pytest.raises(VLLMValidationError, match="images are not available for a"):
        chat(request, *pictures)
    assert chat(None, *pictures) == expected[0]


@pytest.mark.slow
def test_over_http(pair, server, tmp_path):
    """The OpenAI client's image_url, a data: URL, asked of base and delta at once."""
    base, delta, merged = pair
    tuned = save("idefics3", tmp_path / "everything", 3, EVERYTHING)
    (folder := tmp_path / "tower").mkdir()
    tower, merged_tower = compressed(base, tuned, folder)
    models = {"base": base, "one": merged, "own": tmp_path / "own-merged"}
    models["tower"] = merged_tower
    own = shutil.copytree(delta, tmp_path / "own")
    give_template(own, shutil.copytree(merged, models["own"]))
    pictures = [picture(3), picture(4, 70, 30)]
    command = [Path(sys.executable).parent / "dqrelo", "serve", base]
    command += ["--served-model-name", "base", "--delta", f"one={delta}"]
    command += ["--delta", f"own={own}", "--delta", f"tower={tower}"]
    command += ["--max-num-batched-tokens", "128", "--limit-mm-per-prompt"]
    command += ['{"image": 2}', "--additional-config"]
    command += ['{"dqrelo": {"delta_memory_gib": 0.001}}']
    words = AutoTokenizer.from_pretrained(base)
    expected = {}
    for name, folder in models.items():
        for count in (1, 2):
            shown = rendered(folder, pictures[:count])
            tokens = alone(folder, [shown])[0][0][-TOKENS:]
            expected[name, count] = words.decode(tokens, skip_special_tokens=True)
    for count in (1, 2):  # the test can fail
        assert len({expected[name, count] for name in models}) == 4
    with server(command, tmp_path / "log") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(question):
            model, count = question
            answer = client.chat.completions.create(
                model=model,
                messages=conversation(*pictures[:count]),
                max_tokens=TOKENS,
                temperature=0,
            )
            return answer.choices[0].message.content.strip()

        questions = list(expected) * 3
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = pool.map(ask, questions)
            for question, answer in zip(questions, answers, strict=True):
                assert answer == expected[question], question
        with pytest.raises(openai.BadRequestError, match="At most 2 image"):
            ask_three = conversation(*pictures, pictures[0])
            client.chat.completions.create(model="one", messages=ask_three)
