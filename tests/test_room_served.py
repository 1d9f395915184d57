# SPDX-License-Identifier: Apache-2.0
"""Deltas that need more room than the default, served in an engine that has it."""

import dataclasses

import pytest
from support.engines import reference
from support.shapes import SHAPE, UNTIED
from support.wide import DEFAULT, TOLERANCE, made_room, suggested
from transformers import LlamaConfig

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.format.need import Need

vllm = pytest.importorskip("vllm")


@pytest.mark.vllm
def test_all_of_them_are_served_with_what_is_computed(
    wide, engine, load, answers, difference, prompts
):
    """One batch of the base and every kind, each equal to its exported checkpoint."""
    base, made = wide
    options = made_room(base, [(kind, folder) for kind, (folder, _) in made.items()])
    assert options["max_rank"] > DEFAULT and options["delta_memory_gib"]
    config = {"dqrelo": options}
    llm = engine(base, quantization="dqrelo", additional_config=config)
    requests = [load(llm, kind, folder) for kind, (folder, _) in made.items()]
    for first in range(0, len(requests), 3):
        some = requests[first : first + 3]
        got = answers(llm, prompts * len(some), [r for r in some for _ in prompts])
        for i, request in enumerate(some):
            expected = reference(made[request.lora_name][1], prompts)
            for p in range(len(prompts)):
                answer = got[i * len(prompts) + p]
                name = request.lora_name
                assert difference(answer, expected[p]) <= TOLERANCE, (name, p)


@pytest.mark.vllm
def test_a_server_that_is_started_again_as_the_error_says(
    wide, family, engine, load, answers, difference, prompts, monkeypatch
):
    """Rank, memory beside another delta and added tokens, all in one error."""
    from vllm_dqrelo.worker import manager

    base, made = wide
    delta, merged = made["added"]
    size = Need.of(family("llama").deltas[0]).size
    own = {"delta_memory_gib": 2 * size / 2**30, "host_memory_gib": 0.5}
    start = {"quantization": "dqrelo", "max_loras": 2}
    llm = engine(base, **start, additional_config={"dqrelo": own})
    load(llm, "other", family("llama").deltas[0])
    with monkeypatch.context() as patched:  # before a tensor is read
        patched.setattr(manager, "Delta", None)
        with pytest.raises(Exception, match="does not fit this server") as caught:
            load(llm, "wide", delta)
    said = str(caught.value)
    with monkeypatch.context() as patched:  # as if it were replaced meanwhile
        nothing = {"ranks": {}, "size": 0, "added_tokens": 0}
        nothing = dataclasses.replace(Need.of(delta), **nothing)
        patched.setattr(manager.Need, "of", lambda folder: nothing)
        with pytest.raises(Exception, match="does not fit this server") as caught:
            load(llm, "wide", delta)
    assert str(caught.value) == said
    need = Need.of(delta)
    assert f"rank {need.rank()} in one layer, and there is room for {DEFAULT}" in said
    assert "5 tokens added to the vocabulary, and there is room for 0" in said
    assert f"{need.size:,} bytes: the 2 largest deltas take" in said
    assert [output[0] for output in answers(llm, prompts)]  # it goes on
    del llm
    options = suggested(said)
    assert options["host_memory_gib"] == 0.5
    llm = engine(base, **start, additional_config={"dqrelo": options})
    other = load(llm, "other", family("llama").deltas[0])
    wide_one = load(llm, "wide", delta)
    got = answers(llm, prompts * 2, [wide_one] * 4 + [other] * 4)
    for answer, expected in zip(got, reference(merged, prompts), strict=False):
        assert difference(answer, expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.vllm
def test_a_worker_of_several_needs_a_part_of_it(
    save_model, tmp_path, engine, load, answers, difference, prompts, monkeypatch
):
    """Less than the whole delta, whose ranks are in each of them."""
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**SHAPE | sizes | UNTIED)
    base = save_model(config, tmp_path / "base", 1)
    model, delta = save_model(config, tmp_path / "model", 2), tmp_path / "delta"
    convert(str(base), str(model), delta, 0.5)
    export(str(base), delta, tmp_path / "merged")
    need = Need.of(delta)
    for file in delta.glob("tokenizer*"):
        file.unlink()
    options = {"max_rank": need.rank(), "delta_memory_gib": 0.8 * need.size / 2**30}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    llm = engine(
        base,
        quantization="dqrelo",
        tensor_parallel_size=2,
        fully_sharded_loras=True,
        additional_config={"dqrelo": options},
    )
    expected = reference(tmp_path / "merged", prompts)
    got = answers(llm, prompts, [load(llm, "a", delta)] * len(prompts))
    for answer, wanted in zip(got, expected, strict=True):
        assert difference(answer, wanted) <= TOLERANCE
