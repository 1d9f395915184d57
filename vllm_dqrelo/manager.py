# SPDX-License-Identifier: Apache-2.0
"""A worker's deltas: registered in host memory, resident in the arena, in use.

vLLM's model runner talks to this class as it talks to its own LoRA manager
(vllm/lora/worker_manager.py); tests/test_contract.py compares the two.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest

from dqrelo_kernels import ops
from dqrelo_kernels.rows import BASE
from dqrelo_kernels.table import ABSENT, Field, empty_table, rebase
from vllm_dqrelo.arena import Arena, aligned
from vllm_dqrelo.format.checkpoint import Checkpoint, resolve
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.layers import install
from vllm_dqrelo.loaded import rearranged
from vllm_dqrelo.options import Options, refuse_unsupported
from vllm_dqrelo.packed import PackedDelta, pack
from vllm_dqrelo.sites import Site, Sites
from vllm_dqrelo.step import Step
from vllm_dqrelo.vocabulary import AddedRows

logger = init_logger(__name__)


class DeltaManager:
    """Registers, activates and evicts the deltas of one worker.

    A delta is *registered* when it was read, checked and packed into host memory;
    it stays so until it is removed. It is *resident* while it has a slot and an
    extent of the arena; the least recently used one makes room. Everything that
    can fail, fails at registration: a step only copies bytes.

    Args:
        vllm_config: of the engine.
        device: of the model.
    """

    is_enabled = True

    def __init__(self, vllm_config: VllmConfig, device: torch.device, *_: Any) -> None:
        refuse_unsupported(vllm_config, device)
        self.device = device
        self.options = Options.from_config(vllm_config)
        self.model_config = vllm_config.model_config
        self.slots = vllm_config.lora_config.max_loras
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.registered: dict[int, PackedDelta] = {}
        self.resident: OrderedDict[int, int] = OrderedDict()  # id -> slot, oldest first
        self._paths: dict[int, str] = {}
        self._fingerprint: str | None = None

    def create_lora_manager(
        self, model: torch.nn.Module, vllm_config: VllmConfig
    ) -> torch.nn.Module:
        """Put deltas behind every site of the loaded ``model``; returns it."""
        ops.prepare(self.device)
        self.sites = Sites(model, self._base(), self.options.added_tokens)
        self.sites.rearranged = rearranged(self.sites, self._base())
        self.added: dict[str, AddedRows] = {}
        size = self.options.arena_bytes(self.sites, self.slots)
        self.arena = Arena(size, self.device)
        # The tables of all sites, one behind another: a site's is contiguous.
        self.table = empty_table(1, self.slots * self.sites.count, self.device)[0]
        self.table_rows = torch.empty(self.slots, self.sites.count, dtype=torch.int64)
        self.ranks = self.options.scratch_ranks(self.sites)
        self.step = Step(self.max_tokens, self.slots, self.ranks, self.device)
        for site in self.sites.by_name.values():
            slices, start = len(site.sizes), self.slots * site.first
            rows = torch.arange(start, start + self.slots * slices)
            rows = rows.view(self.slots, slices)
            self.table_rows[:, site.first : site.first + slices] = rows
            table = self.table[start : start + rows.numel()]
            table = table.view(self.slots, slices, -1)
            if self.options.added_tokens and site.is_vocabulary:
                self.added[site.name] = self._added_rows(site)
            added = self.added.get(site.name)
            install(model, site, self.arena.data, table, self.step, added)
        logger.info(
            "dqrelo: %d sites, room for %.2f GiB of deltas, up to %d in one step",
            len(self.sites.by_name),
            size / 2**30,
            self.slots,
        )
        return model

    def _added_rows(self, site: Site) -> AddedRows:
        shape = (self.options.added_tokens, site.columns)
        dtype = site.module.get_parameter("weight").dtype
        return AddedRows(site.sizes[0], self.slots, shape, dtype, self.device)

    # Registration: called between steps, may refuse.

    def add_adapter(self, request: LoRARequest) -> bool:
        """Read, check and pack a delta; whether it was not registered before."""
        if self._is_registered(request) and not request.load_inplace:
            return False
        packed = self._load(request)
        self.remove_adapter(request.lora_int_id)
        self.registered[request.lora_int_id] = packed
        self._paths[request.lora_int_id] = request.lora_path
        logger.info(
            "dqrelo: delta %s registered, %.1f MB, %s",
            request.lora_name,
            packed.size / 1e6,
            packed.digest,
        )
        return True

    def _is_registered(self, request: LoRARequest) -> bool:
        return self._paths.get(request.lora_int_id) == request.lora_path

    def _load(self, request: LoRARequest) -> PackedDelta:
        # load_delta appends the digest of what it means to the path.
        folder, _, digest = request.lora_path.partition("#sha256:")
        try:
            delta = Delta(Path(folder))
        except FileNotFoundError as error:
            raise LoRAAdapterNotFoundError(
                request.lora_name, request.lora_path
            ) from error
        if digest and delta.config.digest != f"sha256:{digest}":
            raise DqreloError(f"{folder} was replaced while it was loaded; try again")
        base = self.model_config.model
        delta.config.check_base(self._base_fingerprint(), base, folder)
        packed = pack(delta, self.sites, pinned=self.device.type == "cuda")
        self._admit(request, packed)
        return packed

    def _admit(self, request: LoRARequest, packed: PackedDelta) -> None:
        """Refuse a delta that a later step could have no room for."""
        if (rank := max(self._site_ranks(packed))) > self.ranks:
            raise DqreloError(
                f"{request.lora_path} has rank {rank} in one layer, there is room for "
                f"{self.ranks}; convert it with a lower --ratio"
            )
        sizes = {i: other.size for i, other in self.registered.items()}
        sizes[request.lora_int_id] = packed.size
        largest = sorted(sizes.values(), reverse=True)[: self.slots]
        if (needed := sum(map(aligned, largest))) > self.arena.data.numel():
            option = {"dqrelo": {"delta_memory_gib": math.ceil(needed / 2**20) / 1024}}
            raise DqreloError(
                f"{request.lora_path} takes {packed.size:,} bytes; the {len(largest)} "
                f"largest deltas take {needed:,} together, and there is room for "
                f"{self.arena.data.numel():,}. Serve with a lower --max-loras, or with "
                f"--additional-config '{json.dumps(option)}'"
            )

    def _site_ranks(self, packed: PackedDelta) -> list[int]:
        """The largest sum of ranks that one row meets, in each site."""
        ranks = packed.entries[:, Field.RANK].clamp_min(0)
        sites = self.sites.by_name.values()
        parts = ranks.split([len(site.sizes) for site in sites])
        return [
            int(part.view(site.experts, -1).sum(1).max())
            for site, part in zip(sites, parts, strict=True)
        ]

    def _base_fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = self._base().fingerprint()
        return self._fingerprint

    def _base(self) -> Checkpoint:
        config = self.model_config
        return Checkpoint(resolve(config.model, config.revision))

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forget a delta; whether it was there."""
        if adapter_id in self.resident:
            self._evict(adapter_id)
        self._paths.pop(adapter_id, None)
        return self.registered.pop(adapter_id, None) is not None

    def remove_all_adapters(self) -> None:
        """Forget all deltas."""
        for adapter_id in list(self.registered):
            self.remove_adapter(adapter_id)

    def list_adapters(self) -> set[int]:
        """Ids of the registered deltas."""
        return set(self.registered)

    def pin_adapter(self, adapter_id: int) -> bool:
        """Not offered: every registered delta stays in host memory."""
        raise NotImplementedError("deltas cannot be pinned")

    # Activation: part of a step.

    def set_active_adapters(
        self, requests: set[LoRARequest], mapping: LoRAMapping | None
    ) -> None:
        """Make the deltas of a step resident and say which rows are theirs."""
        for request in requests:
            if not self._is_registered(request):
                self.add_adapter(request)
        wanted = [request.lora_int_id for request in requests]
        for adapter_id in wanted:
            if adapter_id in self.resident:
                self.resident.move_to_end(adapter_id)
        for adapter_id in wanted:
            if adapter_id not in self.resident:
                self._activate(adapter_id, keep=set(wanted))
        if mapping is not None:
            self.step.set(
                self._slots_of(mapping.index_mapping),
                self._slots_of(mapping.prompt_mapping),
            )

    def _slots_of(self, adapter_ids: tuple[int, ...]) -> np.ndarray:
        ids = np.asarray(adapter_ids, dtype=np.int64)
        slots = np.full(len(ids), BASE, dtype=np.int32)
        for adapter_id, slot in self.resident.items():
            slots[ids == adapter_id] = slot
        return slots

    def _activate(self, adapter_id: int, keep: set[int]) -> None:
        """Give a registered delta a slot and copy it into the arena."""
        packed = self.registered[adapter_id]
        evictable = [i for i in self.resident if i not in keep]
        while (
            len(self.resident) == self.slots
            or (offset := self.arena.allocate(adapter_id, packed.size)) is None
        ):
            if evictable:
                self._evict(evictable.pop(0))
            else:
                self._compact()
        extent = self.arena.data[offset : offset + packed.size]
        extent.copy_(packed.extent, non_blocking=True)
        slot = min(set(range(self.slots)) - set(self.resident.values()))
        self._write_table(slot, rebase(packed.entries, offset))
        for name, added in self.added.items():
            added.set(slot, packed.added.get(name))
        self.resident[adapter_id] = slot

    def _evict(self, adapter_id: int) -> None:
        nothing = torch.full_like(self.registered[adapter_id].entries, ABSENT)
        self._write_table(self.resident.pop(adapter_id), nothing)
        self.arena.free(adapter_id)

    def _compact(self) -> None:
        """Close the gaps; what has been admitted then fits."""
        for adapter_id, offset in self.arena.compact().items():
            entries = rebase(self.registered[adapter_id].entries, offset)
            self._write_table(self.resident[adapter_id], entries)

    def _write_table(self, slot: int, entries: torch.Tensor) -> None:
        """Say where the tensors of a slot lie, for all sites."""
        self.table[self.table_rows[slot].to(self.device)] = entries.to(self.device)

    # Warm-up: vLLM runs dummy batches with deltas that change nothing.

    @contextmanager
    def dummy_lora_cache(self) -> Iterator[None]:
        """Around the warm-up; nothing to prepare."""
        yield

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The rank of the deltas of the warm-up; they have none."""
        return default_rank

    def add_dummy_lora(self, request: LoRARequest, rank: int) -> bool:
        """Register a delta that changes nothing."""
        nothing = torch.zeros(0, dtype=torch.uint8)
        entries = empty_table(1, self.sites.count, "cpu")[0]
        self.registered[request.lora_int_id] = PackedDelta("", nothing, entries)
        self._paths[request.lora_int_id] = request.lora_path
        return True

    def supports_tower_connector_lora(self) -> bool:
        """Only language models are served."""
        return False


@contextmanager
def prompt_rows(manager: Any, hidden_states: torch.Tensor) -> Iterator[None]:
    """Let the LM head of ``manager``'s model find the rows of a prompt."""
    ours = isinstance(manager, DeltaManager)
    with manager.step.prompt_rows(hidden_states) if ours else nullcontext():
        yield
