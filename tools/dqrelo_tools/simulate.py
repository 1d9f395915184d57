# SPDX-License-Identifier: Apache-2.0
"""A fleet of GPUs and the requests to it, as a simulation of caches.

Each GPU is a replica: the base, a KV cache, and as many deltas as fit. The replica
evicts the least recently used delta. Host memory holds deltas in the same way, and the
disk holds all of them. A router keeps the requests for a delta on the replica that has
the delta, or sends each request to any replica. Full copies are simulated as deltas of
a base of 0 bytes.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
from tqdm import tqdm

from dqrelo_kernels.table import aligned
from dqrelo_tools.popularity import Popularity
from vllm_dqrelo.format.errors import DqreloError

# Half of them warm up: under zipf:1 that asks 50 / ln N times for the rarest model.
LEAST_REQUESTS, REQUESTS_PER_MODEL = 100_000, 100


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The replicas and their load. Sizes in bytes, rates in bytes or requests/s.

    Attributes:
        base: the base's weights, on each GPU.
        delta: one delta's bytes.
        models: fine-tunes to be served.
        gpus: replicas, each of them one GPU.
        gpu_memory: of one GPU.
        gpu_memory_utilization: the fraction that vLLM takes.
        kv: of one replica, for KV cache and activations.
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
    """The requests, the same in every simulation.

    Attributes:
        popularity: the share of each model.
        requests: their number; the first half warms up the caches.
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
