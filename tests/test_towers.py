# SPDX-License-Identifier: Apache-2.0
"""Images of models whose vision tower is their own, against transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import images
from support.image_answers import (
    BESIDE,
    EVERYTHING,
    KINDS,
    LANGUAGE,
    alone,
    asked,
    batch,
    check,
    differ,
    make,
    save,
    start,
)
from transformers import AutoModelForImageTextToText

from dqrelo_tools.convert import convert

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_is_encoded_by_its_model(kind, engine, load, tmp_path):
    """The same images asked at once of models with towers of their own, and without."""
    parts = [EVERYTHING, EVERYTHING, LANGUAGE, BESIDE]
    models, deltas = make(kind, tmp_path, parts)
    base, prompts = models[0], asked(*images.MADE[kind]()[2:])
    expected = [alone(model, prompts) for model in models]
    differ([some[1:] for some in expected])  # text alone is not encoded

    llm = start(engine, base, enable_tower_connector_lora=True)
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
def test_workers_share_an_encoder(split, kind, engine, load, tmp_path, monkeypatch):
    """Each has a part of a tower's matrices; or the first stage has the tower."""
    if kind == "llava":
        pytest.importorskip("torchvision", reason="vLLM's LLaVA needs it")
    models, deltas = make(kind, tmp_path, [EVERYTHING] * 2)
    prompts = asked("<image>")
    expected = [alone(model, prompts) for model in models]
    bind = "nobind" if split == "tensor" else "0|0"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", bind)
    workers = {f"{split}_parallel_size": 2}
    llm = start(engine, models[0], enable_tower_connector_lora=True, **workers)
    requests = [None, *(load(llm, f"delta-{i}", d) for i, d in enumerate(deltas))]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(models))]
    given = [prompts[p] for p, _ in order]
    found = batch(llm, given, [requests[m] for _, m in order])
    for (p, m), got in zip(order, found, strict=True):
        check(got, expected[m][p])


@pytest.mark.slow
def test_an_adapter_of_all_linear_layers(engine, load, tmp_path):
    """PEFT's "all-linear" has those of the tower, too; against the merged model."""
    base = save("idefics3", tmp_path / "base", 1)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    images.MADE["idefics3"]().processor.save_pretrained(tmp_path / "merged")
    convert(str(base), str(tmp_path / "adapter"), tmp_path / "delta")
    models, prompts = [base, tmp_path / "merged"], asked("<image>")
    expected = [alone(model, prompts) for model in models]
    differ(expected)
    llm = start(engine, base, enable_tower_connector_lora=True)
    requests = [None, load(llm, "adapter", tmp_path / "delta")]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(models))]
    given = [prompts[p] for p, _ in order]
    found = batch(llm, given, [requests[m] for _, m in order])
    for (p, m), got in zip(order, found, strict=True):
        check(got, expected[m][p])
