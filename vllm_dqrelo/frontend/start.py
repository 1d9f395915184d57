# SPDX-License-Identifier: Apache-2.0
"""Before a server starts: room for its deltas, or the reason why they do not fit.

The headers of a delta's files say what the delta takes. The shapes of the base say what
a server has by default. So a delta that does not fit is refused before the base is
loaded.
"""

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from dqrelo_kernels.table import aligned
from vllm_dqrelo.format.checkpoint import BESIDE, EMBEDDINGS, Checkpoint, resolve
from vllm_dqrelo.format.config import CONFIG_NAME, DEFAULT_RATIO
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.need import Need, gib, layer_of, option
from vllm_dqrelo.frontend.catalogue import Catalogue
from vllm_dqrelo.host_memory import available
from vllm_dqrelo.options import Options, is_dqrelo, max_deltas
from vllm_dqrelo.room import Room, slice_bytes, typical_rank

logger = init_logger(f"vllm.{__name__}")

CATALOGUE_SECONDS = 10.0  # to look at the deltas that may be loaded later
SHOWN = 3  # names in a message


def make_room(arguments: argparse.Namespace) -> None:
    """Give a server the options that its deltas need, before it starts.

    The user's own ``--additional-config`` stays. Deltas of ``--lora-modules``
    must fit; a delta of the catalogue that does not fit is named in the log.

    Args:
        arguments: of ``vllm serve``, as vLLM has parsed them. Mutated:
            ``additional_config``, ``enable_tower_connector_lora``, and "~" in
            ``lora_modules``.

    Raises:
        DqreloError: a delta is not one of the base, or does not fit the user's options
            or the machine. FileNotFoundError: the base or a delta is missing.
            ValueError: an option cannot be used.
    """
    if not is_dqrelo(arguments):
        return
    config = arguments.additional_config or {}
    Options.of(config)  # refuses what cannot be used
    own = dict(config.get("dqrelo", {}))
    modules = arguments.lora_modules or []
    model = getattr(arguments, "model_tag", None) or arguments.model
    served = arguments.served_model_name or [model]
    check_names([module.name for module in modules], served)
    catalogue = Catalogue.from_environment()
    if not modules and not catalogue.folders:
        return
    base = Checkpoint(resolve(model, arguments.revision))
    fingerprint = base.fingerprint()
    needs: dict[str, Need] = {}
    for module in modules:
        module.path = str(Path(module.path).expanduser())
        needs[module.name] = Need.of(Path(module.path))
        needs[module.name].config.check_base(fingerprint, model, module.path)
    later = needs_of(catalogue, fingerprint, model)
    max_loras = max_deltas(arguments.max_loras)
    default = default_room(base, max_loras)
    if "delta_memory_gib" not in own:
        check_machine(needs, later, default, base, max_loras)
    computed = options_for([*needs.values(), *later.values()], default, max_loras)
    options: dict[str, Any] = computed | own
    room = Room(
        options.get("max_rank", default.rank),
        int(options.get("delta_memory_gib", default.arena / 2**30) * 2**30),
        options.get("added_tokens", 0),
        own,
    )
    check_given(needs, room, max_loras)
    name_those_without_room(later, room)
    if options != own:
        logger.info(
            "dqrelo: the deltas take more than the default: %s", option(options)
        )
        arguments.additional_config = {**config, "dqrelo": options}
    encodes = any(need.encodes for need in (*needs.values(), *later.values()))
    if encodes and not arguments.enable_tower_connector_lora:
        logger.info(
            "dqrelo: deltas change what encodes images: --enable-tower-connector-lora"
        )
        arguments.enable_tower_connector_lora = True


def check_names(names: Sequence[str], served: Sequence[str]) -> None:
    """Refuse two models of one name."""
    for name, count in Counter(names).items():
        if not name:
            raise DqreloError("a delta has an empty name; expected NAME=DELTA")
        if count > 1:
            raise DqreloError(f"{count} deltas are called {name}; rename one")
        if name in served:
            raise DqreloError(
                f"a delta is called {name}, and so is the base; rename the delta, or "
                "give the base another --served-model-name"
            )


def needs_of(catalogue: Catalogue, fingerprint: str, base: str) -> dict[str, Need]:
    """What the deltas of a catalogue take; those that cannot be served are left out."""
    found: dict[str, Need] = {}
    broken: dict[str, Exception] = {}
    end = time.monotonic() + CATALOGUE_SECONDS
    folders = [path for folder in catalogue.folders for path in folder.iterdir()]
    names = sorted({path.name for path in folders if (path / CONFIG_NAME).is_file()})
    for done, name in enumerate(names):
        if time.monotonic() > end:
            logger.warning(
                "dqrelo: %d deltas of the catalogue were looked at in %.0f s, and %d "
                "were not: one that takes more than the server has will be refused",
                *(done, CATALOGUE_SECONDS, len(names) - done),
            )
            break
        try:
            need = Need.of(catalogue.find(name))
            need.config.check_base(fingerprint, base, name)
        except (DqreloError, OSError) as error:
            broken[name] = error
        else:
            found[name] = need
    if broken:
        logger.warning(
            "dqrelo: %s of the catalogue cannot be served: %s",
            *(some(broken), next(iter(broken.values()))),
        )
    return found


