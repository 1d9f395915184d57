# SPDX-License-Identifier: Apache-2.0
"""Mixed batches in one engine against each merged checkpoint run alone, in fp32."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import free
from torch.utils._python_dispatch import TorchDispatchMode

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
KINDS = ["llama-tied", pytest.param("llama", marks=pytest.mark.v2), "qwen2", "qwen3"]


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_batch_equals_each_model_alone(
    family, alone, kind, engine, answers, difference, load, prompts
):
    made = family(kind)
    expected = alone(kind)
    # The test can fail: the models differ by far more than the tolerance.
    for i, one in enumerate(expected):
        for other in expected[:i]:
            assert min(map(difference, one, other)) > 10 * TOLERANCE

    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    # Every prompt to the base and to three deltas over two slots, interleaved; then
    # again, with prompt logprobs (which bypass the prefix cache), then again from it.
    order = [(p, m) for p in range(len(prompts)) for m in range(len(requests))]
    for prompt_logprobs in (None, 1, None):
        got = answers(
            llm,
            [prompts[p] for p, _ in order],
            [requests[m] for _, m in order],
            prompt_logprobs,
        )
        for (p, m), answer in zip(order, got, strict=True):
            assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)
            assert bool(answer[2]) == (prompt_logprobs is not None)


class Calls(TorchDispatchMode):
    """Counts the calls of this project's operators."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "dqrelo"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kind", "eager"),
    [
        ("llama-tied", True),
        pytest.param("llama-tied", False, marks=pytest.mark.v2),
        pytest.param("mixtral", False, marks=[pytest.mark.v2, pytest.mark.slow]),
    ],
)
def test_steps_with_and_without_deltas(
    family, alone, engine, answers, difference, load, prompts, eager, kind
):
    """Compiled, which is vLLM's default, there are two codes; the base's is its own."""
    made, expected = family(kind), alone(kind)
    options = {"quantization": "dqrelo", "max_loras": 2, "enforce_eager": eager}
    llm = engine(made.base, **options)
    mode = llm.llm_engine.vllm_config.compilation_config.mode
    assert (mode == vllm.config.CompilationMode.NONE) == eager
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    mixed = [(p, m) for p in range(len(prompts)) for m in range(len(requests))]
    base = [(p, 0) for p in range(len(prompts))]
    for chosen in (mixed, base, mixed[::-1], base):
        asked = [prompts[p] for p, _ in chosen], [requests[m] for _, m in chosen]
        with Calls() as calls:
            found = answers(llm, *asked)
        assert bool(calls.count) == (chosen != base)
        for (p, m), answer in zip(chosen, found, strict=True):
            assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m)


@pytest.mark.v2
@pytest.mark.parametrize("is_async", [False, True])
def test_requests_that_arrive_one_after_another(
    family, alone, engine, load, prompts, asynchronous, is_async
):
    """Continuous batching: each step has other rows, prefill beside decode."""
    if is_async:
        asynchronous()
    made = family("llama")
    expected = alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=3)
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    core = llm.llm_engine.engine_core.engine_core
    assert (core.batch_queue is not None) == is_async
    sampling = vllm.SamplingParams(
        max_tokens=8, temperature=0, logprobs=1, detokenize=False
    )
    pending = [(p, m) for m in range(4) for p in range(4)]
    finished = {}
    while pending or llm.llm_engine.has_unfinished_requests():
        if pending:
            p, m = pending.pop()
            llm.llm_engine.add_request(
                f"{p} {m}",
                {"prompt_token_ids": prompts[p]},
                sampling,
                lora_request=requests[m],
            )
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id.split("-")[0]] = output
    assert len(finished) == 16
    for key, output in finished.items():
        p, m = map(int, key.split())
        assert list(output.outputs[0].token_ids) == expected[m][p][0]


