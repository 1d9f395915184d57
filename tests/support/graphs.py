# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph without a GPU: launches are recorded once, and launched again later.

vLLM's own hook sets the adapters of each case, and vLLM's runner V2 chooses the case of
a step. A replay runs the recorded launches with the recorded tensors; the Python of the
model does not run. As with vLLM's piecewise graphs, attention and the LM head run
outside of a graph. Pools of memory and streams are not emulated.
"""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from dqrelo_kernels import ops
from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.step import NO_ROWS

# Operators that wait for the device, and what only allocates.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
ALLOCATES = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# One launch of torch's grouped product on a GPU, a loop on the CPU.
ONE_LAUNCH = "expert_linear_"


class Graph(TorchDispatchMode):
    """The launches of one forward pass.

    Args:
        host: tensors that a launcher reads while a graph is captured.

    Attributes:
        triton: how many launches are of Triton.
        reads: operators that read a tensor of the device, which a graph must not.
    """

    def __init__(self, host):
        super().__init__()
        self._host = {tensor.untyped_storage().data_ptr() for tensor in host}
        self._calls = []
        self.triton = 0
        self.reads = []

    @contextmanager
    def capture(self):
        """Within it a forward pass is recorded."""
        run = InterpretedFunction.run

        def launch(kernel, *args, **kwargs):
            self.triton += 1
            self._calls.append(partial(run, kernel, *args, **kwargs))
            with _disable_current_modes():
                return run(kernel, *args, **kwargs)

        with patch.object(InterpretedFunction, "run", launch), self:
            yield

    def replay(self):
        """Launch all again."""
        for call in self._calls:
            call()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if python := _python_of(func):
            with self:  # it runs now, and never again
                return python(*args, **kwargs)
        out = func(*args, **kwargs)
        made, given = _storages(out), _storages((args, kwargs))
        if func._opname in READS:
            if not given <= self._host:
                self.reads.append(str(func))
        elif func._schema.is_mutable:
            self._calls.append(partial(func, *args, **kwargs))
        elif not made <= given and func._opname not in ALLOCATES:
            self._calls.append(partial(_write, out, func, args, kwargs))
        return out


def _python_of(func):
    """The function of an operator whose Python launches others; None for a launch."""
    if func.namespace == "dqrelo" and func._opname != ONE_LAUNCH:
        return ops._launchers.get(func._opname) or getattr(ops, func._opname)
    return compat.experts_behind(func)


def _storages(tree):
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in tree_leaves(tree)
        if isinstance(tensor, torch.Tensor)
    }


def _write(out, func, args, kwargs):
    """Compute again, into the tensors of the first time."""
    for old, new in zip(
        tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True
    ):
        if isinstance(old, torch.Tensor):
            old.copy_(new)


class Graphs:
    """Graphs of a runner's model for some numbers of tokens, with and without adapters.

    Args:
        runner: V2, of an engine that has started.
        sizes: numbers of tokens.
        dummies: the number of dummies that a case is captured with, if it is another.

    Attributes:
        graphs: (size, case) -> Graph; vLLM has the cases 0 and ``max_loras`` + 1.
        used: how often each was replayed.
    """

    def __init__(self, runner, sizes, dummies=None):
        from vllm.v1.worker.gpu.lora_utils import (
            create_lora_capture_hook,
            get_lora_capture_cases,
        )

        self._runner, self._inner = runner, runner.model.forward
        self.graphs, self._outputs, self.used = {}, {}, {}
        config = runner.lora_config
        hook = create_lora_capture_hook(config, runner)
        self.cases = get_lora_capture_cases(config, runner.compilation_config)
        step = runner.lora_manager.step
        step.may_skip = False  # as where vLLM captures, before a server starts
        step.set(NO_ROWS)
        with torch.inference_mode(), runner.maybe_setup_dummy_loras(config):
            for size in sizes:
                for case in self.cases:
                    hook((dummies or {}).get(case, case), size, size)
                    self._capture(size, case, (step.tokens.num_active,))
        step.may_skip = True

    def _capture(self, size, case, host):
        from vllm.forward_context import set_forward_context
        from vllm.v1.worker.gpu.cudagraph_utils import prepare_inputs_to_capture

        runner = self._runner
        attention, slots = prepare_inputs_to_capture(
            size,
            size,
            runner.model_state,
            runner.input_buffers,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
            full_cudagraph=False,
        )
        inputs = {
            "input_ids": runner.input_buffers.input_ids[:size],
            "positions": runner.input_buffers.positions[:size],
            "intermediate_tensors": None,
            "inputs_embeds": None,
        }
        graph = self.graphs[size, case] = Graph(host)
        context = set_forward_context(
            attention, runner.vllm_config, num_tokens=size, slot_mapping=slots
        )
        with context, graph.capture():
            self._outputs[size, case] = self._inner(**inputs)

    def install(self, monkeypatch):
        """From now on steps that fit a graph, padded, replay it."""
        from vllm.v1.worker.gpu import model_runner

        dispatch = model_runner.dispatch_cg_and_sync_dp
        sizes = sorted({size for size, _ in self.graphs})

        def padded(*args, **kwargs):
            found, sync = dispatch(*args, **kwargs)
            for size in sizes:
                if found.num_tokens <= size:
                    case = self.cases[-1] if found.num_active_loras else 0
                    found = replace(found, num_tokens=size, num_active_loras=case)
                    break
            return found, sync

        monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", padded)
        monkeypatch.setattr(self._runner.model, "forward", self._forward)

    def _forward(self, **inputs):
        from vllm.forward_context import get_forward_context

        batch = get_forward_context().batch_descriptor
        key = batch.num_tokens, batch.num_active_loras
        self.used[key] = self.used.get(key, 0) + 1
        if key not in self.graphs:
            return self._inner(**inputs)
        self.graphs[key].replay()
        return self._outputs[key].clone()