def default_room(base: Checkpoint, max_loras: int) -> Room:
    """What a server of ``base`` with one worker has for deltas without an option."""
    layers: defaultdict[tuple[str, int], list[int]] = defaultdict(list)
    size = 0
    for name in base:
        shape = base.spec(name)[1]
        if not name.endswith(".weight") or not shape or BESIDE.search(name):
            continue
        *experts, n, k = shape if len(shape) > 1 else (*shape, 0)
        # A tied LM head is a place of its own.
        places = 2 if base.tied and name.endswith(EMBEDDINGS) else 1
        size += places * prod(experts) * slice_bytes(DEFAULT_RATIO, n, k, (n, k))
        if k:
            layers[layer_of(name), k].append(n)
    rank = max((typical_rank(n, k) for (_, k), n in layers.items()), default=1)
    return Room(rank, max_loras * size, 0, {})


def options_for(
    needs: Iterable[Need], default: Room, max_loras: int
) -> dict[str, int | float]:
    """The options that make room for what the default has not."""
    needs = list(needs)
    options: dict[str, int | float] = {}
    rank = max((need.rank() for need in needs), default=0)
    added = max((need.added_tokens for need in needs), default=0)
    memory = together(needs, max_loras)
    if rank > default.rank:
        options["max_rank"] = rank
    if added:
        options["added_tokens"] = added
    if memory > default.arena:
        options["delta_memory_gib"] = gib(memory)
    return options


def largest(needs: Iterable[Need], max_loras: int) -> list[int]:
    """Bytes of the largest deltas that one step can have."""
    return sorted((need.size for need in needs), reverse=True)[:max_loras]


def together(needs: Iterable[Need], max_loras: int) -> int:
    """Bytes of the arena that they take."""
    return sum(map(aligned, largest(needs, max_loras)))


def check_machine(
    needs: Mapping[str, Need],
    later: dict[str, Need],
    default: Room,
    base: Checkpoint,
    max_loras: int,
) -> None:
    """Refuse deltas that take more memory than the base leaves, on the CPU.

    Args:
        needs: of deltas that are given.
        later: of the catalogue's. Mutated: those without room are left out.
    """
    if not current_platform.is_cpu():
        return
    free = available() - base.nbytes(2)
    room = max(free, default.arena)
    left_out = []
    while later and together([*needs.values(), *later.values()], max_loras) > room:
        left_out.append(max(later, key=lambda name: later[name].size))
        del later[left_out[-1]]
    if left_out:
        logger.warning(
            "dqrelo: %s of the catalogue will be refused: the %d largest deltas take "
            "more memory than the base leaves. Serve with a lower --max-loras",
            *(some(left_out), max_loras),
        )
    if (needed := together(needs.values(), max_loras)) <= room:
        return
    fitting = [n for n in range(1, max_loras) if together(needs.values(), n) <= room]
    way_out = "Convert them with a lower --ratio"
    if fitting[1:]:  # 1 means the default to vLLM
        way_out = (
            f"Serve with --max-loras {fitting[-1]}, or convert with a lower --ratio"
        )
    raise DqreloError(
        f"the {min(len(needs), max_loras)} largest deltas take {needed:,} bytes "
        f"together, and the base leaves {max(free, 0):,}. {way_out}"
    )


def check_given(needs: Mapping[str, Need], room: Room, max_loras: int) -> None:
    """Refuse deltas that do not fit what the user gave, all of them at once."""
    if not needs:
        return
    ranks = {name: need.rank() for name, need in needs.items()}
    unfit = [
        name
        for name, need in needs.items()
        if ranks[name] > room.rank or need.added_tokens > room.added_tokens
    ]
    room.check(
        some(unfit or sorted(needs, key=lambda name: -needs[name].size)),
        max(ranks.values()),
        max(need.added_tokens for need in needs.values()),
        largest(needs.values(), max_loras),
    )


def name_those_without_room(later: Mapping[str, Need], room: Room) -> None:
    """Say which deltas of the catalogue do not fit what the user gave."""
    unfit = {
        name: need
        for name, need in later.items()
        if need.rank() > room.rank
        or need.added_tokens > room.added_tokens
        or need.size > room.arena
    }
    if unfit:
        options = dict(room.given) | options_for(unfit.values(), room, 1)
        logger.warning(
            "dqrelo: %s of the catalogue will be refused: start the server with %s",
            *(some(unfit), option(options)),
        )


def some(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
