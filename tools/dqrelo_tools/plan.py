# SPDX-License-Identifier: Apache-2.0
"""How many GPUs a fleet of fine-tunes needs: a simulation of its caches.

Each GPU is a replica: the base, a KV cache, and as many deltas as fit, the least
recently used one making room. Host memory holds deltas in the same way, and the disk
holds all of them. A router either keeps the requests for a delta on the replica that
has it, or sends each request anywhere. Full copies are simulated like deltas on a
base of no bytes.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from dqrelo_kernels.table import aligned
from dqrelo_tools.popularity import Popularity
from vllm_dqrelo.format.errors import DqreloError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOUR = 3600
MAX_LORAS = 8  # the server's default
# Half of them warm up: under zipf:1 that asks 50 / ln N times for the rarest model.
LEAST_REQUESTS, REQUESTS_PER_MODEL = 100_000, 100
POINTS = 12  # of the figure
ASSUMED = """\
Assumed: one replica a GPU, and one size for all deltas. Requests take no time: none
waits for another, and none keeps its delta from being evicted. The least recently used
delta makes room, on the device for host memory, and there for good; replicas do not
share host memory. Nobody asks for the base. With affinity a request goes to the replica
that has its delta on the device or in host memory, however busy that is; else to the
one with the fewest on its device, among equals the one that had the fewest requests.
Full copies: as many to a GPU as fit beside one KV cache of the same size, swapped as
deltas are."""


@dataclass(frozen=True)
class Fleet:
    """What is given. Sizes are in bytes, rates in bytes or requests per second.

    Attributes:
        base: the base's weights, on each GPU.
        delta: one delta's bytes.
        models: fine-tunes to be served.
        gpus: replicas, each of them one GPU.
        gpu_memory: of one GPU.
        gpu_memory_utilization: the fraction that vLLM takes.
        kv: what one replica keeps for KV cache and activations.
        host: host memory for the deltas of one replica.
        disk, link: speed from disk to host memory, and from there to the device.
        rate: requests to the whole fleet.
        hit_rate: the share of requests that ought to find their delta on the device.
    """

    base: int
    delta: int
    models: int
    gpus: int
    gpu_memory: int
    gpu_memory_utilization: float
    kv: int
    host: int
    disk: int
    link: int
    rate: float
    hit_rate: float

    @property
    def room(self) -> int:
        """Bytes for deltas on one GPU; negative when not even the base fits."""
        return int(self.gpu_memory * self.gpu_memory_utilization) - self.base - self.kv

    @property
    def resident(self) -> int:
        """Deltas that one GPU holds."""
        return min(self.room // aligned(self.delta), self.models)

    @property
    def in_memory(self) -> int:
        """Deltas that one replica holds on its GPU or in host memory."""
        return min(self.resident + self.host // self.delta, self.models)

    def full_copies(self) -> "Fleet":
        """The same models as whole ones: deltas of the base's size on nothing."""
        return replace(self, base=0, delta=self.base)

    def check(self) -> None:
        """Refuse a fleet that cannot serve one delta.

        Raises:
            DqreloError: says what does not fit.
        """
        if not 0 <= self.rate < math.inf:
            raise DqreloError(f"--rate {self.rate:g}: requests per second, 0 or more")
        if self.room < aligned(self.delta):
            raise DqreloError(
                f"one GPU gives {self.gpu_memory * self.gpu_memory_utilization:,.0f} "
                f"bytes; the base ({self.base:,}), --kv ({self.kv:,}) and one delta "
                f"({self.delta:,}) do not fit together. Plan with a larger "
                "--gpu-memory or a smaller --kv"
            )


@dataclass(frozen=True)
class Traffic:
    """The requests, the same for every question that is asked of them.

    Attributes:
        popularity: whom they are for.
        requests: how many are simulated; the first half warms the caches up.
        seed: of the draws.
    """

    popularity: Popularity
    requests: int
    seed: int = 0

    @classmethod
    def of(cls, popularity: Popularity, models: int, seed: int) -> "Traffic":
        """As many requests as the answer needs: a trace is played twice."""
        drawn = max(LEAST_REQUESTS, REQUESTS_PER_MODEL * models)
        return cls(popularity, 2 * len(popularity.trace) or drawn, seed)


