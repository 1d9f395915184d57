# SPDX-License-Identifier: Apache-2.0
"""What /metrics says of deltas, against what was done; its table and its dashboard."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

from prometheus_client import REGISTRY  # noqa: E402

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def metrics():
    """Metrics of an engine that does not run."""
    from vllm_dqrelo.frontend.metrics import DeltaMetrics

    return DeltaMetrics(None, [0])


def report(metrics, **values):
    """Let an engine report."""
    from vllm.v1.metrics.stats import SchedulerStats

    from vllm_dqrelo.messages.report import Report

    stats = SchedulerStats()
    Report(**values).attach(stats)
    metrics.record(stats, None)
    assert stats.kv_connector_stats is None


def value(name, **labels):
    """A sample of the registry, or 0 as long as it is not there."""
    found = REGISTRY.get_sample_value(f"dqrelo:{name}", {"engine": "0", **labels})
    return found or 0


def names():
    """Every metric of ours in the registry, without the suffix of its kind."""
    found = {family.name for family in REGISTRY.collect()}
    return {name for name in found if name.startswith("dqrelo:")}


def test_an_engine_s_metrics_are_what_it_did(
    family, engine, load, answers, prompts, manager_of
):
    """Three deltas on room for two: every number is known beforehand or in memory."""
    made = family("llama")
    llm = engine(made.base, quantization="dqrelo")
    for i, folder in enumerate(made.deltas):
        load(llm, f"delta-{i}", folder)
    sizes = llm.llm_engine.engine_core.engine_core.scheduler.deltas.sizes
    room = sorted(sizes.values())[-2:]
    del llm
    options = {"delta_memory_gib": sum(room) / 2**30 + 1e-6, "host_memory_gib": 0}
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=2,
        disable_log_stats=False,
        additional_config={"dqrelo": options},
    )
    manager = manager_of(llm)
    reads, steps = spies(manager)
    requests = [load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)]
    answers(llm, prompts, [None, requests[0], requests[1], requests[0]])
    assert value("num_deltas_registered") == 3
    assert value("num_deltas_resident") == len(manager.residency.resident) == 2
    assert value("delta_bytes", tier="device") == manager.usage().device > 0
    assert value("delta_bytes_limit", tier="device") == manager.memory.arena
    assert value("delta_evictions_total", tier="device") == 0
    answers(llm, prompts[:1], [requests[2]])
    answers(llm, prompts[:1], [None])  # a step more, that reports the last one
    assert value("delta_evictions_total", tier="device") >= 1
    assert value("delta_evictions_total", tier="host") >= 1  # there is no room at all
    assert 1 <= value("cold_wait_seconds_count") <= 4
    assert value("cold_wait_seconds_sum") > 0
    assert value("delta_loads_total", outcome="ok") == len(reads) >= 4
    assert value("delta_load_seconds_count") == len(reads)
    assert value("delta_loads_total", outcome="failed") == 0

    lengths = [len(prompt) for prompt in prompts]
    expected = {
        str(made.base): lengths[0] * 2,
        "delta-0": lengths[1] + lengths[3],
        "delta-1": lengths[2],
        "delta-2": lengths[0],
    }
    ended = {"finished_reason": "length"}
    for model, tokens in expected.items():
        count = 1 + (model in (str(made.base), "delta-0"))
        assert value("requests_total", model=model, **ended) == count
        assert value("prompt_tokens_total", model=model) == tokens
        assert value("generation_tokens_total", model=model) == 8 * count
    # The last of a request's tokens is sampled, but not computed with.
    rows = sum(expected[f"delta-{i}"] for i in range(3)) + 7 * 4
    assert value("iteration_delta_rows_sum") == rows
    assert value("iteration_delta_rows_count") == len(steps)
    assert value("iteration_deltas_count") == len(steps)
    assert value("iteration_deltas_sum") == sum(steps)


def spies(manager):
    """Lists that grow: the deltas that are read, the number of deltas of each step."""
    reads, steps = [], []
    read, set_rows = manager.loader._read, manager.set_rows

    def counted(requests, *rows):
        """The model runner calls it in each step, with the deltas of the step."""
        steps.append(len(requests))
        set_rows(requests, *rows)

    manager.loader._read = lambda *given: reads.append(given) or read(*given)
    manager.set_rows = counted
    return reads, steps


def test_a_report_that_nobody_reads_is_dropped(family, engine, monkeypatch):
    """With --disable-log-stats, which is the default of ``LLM``."""
    from vllm_dqrelo.engine import scheduler

    monkeypatch.setattr(scheduler, "UNREAD", 5)
    llm = engine(family("llama").base, quantization="dqrelo")
    llm.generate([{"prompt_token_ids": [1]}], use_tqdm=False)  # 16 tokens
    deltas = llm.llm_engine.engine_core.engine_core.scheduler.deltas
    assert len(deltas.report.steps) == 16 % 5


def test_a_delta_that_cannot_be_read_is_counted(family, engine, load, tmp_path):
    llm = engine(family("llama").base, quantization="dqrelo", disable_log_stats=False)
    with pytest.raises(Exception, match="belongs to another base"):
        load(llm, "foreign", family("llama-tied").deltas[0])
    llm.generate([{"prompt_token_ids": [1]}], use_tqdm=False)
    assert value("delta_loads_total", outcome="failed") == 1
    assert value("delta_loads_total", outcome="ok") == 0


def test_a_name_that_goes_is_reported_while_another_keeps_the_delta(
    family, engine, load
):
    """By an engine that has nothing else to do: it takes one step for the report."""
    made = family("llama")
    llm = engine(made.base, quantization="dqrelo")
    one, _ = (load(llm, name, made.deltas[0]) for name in ("one", "two"))
    llm.generate([{"prompt_token_ids": [1]}], use_tqdm=False)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    while scheduler.has_requests():
        llm.llm_engine.step()
    llm.llm_engine.remove_lora(one.lora_int_id)
    assert scheduler.has_requests()
    assert scheduler.deltas.take_report().registered == 1


def test_the_number_of_labels_is_bounded(metrics, monkeypatch):
    from vllm_dqrelo.frontend import metrics as module

    monkeypatch.setattr(module, "MODELS", 3)
    for name in ("a", "b", "c", "d", "a"):
        report(metrics, finished=[(name, "stop", 1, 2)])
    found = {name: value("prompt_tokens_total", model=name) for name in "abcd"}
    assert found == {"a": 2, "b": 1, "c": 0, "d": 0}
    assert value("prompt_tokens_total", model="other") == 2


def test_a_kv_connector_gets_its_own_statistics():
    from vllm.v1.metrics.stats import SchedulerStats

    from vllm_dqrelo.messages.report import Report

    own = {"bytes": 3}
    stats = SchedulerStats(kv_connector_stats=own)
    Report(resident=2).attach(stats)
    assert own == {"bytes": 3}
    assert Report.detach(stats) == Report(resident=2)
    assert stats.kv_connector_stats == {"bytes": 3}
    assert Report.detach(stats) is None and Report.detach(None) is None


def test_the_log_says_what_to_do(metrics, monkeypatch):
    from vllm_dqrelo.frontend import metrics as module

    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            module.logger, level, lambda text, *values: said.append(text % values)
        )
    report(metrics, registered=5, resident=2, steps=[(3, 1)])
    metrics.log()
    assert not said  # nothing was loaded
    report(metrics, registered=5, resident=2, loads=[0.5], cold_waits=[2.0, 3.0])
    metrics.log()
    assert len(said) == 1 and "1 read, 0 failed" in said[0]
    assert said[0].endswith("2 requests waited, at most 3.0 s")
    metrics.log()
    assert len(said) == 1
    limits = {"device_limit": 2**30, "host_limit": 2**31}
    report(metrics, registered=5, resident=2, evicted=3, dropped=1, **limits)
    report(metrics, registered=5, resident=2, cold_waits=[1.0], **limits)
    metrics.log()
    assert said[2].endswith("Raise delta_memory_gib, now 1")
    assert said[3].endswith("Raise host_memory_gib, now 2")


def test_the_table_and_the_dashboard_name_every_metric(metrics):
    registered = names()
    assert len(registered) > 10
    table = re.findall(
        r"^\| `(dqrelo:\w+)`", (DOCS / "operations.md").read_text(), re.M
    )
    assert len(table) == len(set(table)) and set(table) == registered
    samples = {s.name for f in REGISTRY.collect() for s in f.samples}
    samples |= {f"{name}_total" for name in registered}
    shown = set()
    for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]:
        for target in panel["targets"]:
            found = re.findall(r"dqrelo:\w+", target["expr"])
            assert found, panel["title"]
            shown |= set(found)
    suffix = re.compile("_(total|bucket|sum|count)$")
    assert {suffix.sub("", name) for name in shown} == registered
    kinds = {family.name: family.type for family in REGISTRY.collect()}
    endings = {"counter": {"_total"}, "gauge": {""}}
    for name in shown:
        stem = suffix.sub("", name)
        expected = endings.get(kinds[stem], {"_bucket", "_sum", "_count"})
        assert name.removeprefix(stem) in expected, name
