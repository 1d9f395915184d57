# SPDX-License-Identifier: Apache-2.0
"""A worker's deltas: read from disk, in host memory, on the device, in a step.

vLLM's model runner calls this class as it calls its own LoRA manager
(vllm/lora/worker_manager.py); tests/test_plugin.py compares the two. The engine calls
it through ``calls.py``.
"""

from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import torch
from torch.distributed import ReduceOp, all_reduce
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import get_pp_group
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from dqrelo_kernels import ops
from dqrelo_kernels.rows import BASE
from dqrelo_kernels.table import Field, empty_table
from vllm_dqrelo.format.checkpoint import Checkpoint, resolve
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.need import Need
from vllm_dqrelo.messages.load import Loaded, Memory, Refused, Usage
from vllm_dqrelo.messages.request import split_path
from vllm_dqrelo.options import Options
from vllm_dqrelo.room import Room
from vllm_dqrelo.supported import refuse_unsupported, warn_untested
from vllm_dqrelo.worker import compat, limits
from vllm_dqrelo.worker.coverage import check_coverage
from vllm_dqrelo.worker.drafter import refuse_deltas
from vllm_dqrelo.worker.host import HostTier
from vllm_dqrelo.worker.layers import install
from vllm_dqrelo.worker.loader import Loader
from vllm_dqrelo.worker.order import unlike
from vllm_dqrelo.worker.packed import PackedDelta, pack
from vllm_dqrelo.worker.residency import Residency
from vllm_dqrelo.worker.runner import NEW_WEIGHTS, attach
from vllm_dqrelo.worker.sites import Sites
from vllm_dqrelo.worker.step import NO_ROWS, Step
from vllm_dqrelo.worker.tower import Tower

logger = init_logger(f"vllm.{__name__}")

SLACK = 2**20  # bytes that a delta's files may have besides tensors
MOST_OF_TOWER = 2  # times the bytes of the base's: float32 over 16 bits


