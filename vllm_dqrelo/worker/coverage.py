# SPDX-License-Identifier: Apache-2.0
"""Whether every layer that a delta can change really goes through our operators.

vLLM has models whose code reads a layer's weight itself, past the layer's method. A
delta of such a layer would be left out without a word, so one forward pass at start
shows which layers are met.
"""

from typing import Any

import torch
from torch.distributed import all_gather_object
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group

from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.residency import Residency
from vllm_dqrelo.worker.sites import Sites


class _Calls(TorchDispatchMode):
    """Notes which tables the operators of this project are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "dqrelo":
            names = [argument.name for argument in func._schema.arguments]
            if "table" in names:
                self.tables.add(args[names.index("table")].data_ptr())
        if experts := compat.experts_behind(func):
            with self:
                return experts(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def token_counts(vllm_config: VllmConfig, device: torch.device) -> list[int]:
    """The sizes of steps that are run: code for a GPU may choose a path by the size.

    One token, the largest captured graph, and the largest step. On a CPU one token
    only: the largest step takes seconds there.
    """
    if device.type == "cpu":
        return [1]
    graphs = vllm_config.compilation_config.max_cudagraph_capture_size or 1
    return sorted({1, graphs, vllm_config.scheduler_config.max_num_batched_tokens})


def check_coverage(model_runner: Any, sites: Sites, residency: Residency) -> None:
    """Run tokens through the model and see whether every site is met.

    Raises:
        ValueError: the code of the model passes a site by.
    """
    for count in token_counts(model_runner.vllm_config, residency.arena.data.device):
        _check(model_runner, sites, residency, count)


def _check(model_runner: Any, sites: Sites, residency: Residency, count: int) -> None:
    """Run ``count`` tokens; see ``check_coverage``."""
    stage = get_pp_group()
    with _Calls() as calls:
        hidden_states = compat.run_tokens(model_runner, count)
        if stage.is_last_rank:
            with torch.inference_mode():
                model_runner.model.compute_logits(hidden_states[:1])
    met = {
        name
        for name, site in sites.by_name.items()
        if residency.table(site).data_ptr() in calls.tables
    }
    # A stage of a pipeline may have a layer that only another one uses.
    met_by_stage: list[set[str]] = [set()] * stage.world_size
    all_gather_object(met_by_stage, met, stage.cpu_group)
    missed = [name for name in sites.by_name if name not in set().union(*met_by_stage)]
    if missed:
        model = type(model_runner.model).__name__
        raise ValueError(
            f"vLLM's {model} passes {len(missed)} of its layers by in a step of "
            f"{count} tokens: "
            f"{', '.join(missed[:5])}{', ...' if missed[5:] else ''}. Deltas of these "
            "would be left out without a word, so that this model cannot be served "
            "with --quantization dqrelo; please report its architecture"
        )
