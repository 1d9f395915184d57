# SPDX-License-Identifier: Apache-2.0
"""Drafts are checked by the model that a request names, delta or base."""

import os
import sys

import pytest
from prometheus_client import REGISTRY
from safetensors.torch import load_file, save_file
from support import model_runner

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}


@pytest.fixture(autouse=True)
def hide_llvmlite():
    """The next engine in this process looks into all modules, and fails at these.

    They are numba's, which the drafts use (vllm/triton_utils/dispatcher.py:139).
    """
    yield
    for name in [name for name in sys.modules if name.startswith("llvmlite")]:
        del sys.modules[name]


@pytest.fixture
def resized(family, save_model, tmp_path):
    """Deltas with five tokens more, which are likely, and twelve fewer; and merged."""
    base, deltas, merged = str(family("llama").base), [], []
    for tokens in (5, -12):
        model = save_model("llama", tmp_path / "model", seed=7, added_tokens=tokens)
        if tokens > 0:
            tensors = load_file(model / "model.safetensors")
            tensors["lm_head.weight"][-tokens:] *= 4
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        deltas.append(tmp_path / f"delta{tokens}")
        convert(base, str(model), deltas[-1], 0.125)
        for file in deltas[-1].glob("tokenizer*"):  # LLM has one tokenizer in a call
            file.unlink()
        merged.append(tmp_path / f"merged{tokens}")
        export(base, deltas[-1], merged[-1])
    return deltas, merged


IS_V1 = os.environ[model_runner.VARIABLE] == "0"
ASYNCHRONOUS = pytest.mark.skipif(
    IS_V1, reason="Model Runner V1 has no asynchronous n-gram drafts on a CPU"
)


@pytest.mark.v2
@pytest.mark.parametrize(
    "is_async", [False, pytest.param(True, marks=[ASYNCHRONOUS, pytest.mark.slow])]
)
def test_ngram_drafts_equal_each_model_alone(
    family,
    resized,
    engine,
    answers,
    reference,
    difference,
    load,
    prompts,
    asynchronous,
    is_async,
):
    """Rows that check drafts beside rows that do not, each of its own model."""

    made = family("llama")
    folders = [made.base, made.merged[0], made.merged[2], *resized[1]]
    expected = [reference(folder, prompts, max_tokens=24) for folder in folders]
    if is_async:
        asynchronous()
    options = {"delta_memory_gib": 0.001, "added_tokens": 5, "self_check": "always"}
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=2,
        speculative_config=NGRAM,
        additional_config={"dqrelo": options},
        disable_log_stats=False,
    )
    requests = [None] + [
        load(llm, f"delta-{i}", folder)
        for i, folder in enumerate([made.deltas[0], made.deltas[2], *resized[0]])
    ]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(requests))]
    asked = [prompts[p] for p, _ in order], [requests[m] for _, m in order]
    got = answers(llm, *asked, prompt_logprobs=1, max_tokens=24)
    for (p, m), answer in zip(order, got, strict=True):
        assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)
    # The test can fail: some drafts were taken and some were not, and added tokens
    # were written.
    counters = {metric.name: metric for metric in llm.get_metrics()}
    drafted, accepted = (
        counters[f"vllm:spec_decode_num_{kind}_tokens"].value
        for kind in ("draft", "accepted")
    )
    assert 0 < accepted < drafted
    assert max(token for tokens, _, _ in expected[-2] for token in tokens) >= 320


@pytest.mark.v2
def test_a_draft_model_drafts_for_base_and_deltas(
    family, alone, engine, answers, difference, load, prompts
):
    """The base drafts: its own drafts are right, those for a delta seldom."""
    made, expected = family("llama"), alone("llama")
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=2,
        additional_config={
            "dqrelo": {"delta_memory_gib": 0.001, "self_check": "always"}
        },
        speculative_config={
            "method": "draft_model",
            "model": str(made.base),
            "num_speculative_tokens": 3,
        },
        disable_log_stats=False,
    )
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    order = [(p, m) for p in range(len(prompts)) for m in range(len(requests))]
    asked = [prompts[p] for p, _ in order], [requests[m] for _, m in order]
    for (p, m), answer in zip(order, answers(llm, *asked), strict=True):
        assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)
    answers(llm, prompts[:1], [None])  # a step more, that reports the last one

    def tokens(kind, **labels):
        name = f"spec_decode_num_{kind}_tokens_total"
        labels |= {"engine": "0"}
        return REGISTRY.get_sample_value(f"dqrelo:{name}", labels) or 0

    names = [str(made.base), *(f"delta-{i}" for i in range(len(made.deltas)))]
    drafted, accepted = (
        {name: tokens(kind, model=name) for name in names}
        for kind in ("draft", "accepted")
    )
    # A draft that ends at max_tokens is cut short and counted whole.
    assert all(drafted.values())
    assert accepted[str(made.base)] >= 0.5 * drafted[str(made.base)]
    assert max(accepted[name] / drafted[name] for name in names[1:]) < 0.5
    totals = {metric.name: metric for metric in llm.get_metrics()}
    for kind, counted in (("draft", drafted), ("accepted", accepted)):
        total = totals[f"vllm:spec_decode_num_{kind}_tokens"].value
        assert total == sum(counted.values())
