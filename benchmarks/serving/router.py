# SPDX-License-Identifier: Apache-2.0
"""Where requests find their delta, on two replicas behind a router (docs/scaling.md).

    pip install vllm-router==0.1.17
    python -m benchmarks.serving.router [--output-dir benchmarks/results]

Eight deltas of SmolLM2-135M, and room for three of them in each replica. Requests are
drawn from ``zipf:1`` and sent one after another, so that a replica copies a delta into
its arena for the one that it answers or not at all: a hit. Beside it is what ``dqrelo
plan`` simulates. Policies that ``router.csv`` has already are not measured again.
"""

import argparse
import json
import signal
import time
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

import numpy as np
from openai import OpenAI
from tqdm import tqdm

from benchmarks.machine import MACHINE, machine
from benchmarks.models.smollm import MORE, base, delta
from benchmarks.paths import DQRELO, RESULTS
from benchmarks.serving.rivals import COMMON
from benchmarks.serving.server import copies, server
from benchmarks.table import Table
from dqrelo_tools.footprint import delta_bytes
from dqrelo_tools.popularity import Popularity
from dqrelo_tools.simulate import Fleet, Traffic, simulate

REPLICAS, MODELS, RESIDENT = 2, 8, 3
LAW = Popularity.parse("zipf:1")
WARM_UP, COUNTED = 50, 200  # requests
# Whether it keeps the requests for a delta together; no simulation takes turns.
POLICIES = {"consistent_hash": True, "random": False, "round_robin": None}
COLUMNS = ("policy", "requests", "hits", "copies", "predicted_hits", "router")
COLUMNS += MACHINE


def predicted(size: int, room: int, affinity: bool | None) -> str:
    """The share of hits by ``dqrelo plan``'s simulation, if it has that policy.

    Args:
        size: bytes of a delta.
        room: bytes that a replica has for deltas on its device.
        affinity: whether the requests for a delta stay on one replica.
    """
    if affinity is None:
        return ""
    # Of the device alone: no base, and nothing is asked of host memory and links.
    fleet = Fleet(
        base=0,
        delta=size,
        models=MODELS,
        gpus=REPLICAS,
        gpu_memory=room,
        gpu_memory_utilization=1.0,
        kv=0,
        host=MODELS * size,
        disk=1,
        link=1,
        rate=1,
        hit_rate=1,
    )
    assert fleet.resident == RESIDENT
    return f"{simulate(fleet, Traffic.of(LAW, MODELS, 0), affinity).device:.3f}"


def ask(address: str, names: list[str]) -> None:
    """Ask for a token of each model in turn, with the header that is hashed."""
    client = OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    for name in tqdm(names, "ask", leave=False):
        header = {"X-Session-ID": name}
        prompt = [5, 6, 7, 8]
        client.completions.create(
            model=name, prompt=prompt, max_tokens=1, extra_headers=header
        )


def measure(policy: str, replicas: list[str], names: list[str]) -> dict[str, object]:
    """Requests, hits and the copies of each replica, with a router of its own."""
    command = ["-m", "vllm_router.launch_router", f"--policy={policy}"]
    with server([*command, "--worker-urls", *replicas], MORE / "router.log") as router:
        ask(router, names[:WARM_UP])
        time.sleep(1)  # the last step's statistics come after its answer
        before = [copies(replica) for replica in replicas]
        ask(router, names[WARM_UP:])
        time.sleep(1)
        after = [copies(replica) for replica in replicas]
    made = [one - other for one, other in zip(after, before, strict=True)]
    share = 1 - sum(made) / COUNTED
    return {
        "requests": COUNTED,
        "hits": f"{share:.3f}",
        "copies": " + ".join(map(str, made)),
    }


def main() -> None:
    """Measure the policies that are missing."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the servers end too
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    path = parser.parse_args().output_dir / "router.csv"
    table = Table(path, ("policy",), COLUMNS)
    deltas = {f"m{i}": delta(i) for i in range(MODELS)}
    size = max(delta_bytes(str(folder)) for folder in deltas.values())
    room = int(size * (RESIDENT + 0.1))
    options = {"dqrelo": {"delta_memory_gib": room / 2**30}}
    command = [*DQRELO, "serve", base(), *COMMON, f"--max-loras={RESIDENT}"]
    command += [f"--delta={name}={folder}" for name, folder in deltas.items()]
    command += ["--additional-config", json.dumps(options)]
    drawn = LAW.draw(MODELS, WARM_UP + COUNTED, np.random.default_rng(0))
    names = [f"m{i}" for i in drawn]
    with ExitStack() as stack:
        replicas = [
            stack.enter_context(server(command, MORE / f"replica-{i}.log"))
            for i in range(REPLICAS)
        ]
        for policy, affinity in POLICIES.items():
            if (policy,) in table:
                continue
            row = {"policy": policy, **measure(policy, replicas, names)}
            row["predicted_hits"] = predicted(size, room, affinity)
            table.add({**row, "router": version("vllm-router"), **machine()})
            print(row)


if __name__ == "__main__":
    main()
