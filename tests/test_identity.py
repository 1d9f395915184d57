# SPDX-License-Identifier: Apache-2.0
"""A name may mean another content tomorrow: who meets which weights."""

import shutil

import pytest

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4  # as in test_serving.py


def math(folder, number=7, **options):
    """As the API server names a delta: the path says nothing of the content."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("math", number, str(folder), **options)


def replace(folder, delta):
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(delta, folder)


def test_a_folder_is_replaced_while_requests_run(
    family,
    alone,
    engine,
    add_request,
    finish,
    tmp_path,
    prompts,
    manager_of,
    difference,
):
    """The old ones end on the old weights, the new ones meet no old prefix."""
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    folder = tmp_path / "math"
    replace(folder, made.deltas[0])
    llm.llm_engine.add_lora(math(folder))
    add_request(llm, "old", prompts[3], math(folder))
    for _ in range(3):
        llm.llm_engine.step()
    replace(folder, made.deltas[1])
    add_request(llm, "before", prompts[3], math(folder))  # not loaded again yet
    assert llm.llm_engine.add_lora(math(folder, load_inplace=True))
    again = math(folder, load_inplace=True)  # as vLLM names it from then on
    add_request(llm, "new", prompts[3], again)
    add_request(llm, "newer", prompts[3], again)
    llm.llm_engine.step()
    assert len(manager_of(llm).residency.resident) == 2
    found = finish(llm)
    for key, m in (("old", 1), ("before", 1), ("new", 2), ("newer", 2)):
        assert difference(found[key], expected[m][3]) <= TOLERANCE, key
    # The old one is freed with its last request.
    assert len(manager_of(llm).residency.resident) == 1
    assert len(manager_of(llm).host.packed) == 1
    add_request(llm, "again", prompts[3], again)
    assert difference(finish(llm)["again"], expected[2][3]) <= TOLERANCE


def test_a_delta_is_unloaded_while_requests_run(
    family,
    alone,
    engine,
    add_request,
    finish,
    tmp_path,
    prompts,
    manager_of,
    difference,
):
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=1)
    folder = tmp_path / "math"
    replace(folder, made.deltas[0])
    llm.llm_engine.add_lora(math(folder))
    add_request(llm, "runs", prompts[0], math(folder))
    llm.llm_engine.step()
    add_request(llm, "waits", prompts[1], math(folder))
    assert llm.llm_engine.remove_lora(7)
    assert not llm.llm_engine.remove_lora(7)
    assert llm.llm_engine.list_loras() == set()
    shutil.rmtree(folder)
    found = finish(llm)
    assert difference(found["runs"], expected[1][0]) <= TOLERANCE
    assert difference(found["waits"], expected[1][1]) <= TOLERANCE
    manager = manager_of(llm)
    assert not manager.residency.resident and not manager.host.packed
    assert not manager.residency.arena._extents
    with pytest.raises(Exception, match="math was unloaded"):
        add_request(llm, "late", prompts[0], math(folder))
    assert finish(llm) == {}


def test_two_names_of_one_content_share_it(
    family,
    alone,
    engine,
    add_request,
    finish,
    tmp_path,
    prompts,
    manager_of,
    difference,
):
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=1)
    shutil.copytree(made.deltas[0], tmp_path / "copy")
    one, two = math(made.deltas[0], 7), math(tmp_path / "copy", 8)
    two.lora_name = "other"
    for name in (one, two):
        llm.llm_engine.add_lora(name)
        add_request(llm, name.lora_name, prompts[0], name)
    llm.llm_engine.step()
    core = llm.llm_engine.engine_core.engine_core
    assert len(core.scheduler.running) == 2  # though one step has one delta
    manager = manager_of(llm)
    assert len(manager.host.packed) == len(manager.residency.resident) == 1
    assert llm.llm_engine.remove_lora(7)
    for answer in finish(llm).values():
        assert difference(answer, expected[1][0]) <= TOLERANCE
    assert len(manager.residency.resident) == 1  # it has a name still
    add_request(llm, "left", prompts[1], two)
    assert difference(finish(llm)["left"], expected[1][1]) <= TOLERANCE


def test_requests_in_another_stage_count_for_max_loras(
    family, alone, engine, load, add_request, finish, difference, prompts
):
    """They join a later step of a pipeline, where vLLM 0.32 only asserts."""
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    models = {d.name: load(llm, d.name, d) for d in made.deltas}
    *others, last = models
    core = llm.llm_engine.engine_core.engine_core
    for name in others:
        add_request(llm, name, prompts[0], models[name])
    in_flight = core.scheduler.schedule()
    assert len(in_flight.num_scheduled_tokens) == len(others) == 2
    add_request(llm, last, prompts[0], models[last])
    assert not core.scheduler.schedule().num_scheduled_tokens
    core.model_executor.execute_model(in_flight)
    output = core.model_executor.sample_tokens(None)
    core.scheduler.update_from_output(in_flight, output)
    assert difference(finish(llm)[last], expected[3][0]) <= TOLERANCE


def test_the_worker_refuses_rows_of_a_delta_that_it_was_not_given(
    family, engine, load, manager_of
):
    from vllm.lora.layers import LoRAMapping

    made = family("llama")
    llm = engine(made.base, quantization="dqrelo")
    load(llm, "math", made.deltas[0])
    mapping = LoRAMapping((0, 3), (0, 3), is_prefill=True)
    with pytest.raises(RuntimeError, match="rows of a delta that is not among"):
        manager_of(llm).set_active_adapters(set(), mapping)
