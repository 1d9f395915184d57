# SPDX-License-Identifier: Apache-2.0
"""``engine(model)``: vLLM in this process, what it is asked and what it answers."""

import atexit
import gc
import inspect
import sys
import weakref

import pytest
import torch
from support import model_runner
from transformers import AutoModelForCausalLM

PROMPTS = [
    [1, 5, 9, 33, 200, 77, 3, 8],
    [4, 4, 100, 300, 2],
    [7] * 40,  # more than a block of the prefix cache
    [7] * 40 + [11, 12],
]


@pytest.fixture(name="prompts")
def prompts_fixture():
    """What the engines are asked."""
    return PROMPTS


@pytest.fixture(name="engine")
def engine_fixture():
    """The function ``engine``; memory is freed when the test has ended."""
    yield engine
    for core in list(CORES):  # of a test that failed: its traceback has the engine
        core.shutdown()
    free()


CORES: weakref.WeakSet = weakref.WeakSet()
atexit.register(gc.unfreeze)  # nanobind calls frozen objects leaked


def free() -> None:
    """Free the engines that nothing refers to any more.

    All modules are frozen then: vLLM collects garbage six times for an engine, and each
    time would look at all of their objects.
    """
    gc.unfreeze()  # an engine has frozen all that there was at its start
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_classes():
    """Undo what vLLM's backend for transformers does to its classes, in place.

    They could not be built without an engine (vllm/compilation/decorators.py:338).
    """
    yield
    if not (compiled := sys.modules.get("vllm.compilation.wrapper")):
        return
    wrapper = compiled.TorchCompileWithNoGuardsWrapper
    for cls in wrapper.__subclasses__():
        if cls.__module__.startswith("transformers."):
            cls.__init__ = inspect.getclosurevars(cls.__init__).nonlocals["old_init"]
            del cls.__call__, cls.save_aot_compiled_function
            cls.__bases__ = tuple(base for base in cls.__bases__ if base != wrapper)


def engine(model, **options):
    """A model alone, or with quantization="dqrelo" a base with room for its deltas."""
    from vllm import LLM
    from vllm.distributed import parallel_state

    if parallel_state._EP is None:  # an engine before had no group for experts
        parallel_state.destroy_model_parallel()
    model_runner.prepare()
    if "quantization" in options:
        # To check itself takes an engine seconds: a test says where it should.
        given = options.get(
            "additional_config", {"dqrelo": {"delta_memory_gib": 0.001}}
        )
        own = {"self_check": "never", **given.get("dqrelo", {})}
        options["additional_config"] = {**given, "dqrelo": own}
    options.setdefault("max_model_len", 128)
    options.setdefault("block_size", 32)  # a CPU's 128 would be more than any prompt
    options.setdefault("enforce_eager", True)
    options.setdefault("num_gpu_blocks_override", 1024)  # 1 GiB takes time to clear
    llm = LLM(
        str(model),
        skip_tokenizer_init=options.pop("skip_tokenizer_init", True),
        dtype="float32",
        max_num_seqs=32,
        enable_prefix_caching=True,
        **options,
    )
    CORES.add(llm.llm_engine.engine_core)
    model_runner.check(llm)
    return llm


@pytest.fixture
def asynchronous(monkeypatch):
    """``asynchronous()``: the next engine schedules a step before the last one ended.

    On a GPU vLLM does so by itself; on a CPU it turns that off (platforms/cpu.py:331).
    """

    def force():
        from vllm.engine.arg_utils import EngineArgs

        create = EngineArgs.create_engine_config

        def create_engine_config(*args, **kwargs):
            config = create(*args, **kwargs)
            config.scheduler_config.async_scheduling = True
            return config

        monkeypatch.setattr(EngineArgs, "create_engine_config", create_engine_config)

    return force


@pytest.fixture(name="load")
def load_fixture():
    """``load(llm, name, folder)``: the request of a delta."""
    from vllm_dqrelo import load_delta

    return lambda llm, name, folder: load_delta(llm, name, str(folder))


@pytest.fixture(name="manager_of")
def manager_of_fixture():
    """``manager_of(llm)``: the worker's delta manager, in this process."""

    def manager_of(llm):
        core = llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.lora_manager

    return manager_of


def sampling(max_tokens=8, prompt_logprobs=None):
    """Greedy, with logprobs."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0,
        logprobs=1,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )


def answers(llm, prompts, requests=None, prompt_logprobs=None, max_tokens=8):
    """Tokens, their logprobs and the prompt's logprobs, of each prompt."""
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(max_tokens, prompt_logprobs),
        lora_request=requests,
        use_tqdm=False,
    )
    return [answer_of(output) for output in outputs]


def answer_of(output):
    """Tokens, their logprobs and the prompt's logprobs, of a finished request."""
    completion = output.outputs[0]
    tokens = list(completion.token_ids)
    logprobs = [
        step[token].logprob
        for token, step in zip(tokens, completion.logprobs, strict=True)
    ]
    prompt = [
        step[token].logprob
        for token, step in zip(
            output.prompt_token_ids, output.prompt_logprobs or [], strict=False
        )
        if step
    ]
    return tokens, logprobs, prompt


def difference(got, expected) -> float:
    """Largest difference of two answers' logprobs; infinite if the tokens differ."""
    if got[0] != expected[0]:
        return float("inf")
    pairs = [*zip(got[1], expected[1], strict=True)]
    if got[2]:  # prompt logprobs were asked for
        pairs += zip(got[2], expected[2], strict=True)
    return max(abs(one - other) for one, other in pairs)


def reference(folder, prompts, max_tokens=8):
    """What transformers answers: as ``answers``, with prompt logprobs."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )[0]
        with torch.inference_mode():
            logits = model(output[None, :-1]).logits[0]
        tokens = output[1:, None]
        logprobs = logits.log_softmax(-1).gather(1, tokens)[:, 0].tolist()
        first = len(prompt) - 1  # of the answer
        answer = tokens[first:, 0].tolist()
        found.append((answer, logprobs[first:], logprobs[:first]))
    return found


def given(function, name=None):
    """A fixture that is ``function``."""
    return pytest.fixture(scope="session", name=name or function.__name__)(
        lambda: function
    )


sampling_fixture = given(sampling)
answers_fixture = given(answers)
answer_of_fixture = given(answer_of)
difference_fixture = given(difference)
reference_fixture = given(reference)
start_engine_fixture = given(engine, "start_engine")


@pytest.fixture(scope="session")
def alone(family):
    """``alone(kind)``: the answers of the base and of each merged checkpoint."""
    known = {}

    def get(kind):
        if kind not in known:
            made = family(kind)
            folders = [made.base, *made.merged]
            known[kind] = [reference(folder, PROMPTS) for folder in folders]
        return known[kind]

    return get


@pytest.fixture
def add_request():
    """``add_request(llm, key, prompt, lora_request)``: it is answered by ``finish``."""

    def add_request(llm, key, prompt, lora_request):
        llm.llm_engine.add_request(
            key, {"prompt_token_ids": prompt}, sampling(), lora_request=lora_request
        )

    return add_request


@pytest.fixture
def finish():
    """``finish(llm)``: step to the end; key -> answer."""

    def finish(llm):
        found = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in llm.llm_engine.step():
                if output.finished:
                    found[output.request_id] = answer_of(output)
        return found

    return finish
