# SPDX-License-Identifier: Apache-2.0
"""Requests with images: a mixed batch against transformers running each checkpoint."""

import base64
import concurrent.futures
import io
import itertools
import shutil
import sys
from pathlib import Path

import openai
import pytest
import torch
from support import images
from support.images import picture
from support.renamed import edit, renaming
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

vllm = pytest.importorskip("vllm")
from vllm.exceptions import VLLMValidationError  # noqa: E402

pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
TOKENS = 6  # of an answer
LANGUAGE = ("language_model", "text_model", "lm_head")
EVERYTHING = ("",)  # which each name has
BESIDE = ("visual", "vision_tower", "vision_model", "connector", "projector")


def save(kind, folder, seed, part=LANGUAGE, published=False, added_tokens=0):
    """A random model with its processor; parameters of ``part`` moved, seeded."""
    made = images.MADE[kind]()
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(made.config)
    if added_tokens:
        words = made.config.text_config.vocab_size + added_tokens
        model.resize_token_embeddings(words, mean_resizing=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(p in name for p in part):
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    if published:
        edit(folder, renaming(images.PUBLISHED))
    return folder


def compressed(base, model, folder):
    """A delta, and base and delta as a checkpoint."""
    convert(str(base), str(model), folder / "delta", 0.25)
    export(str(base), folder / "delta", folder / "merged")
    return folder / "delta", folder / "merged"


def make(kind, folder, parts):
    """A base and fine-tunes of these parts, as checkpoints, and their deltas."""
    base = save(kind, folder / "base", 1, published=kind in images.RENAMED)
    models, deltas = [base], []
    for i, part in enumerate(parts):
        (own := folder / str(i)).mkdir()
        delta, merged = compressed(base, save(kind, own / "model", 2 + i, part), own)
        models.append(merged)
        deltas.append(delta)
    return models, deltas


def asked(image):
    """Text and its images: without, with one, with two and text between them."""
    one, other = picture(1), picture(2, 30, 70)
    return [
        ("w1 w5 w9 w33 w200 w77 w3", []),
        (f"w5 {image} w7 w8", [one]),
        (f"{image} w4 w100 {image} w9 w10 w11", [other, one]),
        (" ".join(["w7"] * 40) + f" {image} w3 " + " ".join(["w6"] * 30), [other]),
    ]


def alone(folder, prompts, more=()):
    """Each prompt with its greedy continuation, and the logprobs of all but the first.

    Args:
        more: tokens at the end of each prompt.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for text, pictures in prompts:
        inputs = processor(text=text, images=pictures or None, return_tensors="pt")
        made = torch.cat([inputs.pop("input_ids"), torch.tensor([[*more]]).long()], 1)
        inputs.pop("attention_mask")
        # Gemma 3's image tokens attend to each other, but not in vLLM on a CPU.
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            for _ in range(TOKENS):
                scores = model(input_ids=made, **inputs).logits.log_softmax(-1)
                made = torch.cat([made, scores[:, -1:].argmax(-1)], dim=1)
                if (kinds := inputs.get("mm_token_type_ids")) is not None:
                    text = kinds.new_zeros(1, 1)  # what is generated is
                    inputs["mm_token_type_ids"] = torch.cat([kinds, text], dim=1)
        chosen = scores[0].gather(1, made[0, 1:, None])[:, 0]
        found.append((made[0].tolist(), chosen))
    return found


def batch(llm, prompts, requests, prompt_logprobs=0):
    """The same of vLLM, all prompts in one batch, and the number of cached tokens."""
    sampling = vllm.SamplingParams(
        max_tokens=TOKENS, temperature=0, logprobs=0, prompt_logprobs=prompt_logprobs
    )
    found = []
    for output in llm.generate(
        [
            {"prompt": text, "multi_modal_data": {"image": pictures}}
            if pictures
            else {"prompt": text}
            for text, pictures in prompts
        ],
        sampling,
        lora_request=requests,
        use_tqdm=False,
    ):
        (completion,) = output.outputs
        tokens = [*output.prompt_token_ids, *completion.token_ids]
        steps = [*(output.prompt_logprobs or [None])[1:], *completion.logprobs]
        pairs = zip(tokens[-len(steps) :], steps, strict=True)
        chosen = torch.tensor([step[token].logprob for token, step in pairs])
        found.append((tokens, chosen, output.num_cached_tokens))
    return found


def check(got, expected):
    tokens, scores = got[:2]
    assert tokens == expected[0]
    assert (scores - expected[1][-len(scores) :]).abs().max() <= TOLERANCE


def differ(answers):
    """The test can fail: the models differ by far more than the tolerance."""
    for one, other in itertools.combinations(answers, 2):
        for (tokens, scores), (_, others) in zip(one, other, strict=True):
            same = slice(len(tokens) - TOKENS - 1)
            assert (scores[same] - others[same]).abs().max() > 10 * TOLERANCE


@pytest.fixture(name="start")
def start_fixture(engine):
    """``start(base)``: an engine that takes images, in parts of a prompt."""

    def start(base, **options):
        room = {"delta_memory_gib": 0.001, "self_check": "always"}
        options.setdefault("additional_config", {"dqrelo": room})
        return engine(
            base,
            quantization="dqrelo",
            skip_tokenizer_init=False,
            max_num_batched_tokens=64,
            **options,
        )

    return start


KINDS = [
    pytest.param(kind, marks=pytest.mark.v2 if kind == "idefics3" else ())
    for kind in ("idefics3", "llava", "gemma3", "qwen2-vl")
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_each_model_alone(kind, start, load, tmp_path):
    """The same images asked of the base and of two deltas; the tower is the base's."""
    if kind != "idefics3":
        pytest.importorskip("torchvision", reason=f"vLLM's {kind} needs it")
    models, deltas = make(kind, tmp_path, [LANGUAGE, LANGUAGE])
    base, prompts = models[0], asked(images.MADE[kind]().image)
    expected = [alone(model, prompts) for model in models]
    differ(expected)

    llm = start(base)
    requests = [None, *(load(llm, f"delta-{i}", d) for i, d in enumerate(deltas))]
    # Blocks with an image are found again by the model that they are of, by no other.
    for m, is_cached in [(0, False), (0, True), (1, False), (2, False), (1, True)]:
        (got,) = batch(llm, prompts[3:], requests[m], None)
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_encoded_by_its_model(kind, start, load, tmp_path):
    """The same images asked at once of models with towers of their own, and without."""
    if kind != "idefics3":
        pytest.importorskip("torchvision", reason=f"vLLM's {kind} needs it")
    parts = [EVERYTHING, EVERYTHING, LANGUAGE, BESIDE]
    models, deltas = make(kind, tmp_path, parts)
    base, prompts = models[0], asked(images.MADE[kind]().image)
    expected = [alone(model, prompts) for model in models]
    differ([some[1:] for some in expected])  # text alone is not encoded

    llm = start(base, enable_tower_connector_lora=True)
    requests = [None, *(load(llm, f"delta-{i}", d) for i, d in enumerate(deltas))]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(models))]
    for prompt_logprobs in (0, None, None):
        found = batch(
            llm,
            [prompts[p] for p, _ in order],
            [requests[m] for _, m in order],
            prompt_logprobs,
        )
        for (p, m), got in zip(order, found, strict=True):
            check(got, expected[m][p])
        order = order[::-1]
    # A name with another content, asked of images that the old content encoded.
    batch(llm, [(f"w12 {prompts[2][0]}", prompts[2][1])], requests[1], None)
    llm.llm_engine.remove_lora(requests[1].lora_int_id)
    renamed = load(llm, "delta-0", deltas[1])
    again = [(f"w11 {prompts[2][0]}", prompts[2][1])]
    for model, request in ((models[2], renamed), (base, None)):
        (got,) = batch(llm, again, request, None)
        check(got, alone(model, again)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "kind"), [("tensor", "idefics3-split"), ("pipeline", "llava")]
)
def test_workers_share_an_encoder(split, kind, start, load, tmp_path, monkeypatch):
    """Each has a part of a tower's matrices; or the first stage has the tower."""
    if kind == "llava":
        pytest.importorskip("torchvision", reason="vLLM's LLaVA needs it")
    models, deltas = make(kind, tmp_path, [EVERYTHING] * 2)
    prompts = asked("<image>")
    expected = [alone(model, prompts) for model in models]
    bind = "nobind" if split == "tensor" else "0|0"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    workers = {f"{split}_parallel_size": 2}
    llm = start(models[0], enable_tower_connector_lora=True, **workers)
    requests = [None, *(load(llm, f"delta-{i}", d) for i, d in enumerate(deltas))]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(models))]
    given = [prompts[p] for p, _ in order]
    found = batch(llm, given, [requests[m] for _, m in order])
    for (p, m), got in zip(order, found, strict=True):
        check(got, expected[m][p])