@pytest.mark.v2
def test_memory_is_compacted_when_sizes_do_not_fit(
    family, alone, engine, answers, difference, load, manager_of, prompts
):
    """Three deltas of different sizes in an arena that just has room for two."""
    made = family("llama")
    expected = alone("llama")
    sizes = [_packed_size(made, i) for i in range(3)]
    room = sum(sorted(sizes)[1:]) / 2**30 + 1e-6
    options = {"dqrelo": {"delta_memory_gib": room}}
    llm = engine(
        made.base, quantization="dqrelo", max_loras=2, additional_config=options
    )
    requests = [None] + [
        load(llm, f"delta-{i}", folder) for i, folder in enumerate(made.deltas)
    ]
    for pair in [(1, 2), (3, 1), (2, 3), (3, 2), (1, 3), (2, 1), (1, 2)]:
        got = answers(llm, [prompts[0]] * 2, [requests[m] for m in pair])
        for m, answer in zip(pair, got, strict=True):
            assert difference(answer, expected[m][0]) <= TOLERANCE
    assert len(manager_of(llm).residency.resident) == 2


def _packed_size(made, index):
    """Bytes of a delta in the arena: its tensors, vectors in fp32, aligned to 64."""
    total = 0
    for name, tensor in load_file(
        made.deltas[index] / "delta_model.safetensors"
    ).items():
        if not name.endswith("_shape"):
            total += -(-tensor.nbytes // 64) * 64
    return total


def test_a_delta_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    family, alone, tmp_path, engine, answers, difference, load, manager_of, prompts
):
    from vllm_dqrelo.format.delta import Delta, write_delta

    made = family("llama")
    expected = alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    good = load(llm, "good", made.deltas[0])

    unknown = tmp_path / "unknown"
    shutil.copytree(made.deltas[1], unknown)
    tensors = load_file(unknown / "delta_model.safetensors")
    tensors["model.layers.9.input_layernorm.weight"] = torch.ones(96)
    write_delta(unknown, Delta(made.deltas[1]).config, tensors)

    shape = tmp_path / "shape"
    shutil.copytree(made.deltas[1], shape)
    tensors = load_file(shape / "delta_model.safetensors")
    tensors["model.norm.weight"] = torch.ones(97)
    write_delta(shape, Delta(made.deltas[1]).config, tensors)

    matrix = tmp_path / "matrix"
    shutil.copytree(made.deltas[1], matrix)
    tensors = {"lm_head.weight": torch.ones(320, 96)}
    write_delta(matrix, Delta(made.deltas[1]).config, tensors)

    flipped = tmp_path / "flipped"
    shutil.copytree(made.deltas[1], flipped)
    path = flipped / "delta_model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight_packed"][0, 3, 2] ^= 1
    save_file(tensors, path)

    other_base = family("llama-tied").deltas[0]
    for folder, message in [
        (unknown, "layers.9.input_layernorm.weight is not a parameter of the model"),
        (shape, r"model.norm.weight is \(97,\), model.norm \(96,\)"),
        (matrix, "lm_head.weight is stored exactly: only vectors can be"),
        (flipped, "was changed after it was written"),
        (other_base, "belongs to another base"),
        (tmp_path / "none", "none"),
    ]:
        with pytest.raises(Exception, match=message):
            load(llm, "bad", folder)
        got = answers(llm, prompts[:1], [good])
        assert difference(got[0], expected[1][0]) <= TOLERANCE
    assert len(manager_of(llm).host.packed) == 1


def test_a_delta_stays_served_when_its_folder_is_gone(
    family, alone, tmp_path, engine, answers, difference, load, prompts
):
    made = family("llama")
    expected = alone("llama")
    copies = []
    for i, folder in enumerate(made.deltas):
        copies.append(tmp_path / str(i))
        shutil.copytree(folder, copies[i])
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    requests = [load(llm, f"delta-{i}", folder) for i, folder in enumerate(copies)]
    shutil.rmtree(tmp_path)
    for m in (0, 1, 2, 0):  # evicts and activates again
        got = answers(llm, prompts[:1], [requests[m]])
        assert difference(got[0], expected[m + 1][0]) <= TOLERANCE


def test_a_folder_replaced_in_place_is_another_delta(
    family, alone, tmp_path, engine, answers, difference, load, prompts
):
    """Under the same name and path, with a prefix of the old one in the cache."""
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    folder = tmp_path / "math"
    for m in (1, 2, 1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made.deltas[m - 1], folder)
        request = load(llm, "math", folder)
        for _ in range(2):
            got = answers(llm, prompts, [request] * len(prompts))
            for answer, reference in zip(got, expected[m], strict=True):
                assert difference(answer, reference) <= TOLERANCE