class DeltaManager:
    """The deltas of one worker, by digest.

    Args:
        vllm_config: of the engine.
        device: of the model.
    """

    is_enabled = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device, *_: Any) -> None:
        refuse_unsupported(vllm_config, device)
        warn_untested(vllm_config)
        self.device = device
        self.options = Options.of(vllm_config.additional_config)
        self.model_config = vllm_config.model_config
        self.workers = vllm_config.parallel_config.world_size
        self.max_loras = vllm_config.lora_config.max_loras
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._dummies: set[str] = set()

    def create_lora_manager(
        self, model: torch.nn.Module, vllm_config: VllmConfig
    ) -> torch.nn.Module:
        """Add deltas to every site of the loaded ``model``, and return the model."""
        ops.prepare(self.device)
        stages = get_pp_group()
        self.sites = Sites(
            model,
            self.base,
            self.options.added_tokens,
            stages.world_size > 1,
            vllm_config.lora_config.fully_sharded_loras,
            self.base.tied_embedding,
        )
        self.unlike = unlike(self.sites, self.base, self.device)
        self.tower = None
        if vllm_config.lora_config.enable_tower_connector_lora:
            self.tower = Tower(self.sites, self.base, self.device)
        # A delta is in all stages, so that all are as large as the largest.
        typical = torch.tensor(limits.typical_bytes(self.sites))
        all_reduce(typical, ReduceOp.MAX, stages.cpu_group)
        arena = limits.arena_bytes(self.options, int(typical), self.max_loras)
        self.memory = Memory(
            base=self.base.nbytes(self.model_config.dtype.itemsize),
            arena=arena,
            host=limits.host_bytes(self.options, self.workers),
            typical=int(typical),
            slots=limits.most_resident(self.options, self.sites, arena, self.max_loras),
            rank=limits.most_ranks(self.options, self.sites),
        )
        self.host = HostTier(self.memory.host)
        self.residency = Residency(
            self.sites, arena, self.memory.slots, self.host, self.device
        )
        self.pinned: set[str] = set()
        self.loader = Loader(self.read)
        self.room = Room(
            self.memory.rank,
            arena,
            self.options.added_tokens,
            self.options.given,
        )
        merge_rows = limits.merge_rows(vllm_config, self.device, self.sites)
        self.step = Step(
            self.max_tokens,
            self.memory.slots,
            self.memory.rank,
            self.device,
            merge_rows,
            limits.whole_bytes(self.sites, merge_rows),
        )
        added = self.residency.added
        for name, site in self.sites.by_name.items():
            deltas = self.residency.deltas(site)
            install(model, site, deltas, self.step, added.get(name))
        if hasattr(model, "compute_logits"):
            # The base's rows do not have the added tokens.
            put = setattr if self.options.added_tokens else self.step.put
            put(
                model,
                "compute_logits",
                self.residency.vocabularies.mask(model, self.step),
            )
        return model

    def attach(self, runner: Any) -> None:
        """Let a runner tell this manager the rows of each step.

        Args:
            runner: of the model, with its KV cache. Mutated.

        Raises:
            ValueError: the code of the model passes a site by.
            RuntimeError: the drafter of the runner has layers with deltas.
        """
        if (draft_model := compat.draft_model_of(runner)) is not None:
            refuse_deltas(draft_model, self.step)
        attach(runner, self)
        check_coverage(runner, self.sites, self.residency)

    def start(self, runner: Any) -> Memory:
        """Begin to serve deltas.

        Args:
            runner: attached to this manager. Mutated: it runs the base's own code in
                steps of the base.

        Returns:
            The memory for deltas.
        """
        self._leave_base_alone(runner)
        return self.memory

    def _leave_base_alone(self, runner: Any) -> None:
        """Let steps without deltas run the base's own code, where that is possible."""
        step = self.step
        step.may_skip = True
        step.set(NO_ROWS)
        if runner.vllm_config.compilation_config.mode == CompilationMode.NONE:
            return
        step.may_skip = compat.compile_for_base(runner, lambda: step.skipping)
        step.set(NO_ROWS)

    # A step.

    def set_rows(
        self,
        requests: set[LoRARequest],
        adapter_ids: np.ndarray,
        tokens: np.ndarray | int = 1,
    ) -> None:
        """Make the deltas of a step resident and set the rows of each delta.

        ``engine/deltas.py`` made the LoRARequests: their names are digests, and every
        delta of the step is in memory.

        Args:
            requests: one LoRARequest for each delta of the step.
            adapter_ids: int [R], the adapter of each request of the step; 0 is the
                base.
            tokens: int [R], the tokens of each request in the step.

        Raises:
            RuntimeError: a row has an adapter that is not in ``requests``.
        """
        if self.step.is_base and not adapter_ids.any():
            return  # the step before had rows of the base alone, too
        slots = self.residency.use({request.lora_name for request in requests})
        by_id = {request.lora_int_id: slots[request.lora_name] for request in requests}
        self.step.set(_slots_of(adapter_ids, by_id), tokens)

    def encode_for(self, digest: str | None) -> None:
        """Encode images with the weights of one model from now on.

        Args:
            digest: of a delta in memory; None for the base.
        """
        assert self.tower is not None
        packed = None
        if digest is not None:
            resident = self.residency.resident.get(digest)
            packed = resident.packed if resident else self.host.get(digest)
        if packed is not None and packed.tower:
            self.tower.use(digest, packed.tower)
        else:
            self.tower.use(None, {})

    def set_active_adapters(
        self, requests: set[LoRARequest], mapping: LoRAMapping
    ) -> None:
        """Set the rows of a warm-up step, in which each token counts as a request."""
        self.set_rows(requests, np.asarray(mapping.index_mapping))

    # Calls of the engine, between steps (calls.py).

    def finish_load(self, keep: Collection[str]) -> tuple[Loaded | Refused, list[str]]:
        """Put the delta that was read into host memory.

        Args:
            keep: digests of deltas that must not make room for it.

        Returns:
            How the load ended, and the digests of deltas that are gone from memory.
        """
        loaded, packed = self.loader.take()
        if packed is None:
            return loaded, []
        self.host.put(packed)
        return loaded, self.host.trim(keep, self.residency.resident)

    def usage(self) -> Usage:
        """The memory that the deltas take now."""
        resident = self.residency.resident
        return Usage(
            frozenset(resident),
            sum(delta.size for delta in resident.values()),
            self.host.size,
            self.residency.evicted,
        )

    def forget(self, digest: str) -> None:
        """Free the memory of a delta."""
        self.pinned.discard(digest)
        self.host.drop(digest)
        self.residency.drop([digest])

    def read(self, request: LoRARequest, others: Mapping[str, int]) -> PackedDelta:
        """Read and check a delta and lay it out; runs in the loader's thread.

        Args:
            request: its path is the delta's folder.
            others: digest -> bytes of the ``--max-loras`` largest deltas that must fit
                the arena together with this delta.

        Raises:
            FileNotFoundError: there is no such folder.
            DqreloError: the delta cannot be served, or its digest is not the digest of
                the path.
        """
        path, digest = split_path(request.lora_path)
        folder = str(path)
        need = Need.of(path)
        self._expect(need.config, folder, digest)
        beside = [size for key, size in others.items() if key != need.config.digest]
        beside = sorted(beside, reverse=True)[: self.max_loras - 1]
        # Each worker has its part of the delta: at least this one.
        least, rank = need.size // self.workers, need.rank(self._layer)
        sizes = [need.size, *beside]
        self.room.check(folder, rank, need.added_tokens, sizes, least)
        # What a delta takes in the arena is about as much as it has on disk; the rows
        # of added tokens are elsewhere.
        added = sum(rows.rows[0].nbytes for rows in self.residency.added.values())
        most = int(1.05 * self.workers * self.memory.arena) + added + SLACK
        if self.tower is not None:
            most += MOST_OF_TOWER * self.tower.nbytes * self.workers
        delta = Delta(path, most)
        self._expect(delta.config, folder, digest)
        packed = pack(delta, self.sites, self.device, self.unlike, self.tower)
        delta.check_unchanged()  # the digest is of what was packed
        entries = packed.entries
        rank = max(  # that one row meets
            int((entries[:, Field.FIRST_A] + entries[:, Field.RANK_A]).max()),
            int((entries[:, Field.FIRST_B] + entries[:, Field.RANK_B]).max()),
        )
        sizes = [packed.size, *beside]
        self.room.check(folder, rank, delta.added_tokens, sizes)
        return packed

    def _expect(self, config: DeltaConfig, folder: str, digest: str | None) -> None:
        """Refuse a delta of another base, or another than was asked for."""
        if digest and config.digest != digest:
            raise DqreloError(
                f"{folder} was replaced: it holds {config.digest}, {digest} was asked "
                "for. Load the delta again"
            )
        config.check_base(self._fingerprint, self.model_config.model, folder)

    def _layer(self, parameter: str) -> Hashable | None:
        """The layer whose scratch has the ranks of a matrix; None in other stages."""
        for place in self.sites.places(parameter)[:1]:
            return place.site.name, place.index // len(place.site.of_a_row)
        return None

    @cached_property
    def base(self) -> Checkpoint:
        """The base on disk."""
        return Checkpoint(resolve(self.model_config.model, self.model_config.revision))

    @cached_property
    def _fingerprint(self) -> str:
        return self.base.fingerprint()

    # Warm-up: vLLM runs dummy batches with deltas that change nothing.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Around the warm-up; nothing to prepare."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The rank of the deltas of the warm-up; they have none."""
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Add a delta that changes nothing."""
        nothing = torch.zeros(0, dtype=torch.uint8)
        entries = empty_table(1, self.sites.count, "cpu")[0]
        self.host.put(PackedDelta(request.lora_name, nothing, entries))
        self._dummies.add(request.lora_name)
        return True

    def remove_all_adapters(self) -> None:
        """End a warm-up.

        Raises:
            RuntimeError: it is not a warm-up: the base has new weights.
        """
        if self._dummies:
            for digest in self._dummies:
                self.forget(digest)
            self._dummies.clear()
            self.step.set(NO_ROWS)  # a dummy's rows would be of no delta
        elif self.host.packed or self.residency.resident:
            raise RuntimeError(NEW_WEIGHTS)

    # Questions that an engine with plain LoRA asks; an engine with deltas knows.

    def add_adapter(self, request: LoRARequest) -> bool:
        """Not used: the engine answers, see ``engine/deltas.py``."""
        _ask_the_engine()

    def remove_adapter(self, adapter_id: int) -> bool:
        """Not used: the engine answers, see ``engine/deltas.py``."""
        _ask_the_engine()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Not used: the engine answers, see ``engine/deltas.py``."""
        _ask_the_engine()

    def list_adapters(self) -> set[int]:
        """Not used: the engine answers, see ``engine/deltas.py``."""
        _ask_the_engine()

    def supports_tower_connector_lora(self) -> bool:
        """Whether rows of an encoder have adapters: never, see ``tower.py``."""
        return False


def _slots_of(adapter_ids: np.ndarray, by_id: dict[int, int]) -> np.ndarray:
    slots = np.full(len(adapter_ids), BASE, dtype=np.int32)
    known = adapter_ids <= 0
    for adapter_id, slot in by_id.items():
        mine = adapter_ids == adapter_id
        slots[mine] = slot
        known |= mine
    if not known.all():
        raise RuntimeError("a step has rows of a delta that is not among its requests")
    return slots


def _ask_the_engine() -> NoReturn:
    raise RuntimeError("deltas are added and removed through the engine")