class Replica:
    """What one replica has on the device, and in memory of either kind, oldest first.

    The server's host memory has what the device evicts, and drops first what the
    device has, too: together they are the most recently used ones.
    """

    def __init__(self, resident: int, in_memory: int) -> None:
        self.tiers = [(OrderedDict[int, None](), n) for n in (resident, in_memory)]

    def __contains__(self, model: int) -> bool:
        return model in self.tiers[1][0]

    def __len__(self) -> int:
        return len(self.tiers[0][0])

    def use(self, model: int) -> int:
        """Serve a request: 0 if on the device, 1 in host memory, 2 neither."""
        found = 2
        for level, (held, capacity) in reversed(list(enumerate(self.tiers))):
            if model in held:
                held.move_to_end(model)
                found = level
            else:
                held[model] = None
                if len(held) > capacity:
                    held.popitem(last=False)
        return found


@dataclass(frozen=True)
class Outcome:
    """Where requests found their delta, as shares of them.

    Attributes:
        device: on the device.
        host: in host memory; it was copied.
        disk: only on disk: a cold start.
        busiest: of all requests, those that the busiest replica had.
    """

    device: float
    host: float
    disk: float
    busiest: float


def simulate(
    fleet: Fleet, traffic: Traffic, affinity: bool, progress: tqdm | None = None
) -> Outcome:
    """Play the traffic on the fleet; the second half of it counts."""
    rng = np.random.default_rng(traffic.seed)
    models = traffic.popularity.draw(fleet.models, traffic.requests, rng).tolist()
    anywhere = rng.integers(fleet.gpus, size=traffic.requests).tolist()
    replicas = [Replica(fleet.resident, fleet.in_memory) for _ in range(fleet.gpus)]
    served = [0] * fleet.gpus
    homes: dict[int, int] = {}
    counts, warm = [0, 0, 0], traffic.requests // 2
    for i, model in enumerate(models):
        chosen = homes.get(model, 0) if affinity else anywhere[i]
        if affinity and model not in replicas[chosen]:
            loads = [(len(r), n) for r, n in zip(replicas, served, strict=True)]
            chosen = homes[model] = loads.index(min(loads))
        found = replicas[chosen].use(model)
        served[chosen] += 1
        counts[found] += i >= warm
    if progress is not None:
        progress.update(traffic.requests)
    counted = traffic.requests - warm
    device, host, disk = (n / counted for n in counts)
    return Outcome(device, host, disk, max(served) / traffic.requests)


def gpus_needed(fleet: Fleet, traffic: Traffic, progress: tqdm | None = None) -> int:
    """The fewest GPUs on which, with affinity, ``fleet.hit_rate`` is reached."""
    low, high = 1, math.ceil(fleet.models / fleet.resident)  # there, all are resident
    while low < high:
        middle = (low + high) // 2
        tried = replace(fleet, gpus=middle)
        if simulate(tried, traffic, True, progress).device >= fleet.hit_rate:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True)
class Case:
    """One way to serve the models, and what comes of it."""

    name: str
    fleet: Fleet
    affinity: bool
    outcome: Outcome
    needed: int | None  # GPUs for the hit rate; None when no number of them helps

    def numbers(self) -> dict[str, Any]:
        """What is printed of it."""
        fleet, outcome = self.fleet, self.outcome
        copy_s = fleet.delta / fleet.link
        cold = fleet.rate * HOUR * outcome.disk
        copied = fleet.rate * HOUR * outcome.host
        return {
            "resident_per_gpu": fleet.resident,
            **asdict(outcome),
            "copies_per_hour": copied,
            "seconds_per_copy": copy_s,
            "cold_starts_per_hour": cold,
            "seconds_per_cold_start": fleet.delta / fleet.disk + copy_s,
            "seconds_waited_per_hour": (copied + cold) * copy_s
            + cold * fleet.delta / fleet.disk,
            "gpus_for_hit_rate": self.needed,
            "gpus_for_all": None
            if self.needed is None
            else math.ceil(fleet.models / fleet.resident),
        }


