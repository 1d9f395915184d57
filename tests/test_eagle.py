# SPDX-License-Identifier: Apache-2.0
"""EAGLE heads draft for deltas as for the base, with the layers of the base."""

import os

import pytest
import torch
from prometheus_client import REGISTRY
from support import model_runner
from support.eagle import Head
from support.shapes import GROUPED, UNTIED
from transformers import AutoModelForCausalLM, LlamaConfig

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.worker.compat import drafter_of

vllm = pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
TOKENS = 210  # of the smallest model
IS_V1 = os.environ[model_runner.VARIABLE] == "0"


@pytest.fixture
def near(tmp_path):
    """``near(base)``: a delta near the base, and the same merged.

    The model lacks tokens that the base often answers with.
    """

    def make(base):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(TOKENS, mean_resizing=False)
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.data.add_(0.002 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "near")
        convert(str(base), str(tmp_path / "near"), tmp_path / "delta", 0.125)
        export(str(base), tmp_path / "delta", tmp_path / "merged")
        return tmp_path / "delta", tmp_path / "merged"

    return make


@pytest.fixture
def served(engine, load, tmp_path):
    """``served(base, deltas, head, method, count, **options)``: engine and requests."""

    def start(base, deltas, head, method, count, **options):
        llm = engine(
            base,
            quantization="dqrelo",
            max_loras=2,
            additional_config={
                "dqrelo": {"delta_memory_gib": 0.001, "self_check": "always"}
            },
            speculative_config={
                "method": method,
                "model": str(head.save(tmp_path / "head")),
                "num_speculative_tokens": count,
            },
            disable_log_stats=False,
            **options,
        )
        names = [f"delta-{i}" for i in range(len(deltas))]
        return llm, [None, *map(load, [llm] * len(deltas), names, deltas)]

    return start


@pytest.fixture
def check(answers, reference, difference, prompts):
    """``check(llm, requests, folders)``: each model's answers are its folder's.

    Returns:
        Prompt, model and expected answer of each request; drafted and accepted tokens
        of each model.
    """

    def counted(kind, model):
        name = f"dqrelo:spec_decode_num_{kind}_tokens_total"
        return REGISTRY.get_sample_value(name, {"model": model, "engine": "0"}) or 0

    def check(llm, requests, folders):
        known = [prompt for prompt in prompts if max(prompt) < TOKENS]
        expected = [reference(folder, known, max_tokens=24) for folder in folders]
        asked = [
            (prompt, m, expected[m][p])
            for p, prompt in enumerate(known)
            for m in range(len(folders))
        ]
        given = [prompt for prompt, _, _ in asked], [requests[m] for _, m, _ in asked]
        for prompt_logprobs in (1, None):  # the second time from the prefix cache
            got = answers(llm, *given, prompt_logprobs, max_tokens=24)
            for (prompt, m, answer), own in zip(asked, got, strict=True):
                assert difference(own, answer) <= TOLERANCE, (prompt, m)
        answers(llm, known[:1], [None])  # a step more, that reports the last one
        names = [str(folders[0])] + [request.lora_name for request in requests[1:]]
        counts = [[counted(x, name) for name in names] for x in ("draft", "accepted")]
        return asked, *counts

    return check


@pytest.fixture
def drafted(monkeypatch):
    """``drafted(llm)``: request -> tokens -> the drafts after these, as they are made.

    V2 keeps drafts on the device, and tells the scheduler only whose they are.
    """

    def watch(llm):
        core = llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        scheduler, drafter = core.scheduler, drafter_of(runner)
        propose, update = drafter.propose, scheduler.update_draft_token_ids
        found, last = {}, []

        def proposing(*args, **kwargs):
            last[:] = (drafts := propose(*args, **kwargs)).tolist()
            return drafts

        def noting(drafts):
            for key, tokens in zip(drafts.req_ids, last, strict=True):
                if request := scheduler.requests.get(key):
                    known = tuple(request.all_token_ids)
                    found.setdefault(key, {})[known] = tokens
            update(drafts)

        monkeypatch.setattr(drafter, "propose", proposing)
        monkeypatch.setattr(scheduler, "update_draft_token_ids", noting)
        return found

    return watch


@pytest.mark.parametrize(
    ("method", "kind", "count", "enforce_eager"),
    [
        ("eagle", "llama", 1, True),
        pytest.param("eagle", "llama-tied", 3, True, marks=pytest.mark.v2),
        pytest.param("eagle3", "llama", 2, True, marks=pytest.mark.v2),
        ("eagle", "llama", 2, False),
    ],
)
def test_a_head_drafts_for_base_and_deltas(
    family, near, served, check, drafted, method, kind, count, enforce_eager
):
    """Answers equal those without drafts, and drafts those of a plain loop."""
    made = family(kind)
    delta, merged = near(made.base)
    folders = [made.base, *made.merged[:2], merged]
    head, deltas = Head(method, made.base), [*made.deltas[:2], delta]
    llm, requests = served(
        made.base, deltas, head, method, count, enforce_eager=enforce_eager
    )
    found = drafted(llm)
    asked, drafts, accepted = check(llm, requests, folders)
    assert all(drafts)
    assert accepted[0] >= drafts[0] / 3 and accepted[-1]
    absent = 0  # drafts of tokens that the last model lacks
    for key, made in found.items():
        number = int(key.partition("-")[0])
        prompt, m, (answer, _, _) = asked[number % len(asked)]
        tokens = [*prompt, *answer]
        states = head.states(folders[m], tokens)
        for known, one in made.items():
            assert list(known) == tokens[: len(known)], (prompt, m)
            assert one == head.drafts(known, states, count), (prompt, m, known)
            absent += m == len(deltas) and max(one) >= TOKENS
    assert len(found) > 2 * len(asked) and absent


@pytest.mark.v2
@pytest.mark.skipif(IS_V1, reason="on a CPU V1 takes no drafts asynchronously")
def test_asynchronously(family, near, served, check, asynchronous):
    """As on a GPU: a step is scheduled before the drafts of the last one are known."""
    base = family("llama").base
    delta, merged = near(base)
    asynchronous()
    llm, requests = served(base, [delta], Head("eagle", base), "eagle", 2)
    _, drafts, accepted = check(llm, requests, [base, merged])
    assert accepted[0] >= drafts[0] / 3 and accepted[-1]


def test_workers_share_the_head(near, save_model, served, check, monkeypatch, tmp_path):
    """Two workers, each with half of the tokens and of the heads of attention."""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**GROUPED | shape, **UNTIED)
    base = save_model(config, tmp_path / "base", 1)
    delta, merged = near(base)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm, requests = served(
        base, [delta], Head("eagle3", base), "eagle3", 2, tensor_parallel_size=2
    )
    _, drafts, accepted = check(llm, requests, [base, merged])
    assert accepted[0] >= drafts[0] / 3 and accepted[-1]
