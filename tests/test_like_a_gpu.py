# SPDX-License-Identifier: Apache-2.0
"""What serving does on a GPU only, here: merged matrices, and the Triton kernels."""

import os

import pytest

from dqrelo_kernels.ops import whole_bytes

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4


def test_prompts_through_merged_matrices(
    merges, family, alone, engine, answers, difference, load, prompts
):
    """Steps with prompts of several deltas beside single tokens of others."""
    made, expected = family("qwen2"), alone("qwen2")
    llm = engine(made.base, quantization="dqrelo", max_loras=3)
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    assert not merges
    order = [(p, m) for p in range(len(prompts)) for m in range(len(requests))]
    for prompt_logprobs in (None, 1):
        got = answers(
            llm,
            [prompts[p] for p, _ in order],
            [requests[m] for _, m in order],
            prompt_logprobs,
        )
        for (p, m), answer in zip(order, got, strict=True):
            assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)
    assert len({slot for *_, slot in merges}) == 3
    # One buffer, of the largest matrix and its bias, whatever the step.
    step = _worker(llm).model_runner.lora_manager.step
    assert {made.data_ptr() for made, *_ in merges} == {step.whole.data_ptr()}
    largest = max((weight for _, _, weight, *_ in merges), key=lambda w: w.nbytes)
    assert len(step.whole) == whole_bytes(largest)


def test_a_model_with_a_layer_that_cannot_be_merged(
    merges, family, alone, engine, answers, difference, load, prompts, monkeypatch
):
    """As of a quantised base: its layers see the rows that others would merge."""
    from vllm_dqrelo.worker import compat

    made, expected = family("llama"), alone("llama")
    plain, seen = compat.multiplies_by_weight, []
    monkeypatch.setattr(
        compat,
        "multiplies_by_weight",
        lambda method: plain(method) and seen.append(method) is None and len(seen) < 3,
    )
    llm = engine(made.base, quantization="dqrelo", max_loras=3)
    requests = [load(llm, f"delta-{i}", d) for i, d in enumerate(made.deltas)]
    for m, got in enumerate(answers(llm, prompts[:1] * len(requests), requests), 1):
        assert difference(got, expected[m][0]) <= TOLERANCE, m
    assert not merges
    assert not len(_worker(llm).model_runner.lora_manager.step.whole)


def _worker(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_the_kernels_of_a_gpu(
    like_a_gpu, merges, family, alone, engine, answers, difference, load, prompts, kind
):
    """All of a request's way but the device: fine-tune, folder, arena, launchers."""
    made, expected = family(kind), alone(kind)
    llm = engine(made.base, quantization="dqrelo", max_loras=3)
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    order = [(0, 0), (0, 1), (1, 2), (1, 3)]
    asked = [prompts[p] for p, _ in order], [requests[m] for _, m in order]
    # Prompts, and a token of each request: the interpreter takes seconds for a step.
    for (p, m), got in zip(order, answers(llm, *asked, max_tokens=2), strict=True):
        tokens, logprobs, _ = expected[m][p]
        assert difference(got, (tokens[:2], logprobs[:2])) <= TOLERANCE, (p, m)
    assert len({slot for *_, slot in merges}) == 3


@pytest.fixture
def graphs(like_a_gpu, merges, engine, family, load, monkeypatch):
    """``graphs(kind, **options)``: an engine whose small steps replay graphs."""
    from vllm_dqrelo.worker import limits

    # Steps of up to 8 tokens replay a graph; what has 9 rows or more is merged.
    monkeypatch.setattr(limits, "MERGE_ROWS", 9)

    def make(kind, **options):
        from support.graphs import Graphs

        made = family(kind)
        llm = engine(made.base, quantization="dqrelo", max_loras=3)
        graphs = Graphs(_worker(llm).model_runner, (4, 8), **options)
        graphs.install(monkeypatch)
        requests = [load(llm, d.name, d) for d in made.deltas]
        return llm, graphs, [None, *requests]

    return make


V2_ONLY = pytest.mark.skipif(
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0",
    reason="graphs are those of Model Runner V2: make test-v2",
)


@pytest.mark.slow
@V2_ONLY
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_graphs_are_replayed_for_other_rows_and_deltas(
    graphs, merges, alone, answers, difference, prompts, kind
):
    llm, captured, requests = graphs(kind)
    assert captured.cases == [0, 4]
    for (_, case), graph in captured.graphs.items():
        assert not graph.reads  # nothing waits for the device
        assert bool(graph.triton) == bool(case)  # steps of the base launch nothing
    # Prompts of 8 and 5 tokens, a merged one of 42; one token of up to five requests.
    mixed = [(0, 0), (0, 1), (1, 2), (1, 3), (3, 2)]
    for chosen in (mixed, [(0, 2), (1, 1), (1, 0)], [(0, 0)]):
        asked = [prompts[p] for p, _ in chosen], [requests[m] for _, m in chosen]
        for (p, m), got in zip(chosen, answers(llm, *asked, max_tokens=4), strict=True):
            tokens, logprobs, _ = alone(kind)[m][p]
            assert difference(got, (tokens[:4], logprobs[:4])) <= TOLERANCE, (p, m)
    assert set(captured.graphs) <= set(captured.used), captured.used
    assert merges


@pytest.mark.slow
@V2_ONLY
def test_a_graph_that_was_captured_without_deltas_is_seen(
    graphs, alone, answers, difference, prompts
):
    """The control of the test above: such a graph answers as the base."""
    llm, _, requests = graphs("llama", dummies={4: 0})
    (got,) = answers(llm, prompts[:1], [requests[1]], max_tokens=4)
    tokens, logprobs, _ = alone("llama")[1][0]
    assert not difference(got, (tokens[:4], logprobs[:4])) <= TOLERANCE
