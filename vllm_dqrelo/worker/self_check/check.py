# SPDX-License-Identifier: Apache-2.0
"""The self-check: a worker proves on its own device that it serves what deltas say."""

import time
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import all_gather_object
from vllm.distributed import get_world_group
from vllm.logger import init_logger

from vllm_dqrelo.worker.self_check.memory import check_memory
from vllm_dqrelo.worker.self_check.ops import check_ops
from vllm_dqrelo.worker.self_check.remembered import Remembered, device_name
from vllm_dqrelo.worker.self_check.report import Report, SelfCheckError
from vllm_dqrelo.worker.self_check.step import check_step
from vllm_dqrelo.worker.self_check.synthetic import free_pools

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

logger = init_logger(f"vllm.{__name__}")

REPORT = (
    "Deltas would be answered wrongly, so that the server does not start. Please "
    "report this with the output of `dqrelo doctor`"
)


def self_check(worker: Any, manager: "DeltaManager") -> None:
    """Check ops, memory and a step of this worker, unless that is remembered.

    All workers call it together.

    Args:
        worker: vLLM's, with its KV cache and without requests. Mutated: the cache.
        manager: of the worker, without deltas. Mutated: deltas come and go.

    Raises:
        SelfCheckError: a worker computes something else than deltas say.
    """
    mode = manager.options.self_check
    if mode == "never":
        return
    remembered = Remembered.of(worker, manager)
    brief = mode == "once" and all(_of_all(remembered.passed))
    if brief and manager.device.type == "cpu":
        return  # not a kernel to compile
    report, began = Report(), time.monotonic()
    evicted = manager.residency.evicted
    try:
        with torch.inference_mode():
            check_ops(manager, report, brief=brief)
            _refuse(report)
            if brief:
                return
            check_memory(manager, report)
            _refuse(report)
            check_step(worker, manager, report)
            _refuse(report)
    finally:
        free_pools()
        manager.residency.evicted = evicted
    seconds, device = time.monotonic() - began, device_name(manager.device)
    line = f"passed in {seconds:.1f} s on {device}; largest errors as a part of what "
    line += f"is allowed: {report}"
    for left_out in report.left_out:
        line += f"; not checked: {left_out}"
    remembered.write(line)
    logger.info("dqrelo: the self-check %s", line)


def _refuse(report: Report) -> None:
    """End all workers if one of them has a problem."""
    if problems := [problem for problem in _of_all(report.problem) if problem]:
        raise SelfCheckError(f"dqrelo: the self-check failed: {problems[0]}. {REPORT}")


def _of_all(value: Any) -> list[Any]:
    """The values of all workers."""
    group = get_world_group()
    values = [value] * group.world_size
    all_gather_object(values, value, group.cpu_group)
    return values