@dataclass(frozen=True)
class Plan:
    """The answers; ``cases``: deltas, deltas without affinity, full copies."""

    fleet: Fleet
    traffic: Traffic
    cases: list[Case]

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "fleet": asdict(self.fleet),
            "popularity": self.traffic.popularity.text,
            "requests": self.traffic.requests,
            "seed": self.traffic.seed,
            "cases": {case.name: case.numbers() for case in self.cases},
            "options": self.options(),
            "assumed": ASSUMED,
        }

    def options(self) -> str:
        """What gives a server the memory that the plan counts on."""
        fleet = self.fleet
        arena = fleet.resident * aligned(fleet.delta)
        config = {
            f"{name}_memory_gib": math.ceil(size / 2**20) / 1024
            for name, size in (("delta", arena), ("host", fleet.host))
        }
        text = json.dumps({"dqrelo": config})
        # Any --max-loras deltas must fit at once.
        most = min(fleet.resident, MAX_LORAS)
        return f"--max-loras {most} --additional-config '{text}'"

    def to_text(self) -> str:
        """For people."""
        fleet, traffic = self.fleet, self.traffic
        gb = {name: f"{value / 1e9:.4g} GB" for name, value in asdict(fleet).items()}
        numbers = [case.numbers() for case in self.cases]
        table = [row("", [case.name for case in self.cases])]
        for key, (label, form) in ROWS.items():
            cells = ["-" if n[key] is None else form.format(n[key]) for n in numbers]
            table.append(row(label, cells))
        return f"""\
Models: {fleet.models}, each a delta of {gb["delta"]} on a base of {gb["base"]}
Requests: {traffic.popularity.text}, {fleet.rate:g} per second
GPUs: {fleet.gpus} of {gb["gpu_memory"]}, {fleet.gpu_memory_utilization:.0%} of it for \
vLLM; {gb["kv"]} of that for KV cache and activations
Host memory: {gb["host"]} a GPU, read from disk at {gb["disk"]}/s, copied at \
{gb["link"]}/s

{chr(10).join(table)}

The hit rate aimed at: {fleet.hit_rate:.1%} of requests find their delta on the device.
Serve each replica with {self.options()}
Simulated: {traffic.requests:,} requests, half of them to warm up, seed {traffic.seed}.
{ASSUMED}"""


ROWS = {
    "resident_per_gpu": ("resident on each GPU", "{}"),
    "device": ("found on the device", "{:.1%}"),
    "host": ("found in host memory", "{:.1%}"),
    "disk": ("cold starts, share", "{:.2%}"),
    "busiest": ("the busiest GPU's requests", "{:.1%}"),
    "copies_per_hour": ("copies host -> device, per hour", "{:,.0f}"),
    "seconds_per_copy": ("seconds of each", "{:.3f}"),
    "cold_starts_per_hour": ("cold starts per hour", "{:,.0f}"),
    "seconds_per_cold_start": ("seconds of each", "{:.2f}"),
    "seconds_waited_per_hour": ("seconds of both, per hour", "{:,.0f}"),
    "gpus_for_hit_rate": ("GPUs for the hit rate", "{}"),
    "gpus_for_all": ("GPUs that hold all models", "{}"),
}


def row(label: str, cells: Iterable[str]) -> str:
    """One line of the table."""
    return f"{label:<34}" + "".join(f"{cell:>16}" for cell in cells)


def plan(fleet: Fleet, traffic: Traffic) -> Plan:
    """Simulate the fleet with deltas and with full copies.

    Raises:
        DqreloError: not even one delta fits.
    """
    fleet.check()
    full, cases = fleet.full_copies(), []
    with simulation() as progress:
        for name, given, affinity in (
            ("deltas", fleet, True),
            ("random routing", fleet, False),
            ("full copies", full, True),
        ):
            outcome = simulate(given, traffic, affinity, progress)
            # Sent anywhere, requests find no more on many GPUs than on one.
            count = gpus_needed(given, traffic, progress) if affinity else None
            cases.append(Case(name, given, affinity, outcome, count))
    return Plan(fleet, traffic, cases)


def simulation() -> tqdm:
    """A progress bar that appears when it takes longer than two seconds."""
    return tqdm(
        desc="simulate", unit=" requests", unit_scale=True, delay=2, disable=None
    )


def figure(found: Plan) -> "Figure":
    """Hit rate against the number of models, one line for each case."""
    from matplotlib.figure import Figure

    most = found.fleet.models
    counts = np.unique(np.geomspace(1, most, POINTS).round().astype(int)).tolist()
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    with simulation() as progress:
        for case, marker in zip(found.cases, "osD", strict=True):
            rates = []
            for count in counts:
                fewer = replace(case.fleet, models=count)
                outcome = simulate(fewer, found.traffic, case.affinity, progress)
                rates.append(outcome.device)
            axes.plot(counts, rates, marker=marker, label=case.name)
    axes.axhline(found.fleet.hit_rate, color="gray", linestyle=":")
    axes.set(xlabel="models", ylabel="requests that find their delta on the device")
    axes.set(xscale="log", ylim=(0, 1.05))
    axes.set_title(f"{found.fleet.gpus} GPUs, {found.traffic.popularity.text}")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn
