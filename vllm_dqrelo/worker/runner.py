# SPDX-License-Identifier: Apache-2.0
"""Connects a model runner of vLLM with the worker's delta manager.

vLLM has two model runners: V2 on a GPU; V1 on a CPU, and on a GPU where V2 lacks a
feature that the engine asks for.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, NoReturn

import numpy as np
import vllm
from vllm.lora.request import LoRARequest

from vllm_dqrelo.compat import find
from vllm_dqrelo.worker.step import TESTED, Step

NEW_WEIGHTS = (
    "--quantization dqrelo cannot change the weights of a base, to which all deltas "
    "belong: start a server with the new weights"
)


def attach(runner: Any, manager: Any) -> None:
    """Let a model runner tell its delta manager which delta each row belongs to.

    Replaces the runner's method that describes the rows of a step, and wraps the
    methods that call the LM head.

    Args:
        runner: has its model and its sampler, and has not seen a request with a delta.
            Mutated.
        manager: the runner's DeltaManager.

    Raises:
        RuntimeError: the runner is neither V1 nor V2, or lacks a method.
    """
    if hasattr(runner, "lora_state"):
        _attach_v2(runner, manager)
    elif hasattr(runner, "_get_prompt_logprobs_dict"):
        _attach_v1(runner, manager)
    else:
        raise RuntimeError(
            f"vLLM {vllm.__version__} has a model runner that vllm-dqrelo does not "
            f"know, {type(runner).__module__}.{type(runner).__name__}; {TESTED}"
        )
    find(runner, "reload_weights")
    runner.reload_weights = _refuse


def _attach_v2(runner: Any, manager: Any) -> None:
    """Attach Model Runner V2.

    Why: vLLM describes the rows of each step in tuples, one adapter a token; it
        describes one sampled row a request, where drafts have rows, too; and it
        does not describe the rows of prompt logprobs.
    Where: ``LoraState.make_lora_inputs``, v1/worker/gpu/lora_utils.py:93, and in
        v1/worker/gpu/model_runner.py ``execute_model`` (:1829), ``sample`` (:1615) and
        ``sample_tokens`` (:2151). ``lora_config`` stays: it is a key of captured graphs
        (:2011).
    Upstream: issue 51594, pull request 51597; open.
    Until: vLLM describes the rows of each call of the LM head.
    """
    step, state = manager.step, find(runner, "lora_state")
    set_dummies, sample = find(runner, "_set_active_loras"), find(runner, "sample")
    requests_of, ids = find(state, "get_activate_loras"), find(state, "lora_ids")
    find(state, "make_lora_inputs")

    def make_lora_inputs(
        req_ids: list[str], indices: np.ndarray, tokens: np.ndarray
    ) -> tuple[tuple, tuple, set]:
        manager.set_rows(requests_of(req_ids), ids[indices], tokens)
        return (), (), set()

    def _set_active_loras(prompt: tuple, tokens: tuple, *args: Any) -> None:
        if tokens:  # the warm-up's; make_lora_inputs has set those of a step
            set_dummies(prompt, tokens, *args)

    @wraps(sample)
    def sampled(hidden_states: Any, input_batch: Any, *args: Any) -> Any:
        with step.sampled_rows(np.diff(input_batch.cu_num_logits_np)):
            return sample(hidden_states, input_batch, *args)

    if manager.tower is not None:
        model_state = find(runner, "model_state")
        encode = find(model_state, "execute_mm_encoder")
        model_state.execute_mm_encoder = _by_model(
            encode, find(state, "lora_requests").get, manager
        )
    state.make_lora_inputs = make_lora_inputs
    runner._set_active_loras = _set_active_loras
    runner.sample = sampled
    if (worker := runner.prompt_logprobs_worker) is None:
        return  # another stage of the pipeline has the LM head
    for name in ("compute_prompt_logprobs", "compute_prompt_token_id_logprobs"):
        setattr(worker, name, _of_prompt(step, find(worker, name), 1))


def _attach_v1(runner: Any, manager: Any) -> None:
    """Attach Model Runner V1.

    Why: as for V2; V1 does describe the rows of drafts. A step of the
        base skips the search for its adapters.
    Where: ``set_active_loras``, v1/worker/gpu_model_runner.py:2239, and in the same
        ``execute_model`` what is sampled (:4242); ``_get_prompt_logprobs_dict`` (:5306)
        in another call.
    Upstream: issue 51594, pull request 51597; pull request 47951 skips vLLM's own
        layers in steps of the base; open.
    Until: as for V2.
    """
    step, scope = manager.step, ExitStack()
    execute, prompt = "execute_model", "_get_prompt_logprobs_dict"
    execute_model = find(runner, execute)
    find(runner, "set_active_loras")
    for name in ("lora_id_to_lora_request", "request_lora_mapping"):
        find(runner.input_batch, name)

    def set_active_loras(
        batch: Any, tokens: np.ndarray, sampled: np.ndarray, *_: Any
    ) -> None:
        requests = set(batch.lora_id_to_lora_request.values())
        ids = batch.request_lora_mapping[: batch.num_reqs]
        manager.set_rows(requests, ids, tokens)
        scope.enter_context(step.sampled_rows(sampled))

    @wraps(execute_model)
    def executed(*args: Any, **kwargs: Any) -> Any:
        with scope:
            return execute_model(*args, **kwargs)

    if manager.tower is not None:
        _encode_by_model(runner, manager)
    if runner.enable_prompt_embeds and not runner.supports_mm_inputs:
        _embed_some(runner, step)
    runner.set_active_loras = set_active_loras
    runner.execute_model = executed
    setattr(runner, prompt, _of_prompt(step, find(runner, prompt), 0))


def _by_model(
    encode: Callable[[dict], Any],
    request_of: Callable[[str], LoRARequest | None],
    manager: Any,
) -> Callable[[dict], None]:
    """``encode`` of the images of a step, once for each model that has some.

    Args:
        encode: takes the images of each request: its id -> their indices.
        request_of: the LoRARequest of a request's id; None for the base.
    """

    def encode_each(inputs: dict[str, list[int]]) -> None:
        by_digest: dict[str | None, dict[str, list[int]]] = {}
        for request_id, images in inputs.items():
            request = request_of(request_id)
            digest = request.lora_name if request else None
            by_digest.setdefault(digest, {})[request_id] = images
        for digest, some in by_digest.items():
            manager.encode_for(digest)
            encode(some)

    return encode_each


def _encode_by_model(runner: Any, manager: Any) -> None:
    """Encode each image with the weights of its request's model, on V1.

    Why: vLLM gives each row of an encoder an adapter, for some layers of some models.
    Where: ``_execute_mm_encoder``, v1/worker/gpu_model_runner.py:2787. What it returns
        is of encoder-decoder models only. On V2 ``ModelState.execute_mm_encoder``,
        v1/worker/gpu/model_states/interface.py:189.
    Upstream: none.
    Until: vLLM calls an encoder for one adapter at a time.
    """
    execute, batch = "_execute_mm_encoder", runner.input_batch
    encode = find(runner, execute)

    def request_of(request_id: str) -> LoRARequest | None:
        number = batch.request_lora_mapping[batch.req_id_to_index[request_id]]
        found: LoRARequest | None = batch.lora_id_to_lora_request.get(int(number))
        return found

    def executed(scheduled: Any) -> list:
        def encode_some(inputs: dict) -> None:
            some = copy.copy(scheduled)
            some.scheduled_encoder_inputs = inputs
            encode(some)

        inputs = scheduled.scheduled_encoder_inputs
        _by_model(encode_some, request_of, manager)(inputs)
        return []

    setattr(runner, execute, executed)


def _embed_some(runner: Any, step: Step) -> None:
    """Tell a step which of its tokens V1 embeds: those without a prompt embedding.

    Where: ``_preprocess``, v1/worker/gpu_model_runner.py:3370. V2, and V1 with images,
        embed every token and overwrite the rows of prompt embeddings.
    """
    preprocess, has_id = find(runner, "_preprocess"), find(runner, "is_token_ids")

    @wraps(preprocess)
    def preprocessed(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        count = scheduled.total_num_scheduled_tokens
        with step.embedded_rows(has_id.np[:count]):
            return preprocess(scheduled, *args, **kwargs)

    runner._preprocess = preprocessed


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(NEW_WEIGHTS)


def _of_prompt(step: Step, compute: Callable, index: int) -> Callable:
    """``compute``, whose argument ``index`` has the rows that the LM head sees."""

    @wraps(compute)
    def scoped(*args: Any) -> Any:
        with step.prompt_rows(args[index]):
            return compute(*args)

    return scoped
