# SPDX-License-Identifier: Apache-2.0
"""vLLM's two model runners have what is attached to, and nothing beside it."""

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

WORKER = Path(vllm.__file__).parent / "v1/worker"
V1, V2 = WORKER / "gpu_model_runner.py", WORKER / "gpu/model_runner.py"
PROMPT = WORKER / "gpu/sample/prompt_logprob.py"


def functions_that_name(source: str, name: str) -> list[str]:
    """The functions in which ``name`` is an attribute or is called, one a place."""
    found = []

    def visit(node, function):
        if isinstance(node, ast.FunctionDef):
            function = node.name
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if (called and node.func.id == name) or (
            isinstance(node, ast.Attribute) and node.attr == name
        ):
            found.append(function)
        for child in ast.iter_child_nodes(node):
            visit(child, function)

    visit(ast.parse(source), None)
    return sorted(found)


def calls_of(path: Path, function: str) -> list[str]:
    """The methods that a function calls, in the order of the source."""
    tree = ast.parse(path.read_text())
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    (node,) = (n for n in nodes if n.name == function)
    calls = [n for n in ast.walk(node) if isinstance(n, ast.Call)]
    calls = [n for n in calls if isinstance(n.func, ast.Attribute)]
    return [n.func.attr for n in sorted(calls, key=lambda n: (n.lineno, n.col_offset))]


def test_who_calls_the_lm_head():
    """Drafters aside, whose LM head is a layer without deltas."""
    callers = {}
    for path in [V1, *(WORKER / "gpu").rglob("*.py")]:
        if found := functions_that_name(path.read_text(), "compute_logits"):
            callers[path.relative_to(WORKER).as_posix()] = found
    drafters = [path for path in callers if path.startswith("gpu/spec_decode/")]
    assert not [path for path in drafters if "ngram" in path]
    assert {path: callers[path] for path in callers if path not in drafters} == {
        "gpu/model_runner.py": [
            "_dummy_sampler_run",
            "sample",
            "sample_tokens",  # which hands it to both functions of prompt logprobs
            "sample_tokens",
        ],
        "gpu_model_runner.py": [
            "_dummy_sampler_run",
            "_get_prompt_logprobs_dict",
            "execute_model",
            "execute_model",
        ],
    }
    assert functions_that_name(PROMPT.read_text(), "logits_fn") == [
        "compute_prompt_logprobs_with_chunking",
        "compute_prompt_token_id_logprobs",
    ]
    calls = calls_of(PROMPT, "compute_prompt_logprobs")
    assert "compute_prompt_token_id_logprobs" not in calls
    # Batch-sharded sampling is refused.
    local = [
        path.name
        for path in (WORKER / "gpu").rglob("*.py")
        if functions_that_name(path.read_text(), "compute_logits_local")
    ]
    assert local == ["model_runner.py"]


def test_the_contract_test_can_fail():
    source = "class A:\n def f(self):\n  g(1)\n  def h():\n   return self.a.g(2)"
    assert functions_that_name(source, "g") == ["f", "h"]
    assert functions_that_name(source.replace("g(", "k("), "g") == []


def test_the_rows_of_tokens_are_said_in_one_place():
    found = {
        (path.relative_to(WORKER).as_posix(), function)
        for path in [V1, *(WORKER / "gpu").rglob("*.py")]
        for name in ("make_lora_inputs", "_set_active_loras", "set_active_loras")
        for function in functions_that_name(path.read_text(), name)
    }
    assert found == {
        ("gpu/model_runner.py", "execute_model"),
        ("gpu_model_runner.py", "_prepare_inputs"),
    }
    calls = calls_of(V2, "execute_model")
    assert calls.count("make_lora_inputs") == calls.count("_set_active_loras") == 1
    said = calls.index("_set_active_loras")
    assert said == calls.index("make_lora_inputs") + 1
    assert said < min(calls.index("run_fullgraph"), calls.index("run_pw_graph"))
    calls = calls_of(V1, "execute_model")
    assert calls.index("_prepare_inputs") < calls.index("compute_logits")


@pytest.mark.parametrize("path", [V1, V1.with_name("cpu_model_runner.py"), V2])
def test_a_drafter_loads_its_model_after_the_deltas_are_installed(path):
    calls = calls_of(path, "load_model")
    assert "load_model" in calls[calls.index("load_lora_model") + 1 :]
    drafter = "speculator" if path == V2 else "drafter"
    assert f"self.{drafter}.load_model(self.model)" in path.read_text()


def test_signatures():
    from vllm.v1.worker.gpu.lora_utils import LoraState
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    hidden = ["self", "logits_fn", "hidden_states", "input_batch"]
    expected = {
        LoraState.make_lora_inputs: [
            "self",
            "req_ids",
            "idx_mapping",
            "num_scheduled_tokens",
        ],
        LoraState.get_activate_loras: ["self", "req_ids"],
        LoRAModelRunnerMixin._set_active_loras: [
            "self",
            "prompt_lora_mapping",
            "token_lora_mapping",
        ],
        LoRAModelRunnerMixin.set_active_loras: [
            "self",
            "input_batch",
            "num_scheduled_tokens",
            "num_sampled_tokens",
        ],
        PromptLogprobsWorker.compute_prompt_logprobs: hidden,
        PromptLogprobsWorker.compute_prompt_token_id_logprobs: hidden,
        GPUModelRunner._get_prompt_logprobs_dict: ["self", "hidden_states"],
    }
    for function, names in expected.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names
    # V2's module cannot be imported where vLLM has no Triton.
    tree = ast.parse(V2.read_text())
    nodes = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    for name, names in {
        "sample": ["self", "hidden_states", "input_batch", "grammar_output"],
        "_dummy_run": ["self", "num_tokens"],
    }.items():
        assert [one.arg for one in nodes[name].args.args][: len(names)] == names
    assert "is_profile" in [one.arg for one in nodes["_dummy_run"].args.kwonlyargs]


def test_what_is_read_of_a_batch():
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.lora_utils import LoraState

    assert "cu_num_logits_np" in {field.name for field in fields(InputBatch)}
    assert LoraState(2).lora_ids.tolist() == [0, 0]  # of the base
    for name in ("lora_state", "prompt_logprobs_worker"):
        assert f"        self.{name}" in V2.read_text()
        assert f"self.{name}" not in V1.read_text()  # how V2 is known


def test_a_runner_of_another_kind_is_named():
    from vllm_dqrelo.worker.runner import attach

    class NextModelRunner:
        pass

    message = r"a model runner that vllm-dqrelo does not know, .*\.NextModelRunner"
    with pytest.raises(RuntimeError, match=message):
        attach(NextModelRunner(), None)


@pytest.mark.parametrize("has", [{"lora_state": object()}, {"execute_model": int}])
def test_a_method_that_is_gone_is_named(has):
    from vllm_dqrelo.worker.runner import attach

    has.setdefault("_get_prompt_logprobs_dict", int)
    runner, manager = SimpleNamespace(**has), SimpleNamespace(step=None)
    with pytest.raises(RuntimeError, match=r"_set_active_loras|set_active_loras"):
        attach(runner, manager)
