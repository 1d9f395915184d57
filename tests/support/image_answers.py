# SPDX-License-Identifier: Apache-2.0
"""Models that see images: saved, changed, asked in vLLM and in transformers."""

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from support import images
from support.images import clip, picture
from support.renamed import edit, renaming
from transformers import AutoModelForImageTextToText, AutoProcessor

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

vllm = pytest.importorskip("vllm")

WITHOUT_TORCHVISION = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="vLLM's processors of these models need torchvision",
)
KINDS = [
    pytest.param("idefics3", marks=pytest.mark.v2),
    pytest.param("llava", marks=WITHOUT_TORCHVISION),
    pytest.param("gemma3", marks=WITHOUT_TORCHVISION),
    pytest.param("qwen2-vl", marks=WITHOUT_TORCHVISION),
]
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


def asked(image, video=""):
    """Text and its images: without, with one, with two and text between them.

    With a video and an image, where there are videos.
    """
    one, other = picture(1), picture(2, 30, 70)
    seen = [(f"w2 {video} w4 {image} w6", [clip(3), one])] if video else []
    return [
        ("w1 w5 w9 w33 w200 w77 w3", []),
        (f"w5 {image} w7 w8", [one]),
        (f"{image} w4 w100 {image} w9 w10 w11", [other, one]),
        (" ".join(["w7"] * 40) + f" {image} w3 " + " ".join(["w6"] * 30), [other]),
        *seen,
    ]


def sorted_out(media):
    """Images, and videos, as processors are given them: None where there are none."""
    videos = [one for one in media if isinstance(one, np.ndarray)]
    pictures = [one for one in media if not isinstance(one, np.ndarray)]
    return pictures or None, videos or None


def alone(folder, prompts, more=()):
    """Each prompt with its greedy continuation, and the logprobs of all but the first.

    Args:
        more: tokens at the end of each prompt.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = []
    for text, pictures in prompts:
        shown, moving = sorted_out(pictures)
        more_inputs = {"videos": moving} if moving else {}
        inputs = processor(text=text, images=shown, return_tensors="pt", **more_inputs)
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
    given = []
    for text, media in prompts:
        kinds = zip(("image", "video"), sorted_out(media), strict=True)
        data = {kind: items for kind, items in kinds if items}
        given.append({"prompt": text} | ({"multi_modal_data": data} if data else {}))
    for output in llm.generate(
        given,
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


def start(engine, base, **options):
    """An engine that takes images, in parts of a prompt."""
    room = {"delta_memory_gib": 0.001, "self_check": "always"}
    options.setdefault("additional_config", {"dqrelo": room})
    return engine(
        base,
        quantization="dqrelo",
        skip_tokenizer_init=False,
        max_num_batched_tokens=64,
        **options,
    )
