# SPDX-License-Identifier: Apache-2.0
"""How many GPUs a fleet of fine-tunes needs: what ``dqrelo plan`` answers."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from dqrelo_kernels.table import aligned
from dqrelo_tools.simulate import Fleet, Outcome, Traffic, gpus_needed, simulate
from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.need import DEFAULT_MAX_DELTAS, gib, option

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOUR = 3600
POINTS = 12  # of the figure
ASSUMED = """\
Assumed: one replica a GPU, and one size for all deltas. Requests take no time: a
request does not wait for another, and does not keep its delta from being evicted. The
device evicts the least recently used delta to host memory, which drops the least
recently used one. Replicas do not share host memory. Nobody asks for the base. With
affinity a request goes to the replica that has its delta on the device or in host
memory, however busy that replica is. Without such a replica, the request goes to the
replica with the fewest deltas on its device, and of several to the one that had the
fewest requests. Full copies: a GPU holds as many as fit next to one KV cache of the
same size, and swaps them as it swaps deltas."""


@dataclass(frozen=True)
class Case:
    """One way to serve the models, and the simulation of it.

    Attributes:
        name: of the column in the table.
        fleet: with full copies, a fleet of them.
        affinity: whether requests for a model go to the replica that has it.
        outcome: where requests found their delta.
        needed: GPUs for the hit rate; None where more GPUs do not raise it.
    """

    name: str
    fleet: Fleet
    affinity: bool
    outcome: Outcome
    needed: int | None

    @property
    def copies(self) -> float:
        """Copies from host memory to the device, per hour."""
        return self.fleet.rate * HOUR * self.outcome.host

    @property
    def cold_starts(self) -> float:
        """Reads from disk and copies to the device, per hour."""
        return self.fleet.rate * HOUR * self.outcome.disk

    @property
    def copy_s(self) -> float:
        """Seconds of one copy."""
        return self.fleet.delta / self.fleet.link

    @property
    def cold_start_s(self) -> float:
        """Seconds of one cold start."""
        return self.fleet.delta / self.fleet.disk + self.copy_s

    @property
    def waited_s(self) -> float:
        """Seconds of all copies and cold starts of an hour."""
        return self.copies * self.copy_s + self.cold_starts * self.cold_start_s

    @property
    def needed_for_all(self) -> int | None:
        """GPUs that hold all models; None where more GPUs do not help."""
        if self.needed is None:
            return None
        return math.ceil(self.fleet.models / self.fleet.resident)

    def numbers(self) -> dict[str, float | None]:
        """The number of each row, by its key."""
        return {row.key: row.number(self) for row in ROWS}


class Row(NamedTuple):
    """One row of the table.

    Attributes:
        key: in the JSON.
        label: in the text.
        form: of the number in the text, as ``str.format`` takes it.
        number: of a case; None is "-" in the text.
    """

    key: str
    label: str
    form: str
    number: Callable[[Case], float | None]

    def cells(self, cases: list[Case]) -> list[str]:
        """The label and the number of each case, as text."""
        numbers = map(self.number, cases)
        return [
            self.label,
            *("-" if n is None else self.form.format(n) for n in numbers),
        ]


ROWS = (
    Row("resident_per_gpu", "resident on each GPU", "{}", lambda c: c.fleet.resident),
    Row("device", "found on the device", "{:.1%}", lambda c: c.outcome.device),
    Row("host", "found in host memory", "{:.1%}", lambda c: c.outcome.host),
    Row("disk", "cold starts, share", "{:.2%}", lambda c: c.outcome.disk),
    Row("busiest", "the busiest GPU's requests", "{:.1%}", lambda c: c.outcome.busiest),
    Row(
        "copies_per_hour",
        "copies host -> device, per hour",
        "{:,.0f}",
        lambda c: c.copies,
    ),
    Row("seconds_per_copy", "seconds of each", "{:.3f}", lambda c: c.copy_s),
    Row(
        "cold_starts_per_hour",
        "cold starts per hour",
        "{:,.0f}",
        lambda c: c.cold_starts,
    ),
    Row(
        "seconds_per_cold_start", "seconds of each", "{:.2f}", lambda c: c.cold_start_s
    ),
    Row(
        "seconds_waited_per_hour",
        "seconds of both, per hour",
        "{:,.0f}",
        lambda c: c.waited_s,
    ),
    Row("gpus_for_hit_rate", "GPUs for the hit rate", "{}", lambda c: c.needed),
    Row("gpus_for_all", "GPUs that hold all models", "{}", lambda c: c.needed_for_all),
)


@dataclass(frozen=True)
class Plan:
    """The answers; ``cases``: deltas, deltas without affinity, full copies."""

    fleet: Fleet
    traffic: Traffic
    cases: list[Case]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
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
        memory = {"delta_memory_gib": gib(arena), "host_memory_gib": gib(fleet.host)}
        # Any --max-loras deltas must fit at once.
        most = min(fleet.resident, DEFAULT_MAX_DELTAS)
        return f"--max-loras {most} {option(memory)}"

    def to_text(self) -> str:
        """The text for people."""
        fleet, traffic = self.fleet, self.traffic
        gb = {name: f"{value / 1e9:.4g} GB" for name, value in asdict(fleet).items()}
        titles = ["", *(case.name for case in self.cases)]
        table = text_table([titles, *(row.cells(self.cases) for row in ROWS)])
        return f"""\
Models: {fleet.models}, each a delta of {gb["delta"]} on a base of {gb["base"]}
Requests: {traffic.popularity.text}, {fleet.rate:g} per second
GPUs: {fleet.gpus} of {gb["gpu_memory"]}, {fleet.gpu_memory_utilization:.0%} of it for \
vLLM; {gb["kv"]} of that for KV cache and activations
Host memory: {gb["host"]} a GPU, read from disk at {gb["disk"]}/s, copied at \
{gb["link"]}/s

{table}

The hit rate aimed at: {fleet.hit_rate:.1%} of requests find their delta on the device.
Serve each replica with {self.options()}
Simulated: {traffic.requests:,} requests, half of them to warm up, seed {traffic.seed}.
{ASSUMED}"""


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