def test_a_fine_tune_that_untied_the_lm_head(
    family, alone, save_model, tmp_path, engine, answers, difference, load, prompts
):
    """Its head is its own; beside it, tied deltas and the base go on as before."""
    made, expected = family("llama-tied"), alone("llama-tied")
    model = save_model("llama", tmp_path / "model", seed=7)
    convert(str(made.base), str(model), tmp_path / "delta", 0.125)
    export(str(made.base), tmp_path / "delta", tmp_path / "merged")
    llm = engine(tmp_path / "merged")
    untied = answers(llm, prompts, prompt_logprobs=1)
    del llm
    free()
    llm = engine(made.base, quantization="dqrelo")
    requests = [None, load(llm, "tied", made.deltas[0])]
    requests.append(load(llm, "untied", tmp_path / "delta"))
    for request, known in zip(requests, [*expected[:2], untied], strict=True):
        got = answers(llm, prompts, [request] * len(prompts), prompt_logprobs=1)
        for answer, one in zip(got, known, strict=True):
            assert difference(answer, one) <= TOLERANCE


def test_lora_adapters_beside_full_fine_tunes(
    family, alone, tmp_path, engine, answers, difference, load, prompts
):
    """An adapter is a delta of low rank: same batch, same op."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    made, expected = family("llama"), alone("llama")
    torch.manual_seed(7)
    config = peft.LoraConfig(
        r=5, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM"
    )
    model = AutoModelForCausalLM.from_pretrained(made.base)
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    convert(str(made.base), str(tmp_path / "adapter"), tmp_path / "delta", 0.125)

    llm = engine(tmp_path / "merged")
    lora = answers(llm, prompts, prompt_logprobs=1)
    del llm
    assert min(map(difference, lora, expected[0])) > 10 * TOLERANCE
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    requests = [None, load(llm, "full", made.deltas[0])]
    requests.append(load(llm, "lora", tmp_path / "delta"))
    order = [(p, m) for p in range(len(prompts)) for m in range(3)]
    got = answers(llm, [prompts[p] for p, _ in order], [requests[m] for _, m in order])
    for (p, m), answer in zip(order, got, strict=True):
        reference = lora[p] if m == 2 else expected[m][p]
        assert difference(answer, reference) <= TOLERANCE, (p, m)


def test_too_little_memory_and_unknown_options_are_refused(family, engine, load):
    made = family("llama")
    options = {"dqrelo": {"delta_memory_gib": 1e-5}}
    llm = engine(made.base, quantization="dqrelo", additional_config=options)
    with pytest.raises(Exception, match="delta_memory_gib"):
        load(llm, "large", made.deltas[0])
    with pytest.raises(Exception, match=r"unknown dqrelo options \['delta_memory'\]"):
        engine(
            made.base,
            quantization="dqrelo",
            additional_config={"dqrelo": {"delta_memory": 1}},
        )
    with pytest.raises(Exception, match="'8GB', expected a number of GiB"):
        engine(
            made.base,
            quantization="dqrelo",
            additional_config={"dqrelo": {"host_memory_gib": "8GB"}},
        )


def test_an_engine_without_deltas_is_vllms_own(family, engine, manager_of):
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    made = family("llama")
    llm = engine(made.base, quantization="dqrelo")  # patches this process
    del llm
    free()
    llm = engine(made.base, enable_lora=True)
    assert type(manager_of(llm)) is LRUCacheWorkerLoRAManager


@pytest.mark.parametrize("count", [1, 32])
def test_a_model_that_passes_a_layer_by_is_not_served(
    count, family, engine, monkeypatch
):
    """Code that goes around a layer's method would leave the layer's deltas out.

    Code for a GPU may do so in large steps only.
    """
    from vllm.model_executor.models.llama import LlamaMLP

    from vllm_dqrelo.worker import coverage

    def forward(self, x):
        layer = self.gate_up_proj
        apply = layer.quant_method.apply
        if len(x) == count:
            apply = layer.quant_method.inner.apply
        return self.down_proj(self.act_fn(apply(layer, x)))[0]

    monkeypatch.setattr(coverage, "token_counts", lambda *_: [1, 32])
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    message = f"passes 2 of its layers by in a step of {count} tokens: "
    with pytest.raises(ValueError, match=f"{message}model.layers.0.mlp.gate_up_proj"):
        engine(family("llama").base, quantization="dqrelo")
