# SPDX-License-Identifier: Apache-2.0
"""Ways to serve several fine-tunes from one machine, each measured under one load.

A system takes the number of models and the load. For each of its names it yields the
client's results, the seconds that they took together, and the bytes of the weights that
it holds. Where several servers or turns share the load, each has an equal part of it;
these servers start with --enforce-eager, because to compile takes longer than they run.
"""

import io
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.models.smollm import HALF_RATIO, MORE, adapter, base, delta, merged
from benchmarks.paths import DQRELO
from benchmarks.serving.load import Load, drive
from benchmarks.serving.server import server
from dqrelo_tools.footprint import base_bytes, delta_bytes

Measured = tuple[list[dict[str, Any]], float, int]

COMMON = ["--served-model-name=base", "--dtype=bfloat16", "--max-model-len=1024"]
# Random prompts of one seed are the same in every row: cached, they would be free.
COMMON += ["--no-enable-prefix-caching"]
LOG = MORE / "server.log"
WARM_UP = Load("closed", "16:4", 8, request_rate=0, max_concurrency=8, seed=1)


def ours(
    deltas: dict[str, Path], max_loras: int, *options: str
) -> AbstractContextManager[str]:
    """Our server with these deltas."""
    named = [f"--delta={name}={folder}" for name, folder in deltas.items()]
    arguments = [*DQRELO, "serve", base(), *named, f"--max-loras={max_loras}", *COMMON]
    return server([*arguments, *options], LOG)


def stock(
    model: Path, *options: str | Path, log: Path = LOG
) -> AbstractContextManager[str]:
    """vLLM's server without our plugin."""
    arguments = ["-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return server([*arguments, *COMMON, *options], log, VLLM_PLUGINS="")


def one(address: str, models: list[str], load: Load) -> tuple[dict[str, Any], float]:
    """The load on one server, after a few tokens to warm it up."""
    drive(address, base(), models[: WARM_UP.num_prompts], WARM_UP)
    result = drive(address, base(), models, load)
    return result, result["duration"]


def base_alone(count: int, load: Load) -> Iterator[Measured]:
    """The base on vLLM without the plugin."""
    with stock(base()) as address:
        result, seconds = one(address, ["base"] * load.num_prompts, load)
    yield [result], seconds, base_bytes(str(base()))


def our_server(count: int, load: Load) -> Iterator[Measured]:
    """Our server with all deltas, under three kinds of requests.

    To the base only; to all deltas in turn, mixed in its batches; to one delta after
    another, so that no batch has two.
    """
    deltas = {f"m{i}": delta(i) for i in range(count)}
    with ours(deltas, count) as address:
        result, seconds = one(address, ["base"] * load.num_prompts, load)
        yield [result], seconds, held(deltas)
        yield from mixed_and_in_turns(address, deltas, load)


def our_server_at_half(count: int, load: Load) -> Iterator[Measured]:
    """Our server with deltas of half the bytes, mixed and one after another."""
    deltas = {f"m{i}": delta(i, HALF_RATIO) for i in range(count)}
    with ours(deltas, count) as address:
        yield from mixed_and_in_turns(address, deltas, load)


def mixed_and_in_turns(
    address: str, deltas: dict[str, Path], load: Load
) -> Iterator[Measured]:
    """Requests to all deltas in turn, and then to one delta after another."""
    result, seconds = one(address, in_turn([*deltas], load), load)
    yield [result], seconds, held(deltas)
    part = replace(load, num_prompts=load.num_prompts // len(deltas))
    results = [
        drive(address, base(), [name] * part.num_prompts, part) for name in deltas
    ]
    yield results, sum(result["duration"] for result in results), held(deltas)


def held(deltas: dict[str, Path]) -> int:
    """Bytes of the base and of these deltas."""
    return base_bytes(str(base())) + sum(delta_bytes(str(d)) for d in deltas.values())


def vllm_lora(count: int, load: Load) -> Iterator[Measured]:
    """vLLM's own LoRA: adapters of as many bytes, on the linear layers."""
    made = {f"m{i}": adapter(i) for i in range(count)}
    options = ["--enable-lora", f"--max-loras={count}", "--max-lora-rank=64"]
    options += ["--lora-modules", *(f"{n}={folder}" for n, (folder, _) in made.items())]
    with stock(base(), *options) as address:
        result, seconds = one(address, in_turn([*made], load), load)
    size = sum(
        (folder / "adapter_model.safetensors").stat().st_size
        for folder, _ in made.values()
    )
    yield [result], seconds, base_bytes(str(base())) + size


def one_merged(count: int, load: Load) -> Iterator[Measured]:
    """One fine-tune as a whole model: what a server of its own would give it."""
    with stock(merged(0)) as address:
        result, seconds = one(address, ["base"] * load.num_prompts, load)
    yield [result], seconds, base_bytes(str(merged(0)))


def many_servers(count: int, load: Load) -> Iterator[Measured]:
    """A server for each fine-tune as a whole model, all at once."""
    with ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        logs = [LOG.with_name(f"server-{i}.log") for i in range(count)]
        servers = [
            stock(merged(i), "--enforce-eager", log=logs[i]) for i in range(count)
        ]
        addresses = list(pool.map(stack.enter_context, servers))
        at_once(addresses, WARM_UP)
        results, seconds = at_once(addresses, part_of(load, count))
    yield results, seconds, count * base_bytes(str(base()))


def at_once(addresses: list[str], load: Load) -> tuple[list[dict[str, Any]], float]:
    """The load on each of several servers at the same time, and the seconds of all."""
    models = ["base"] * load.num_prompts
    # A client puts back the stdout that it found, which may be another client's.
    with redirect_stdout(io.StringIO()), ThreadPoolExecutor(len(addresses)) as pool:
        start = time.perf_counter()
        jobs = [pool.submit(drive, a, base(), models, load) for a in addresses]
        return [job.result() for job in jobs], time.perf_counter() - start


def part_of(load: Load, count: int) -> Load:
    """The load of one of ``count`` servers that share it."""
    return replace(
        load,
        num_prompts=load.num_prompts // count,
        request_rate=load.request_rate / count,
        max_concurrency=max(load.max_concurrency // count, 1),
    )


def swapping(count: int, load: Load) -> Iterator[Measured]:
    """One whole model at a time, the server started again for each.

    All requests are sorted by model, so that each model is started once, and the time
    to the first token is counted from a request's turn: the best case of swapping.
    """
    part = replace(load, num_prompts=load.num_prompts // count)
    folders, results = [merged(i) for i in range(count)], []
    start = time.perf_counter()
    for folder in folders:
        with stock(folder, "--enforce-eager") as address:
            models = ["base"] * part.num_prompts
            results.append(drive(address, base(), models, part))
    yield results, time.perf_counter() - start, base_bytes(str(base()))


def in_turn(names: list[str], load: Load) -> list[str]:
    """The model of each request."""
    return [names[i % len(names)] for i in range(load.num_prompts)]


SYSTEMS: dict[tuple[str, ...], Callable[[int, Load], Iterator[Measured]]] = {
    ("base alone, no plugin",): base_alone,
    (
        "ours, requests to the base",
        "ours, deltas mixed",
        "ours, one delta after another",
    ): our_server,
    (
        "ours at 1/16, deltas mixed",
        "ours at 1/16, one delta after another",
    ): our_server_at_half,
    ("vLLM LoRA, equal bytes",): vllm_lora,
    ("one merged model",): one_merged,
    ("a server for each model",): many_servers,
    ("one server, started for each model",): swapping,
}