@pytest.fixture
def pair(tmp_path):
    """An Idefics3, its fine-tune's delta, and that as a checkpoint."""
    base = save("idefics3", tmp_path / "base", 1)
    return base, *compressed(base, save("idefics3", tmp_path / "tuned", 2), tmp_path)


@pytest.mark.slow
def test_compiled_as_vllm_does_by_default(start, load, pair):
    """Steps of the base alone run other code than steps with deltas."""
    base, delta, merged = pair
    prompts = asked("<image>")
    expected = [alone(model, prompts) for model in (base, merged)]
    llm = start(base, enforce_eager=False)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    assert mode != vllm.config.CompilationMode.NONE
    requests = [None, load(llm, "delta", delta)]
    for models in ([0], [1], [0, 1], [0]):
        order = [(p, m) for p in range(len(prompts)) for m in models]
        given = [prompts[p] for p, _ in order]
        found = batch(llm, given, [requests[m] for _, m in order])
        for (p, m), got in zip(order, found, strict=True):
            check(got, expected[m][p])


@pytest.mark.slow
def test_added_tokens_next_to_images(start, load, tmp_path):
    """An embedding that was changed and extended; placeholders never meet it."""
    base = save("idefics3", tmp_path / "base", 1)
    tuned = save("idefics3", tmp_path / "tuned", 2, added_tokens=3)
    delta, merged = compressed(base, tuned, tmp_path)
    room = {"dqrelo": {"delta_memory_gib": 0.001, "added_tokens": 8}}
    prompts, more = asked("<image>")[:3], [320, 5, 322]
    expected = alone(merged, prompts, more), alone(base, prompts, [4])
    llm = start(base, additional_config=room)
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
def test_template_and_vocabulary_of_its_own(start, load, pair, tmp_path):
    """A delta's template is used with images; another vocabulary is text only."""
    base, delta, merged = pair
    pictures = [picture(1), picture(2, 30, 70)]
    give_template(delta, merged)
    expected = [alone(m, [rendered(m, pictures)])[0][0] for m in (base, merged)]
    assert expected[1][:2] == [100, 101] != expected[0][:2]
    llm = start(base)
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
    models = {"base": base, "one": merged, "own": tmp_path / "own-merged"}
    own = shutil.copytree(delta, tmp_path / "own")
    give_template(own, shutil.copytree(merged, models["own"]))
    pictures = [picture(3), picture(4, 70, 30)]
    command = [Path(sys.executable).parent / "dqrelo", "serve", base]
    command += ["--served-model-name", "base", "--delta", f"one={delta}"]
    command += ["--delta", f"own={own}"]
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
        assert len({expected[name, count] for name in models}) == 3
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
