# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler, which lets no request start before its delta is in memory."""

import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dqrelo.engine import compat
from vllm_dqrelo.engine.deltas import POLL, Deltas, Failure
from vllm_dqrelo.options import is_dqrelo

logger = init_logger(f"vllm.{__name__}")

UNREAD = 1000  # steps after which a report is dropped, with --disable-log-stats


class DeltaScheduler(Scheduler):
    """On top of the scheduler that vLLM would choose: see ``start``.

    A request whose delta is being read is skipped, as vLLM skips one whose grammar is
    being compiled: later requests in the queue go on.
    """

    deltas: Deltas
    base_name: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failed: list[tuple[int, EngineCoreOutput]] = []
        self._held_back: dict[str, float] = {}  # request -> since when
        # In this step: how many requests run, and their deltas.
        self._counted: tuple[int, set[str]] | None = None

    def add_request(self, request: Request) -> None:
        new = request.request_id not in self.requests
        super().add_request(request)
        if new and request.lora_request:
            self.deltas.use(request.lora_request)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        self._held_back.pop(request.request_id, None)
        bound = request.lora_request
        self.deltas.report.finished.append(
            (
                self._model(request),
                str(request.get_finished_reason()),
                min(request.num_computed_tokens, request.num_prompt_tokens),
                request.num_output_tokens,
            )
        )
        if bound:
            self.deltas.release(bound)
        return freed

    def has_requests(self) -> bool:
        """Also while a delta is read that no request waits for: the loop polls.

        And for one step more when there is something to report.
        """
        return super().has_requests() or self.deltas.loading or self.deltas.changed

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.deltas.busy:
            failure = self.deltas.advance(self._started(), self._waiting())
            if failure:
                self._fail(failure)
        self.deltas.look()
        self._counted = None
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            self.deltas.ran(self._rows(output) if self.deltas.users else {})
        elif self.deltas.busy:
            time.sleep(POLL)
        return output

    def _rows(self, output: SchedulerOutput) -> Counter[str]:
        """How many rows of a step belong to each delta."""
        rows: Counter[str] = Counter()
        for request_id, tokens in output.num_scheduled_tokens.items():
            if bound := self.requests[request_id].lora_request:
                rows[bound.lora_name] += tokens
        return rows

    def _model(self, request: Request) -> str:
        """The name by which a client asked for the model."""
        bound = request.lora_request
        return bound.model if bound else self.base_name

    def make_spec_decoding_stats(
        self, stats: Any, **counts: Any
    ) -> SpecDecodingStats | None:
        """Count the drafts of each model; vLLM counts those of all models."""
        if drafted := counts["num_draft_tokens"]:
            model = self._model(self.requests[counts["request_id"]])
            accepted = counts["num_accepted_tokens"]
            self.deltas.report.drafts.append((model, drafted, accepted))
        return super().make_spec_decoding_stats(stats, **counts)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self.deltas.take_report().attach(stats)
        elif len(self.deltas.report.steps) >= UNREAD:
            self.deltas.take_report()
        return stats

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        bound = request.lora_request
        if bound and self._would_exceed_max_loras(bound):
            return False
        if bound and bound.lora_name not in self.deltas.ready:
            self._held_back.setdefault(request.request_id, time.monotonic())
            return False
        if since := self._held_back.pop(request.request_id, None):
            self.deltas.report.cold_waits.append(time.monotonic() - since)
        return super()._handle_blocked_waiting_request(request)

    def _would_exceed_max_loras(self, bound: LoRARequest) -> bool:
        """Whether a later step could hold more than ``--max-loras`` deltas."""
        if compat.counts_running():
            return False  # vLLM looks at that itself
        # While requests are admitted ``running`` only grows: its length tells a change,
        # and a step with many waiting requests does not count for each of them.
        if self._counted is None or self._counted[0] != len(self.running):
            names = {r.lora_request.lora_name for r in self.running if r.lora_request}
            self._counted = len(self.running), names
        _, running = self._counted
        return (
            len(running) >= self.lora_config.max_loras
            and bound.lora_name not in running
        )

    def _started(self) -> set[str]:
        """The deltas of requests that run, or did and were preempted."""
        preempted = (r for r in self.waiting if r.num_preemptions)
        return {
            request.lora_request.lora_name
            for request in chain(self.running, self.kv_holding_waiting, preempted)
            if request.lora_request
        }

    def _waiting(self) -> Iterator[LoRARequest]:
        """The deltas of requests that wait, in the order of the queue."""
        for request in self.waiting:
            if request.lora_request:
                yield request.lora_request

    def _fail(self, failure: Failure) -> None:
        """End the requests of a delta that cannot be read, with the reason."""
        failed = [
            request.request_id
            for request in self.requests.values()
            if request.lora_request
            and request.lora_request.lora_name == failure.digest
            and not request.is_finished()
        ]
        for request in self.finish_requests(failed, RequestStatus.FINISHED_ERROR):
            output = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                **compat.reason_of_failure(failure.error),
                events=request.take_events(),
                trace_headers=request.trace_headers,
            )
            self._failed.append((request.client_index, output))

    def update_from_output(
        self, *args: Any, **kwargs: Any
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(*args, **kwargs)
        if self._failed:
            for client, output in self._failed:
                outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
            self._failed.clear()
        return outputs


def start(core: Any) -> None:
    """Give an engine its deltas, before it makes its scheduler.

    Args:
        core: vLLM's EngineCore, with workers and KV cache; changed in place.
    """
    config = core.vllm_config
    if not is_dqrelo(config.model_config):
        return
    deltas = Deltas(core.model_executor, config.lora_config.max_loras)
    base = config.scheduler_config.get_scheduler_cls()
    compat.check_scheduler(base)
    config.scheduler_config.scheduler_cls = type(
        f"Delta{base.__name__}",
        (DeltaScheduler, base),
        {"deltas": deltas, "base_name": config.model_config.served_model_name},
    )
    compat.replace_lora_calls(core, deltas)
    memory = deltas.memory
    logger.info(
        "dqrelo: base %.2f GiB, KV cache %.2f GiB, arena %.2f GiB: %d deltas of ratio "
        "1/8 resident, at most %d of any size, %d in one step, rank %d in one layer; "
        "host tier %.2f GiB",
        memory.base / 2**30,
        core.available_gpu_memory_for_kv_cache / 2**30,
        memory.arena / 2**30,
        memory.arena // memory.typical,
        memory.slots,
        config.lora_config.max_loras,
        memory.rank,
        memory.host / 2**30,
    )
