# SPDX-License-Identifier: Apache-2.0
"""Several workers, each with some layers of the base and of every delta."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from support.engines import free

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.format.delta import Delta, write_delta

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4


# A tied LM head is in another stage than the embedding that it is, and vLLM's Mixtral
# has a last norm in both stages.
@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param("llama-tied", marks=pytest.mark.v2), "mixtral"]
)
def test_two_stages_equal_each_model_alone(
    kind,
    family,
    alone,
    engine,
    answers,
    difference,
    load,
    prompts,
    tmp_path,
    monkeypatch,
):
    made, expected = family(kind), alone(kind)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = engine(
        made.base,
        quantization="dqrelo",
        max_loras=2,
        pipeline_parallel_size=2,
        enforce_eager=True,
    )
    requests = [None] + [load(llm, d.name, d) for d in made.deltas[:2]]
    order = [(p, m) for p in range(len(prompts)) for m in range(3)]
    got = answers(
        llm, [prompts[p] for p, _ in order], [requests[m] for _, m in order], 1
    )
    for (p, m), answer in zip(order, got, strict=True):
        assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)

    # What no stage has is refused: a layer, and a part of one in either stage.
    base = load_file(made.base / "model.safetensors")
    for i, name in enumerate(("layers.9", "layers.0.more", "layers.1.more")):
        folder = tmp_path / str(i)
        folder.mkdir()
        vector = base["model.norm.weight"]
        tensors = {f"model.{name}.weight": vector + 1, "model.norm.weight": vector}
        write_delta(folder, Delta(made.deltas[0]).config, tensors)
        with pytest.raises(
            Exception, match=rf"{name}.weight is not a parameter of the model"
        ):
            load(llm, name, folder)


@pytest.mark.slow
def test_a_tied_head_that_is_stored_as_well(
    family,
    alone,
    engine,
    answers,
    difference,
    load,
    prompts,
    save_model,
    tmp_path,
    monkeypatch,
):
    """vLLM gives the last stage a matrix of its own, to which a delta belongs, too."""
    made, expected = family("llama-tied"), alone("llama-tied")[:2]
    model = save_model("llama", tmp_path / "model", seed=7)
    convert(str(made.base), str(model), tmp_path / "delta", 0.125)
    export(str(made.base), tmp_path / "delta", tmp_path / "merged")
    llm = engine(tmp_path / "merged")
    expected.append(answers(llm, prompts, prompt_logprobs=1))
    del llm
    free()
    base = shutil.copytree(made.base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|0")
    llm = engine(base, quantization="dqrelo", pipeline_parallel_size=2)
    requests = [None, load(llm, "tied", made.deltas[0])]
    requests.append(load(llm, "untied", tmp_path / "delta"))
    for request, known in zip(requests, expected, strict=True):
        got = answers(llm, prompts, [request] * len(prompts), 1)
        for answer, one in zip(got, known, strict=True):
            assert difference(answer, one) <= TOLERANCE


def test_each_parameter_is_in_some_stage():
    from vllm_dqrelo.messages.load import Loaded, agreed

    first = Loaded("sha256:1", 5, elsewhere=frozenset({"layer.2", "none"}))
    second = Loaded("sha256:1", 7, elsewhere=frozenset({"layer.1"}))
    assert agreed([first, second], "folder") == first._replace(size=7)
    third = second._replace(elsewhere=frozenset({"layer.1", "none"}))
    error = (
        "folder does not fit the served model:\n  none is not a parameter of the model"
    )
    assert agreed([first, third], "folder").error == error
