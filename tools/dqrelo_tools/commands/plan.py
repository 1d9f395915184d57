# SPDX-License-Identifier: Apache-2.0
"""``dqrelo plan``."""

import argparse
import json
from functools import partial

from dqrelo_tools.arguments import Commands, add_plot, count, share, size
from vllm_dqrelo.format.errors import DqreloError


def add(commands: Commands) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "plan",
        help="simulate a fleet of GPUs: hit rates, cold starts, GPUs needed",
        epilog="Popularity, p(i) being the share of requests for the i-th of N models: "
        "identical: p(1) = 1; distinct: request t is for model 1 + t mod N; uniform: "
        "p(i) = 1/N; zipf:S: p(i) ~ i^-S; geometric:R: p(i) ~ R^-i; or a FILE with one "
        "model's name a line, in the order of the requests.",
    )
    command.add_argument(
        "--base",
        required=True,
        metavar="SIZE|BASE",
        help="the base's weights: a size such as 16.1GB, a folder or a Hub id",
    )
    command.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="device that serves the base; on the CPU vLLM packs the vocabulary's "
        "matrices as well (default: cuda)",
    )
    command.add_argument(
        "--delta",
        metavar="SIZE|DELTA",
        help="one delta: a size or a delta folder (default: an eighth of the base's "
        "weights)",
    )
    command.add_argument(
        "--models",
        type=count,
        help="number of fine-tunes (default: those that a trace names)",
    )
    command.add_argument("--gpus", type=count, default=1, help="replicas (default: 1)")
    command.add_argument(
        "--popularity",
        default="zipf:1",
        metavar="LAW",
        help="share of requests for each model, see below (default: zipf:1)",
    )
    for option, default, text in (
        ("--gpu-memory", "80GB", "memory of one GPU"),
        ("--kv", "20GB", "of that, for KV cache and activations"),
        ("--host", "64GB", "host memory for the deltas of one replica"),
        ("--disk", "2GB/s", "speed of reading a delta from disk"),
        ("--link", "20GB/s", "speed of copying a delta to the device"),
    ):
        command.add_argument(
            option, type=size, default=default, help=f"{text} (default: {default})"
        )
    command.add_argument(
        "--gpu-memory-utilization",
        type=share,
        default=0.92,
        help="as for vllm serve (default: 0.92)",
    )
    command.add_argument(
        "--rate", type=float, default=10, help="requests/s in all (default: 10)"
    )
    command.add_argument(
        "--hit-rate",
        type=share,
        default=0.99,
        help="share of requests that should find their delta on the device "
        "(default: 0.99)",
    )
    command.add_argument("--seed", type=int, default=0)
    add_plot(command, "hit rate against models")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what a fleet of GPUs would do."""
    from dqrelo_tools.footprint import base_bytes, bytes_of, delta_bytes
    from dqrelo_tools.plan import figure, plan
    from dqrelo_tools.plot import require_plot
    from dqrelo_tools.popularity import Popularity
    from dqrelo_tools.simulate import Fleet, Traffic

    if arguments.plot:
        require_plot(arguments.plot)
    popularity = Popularity.parse(arguments.popularity)
    if arguments.plot and popularity.trace:
        raise DqreloError("--plot is over numbers of models, and a trace has its own")
    models = popularity.models(arguments.models)
    base = bytes_of(arguments.base, partial(base_bytes, device=arguments.device))
    delta = (
        bytes_of(arguments.delta, delta_bytes)
        if arguments.delta
        else bytes_of(arguments.base, base_bytes) // 8
    )
    fleet = Fleet(
        base=base,
        delta=delta,
        models=models,
        gpus=arguments.gpus,
        gpu_memory=arguments.gpu_memory,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        kv=arguments.kv,
        host=arguments.host,
        disk=arguments.disk,
        link=arguments.link,
        rate=arguments.rate,
        hit_rate=arguments.hit_rate,
    )
    found = plan(fleet, Traffic.of(popularity, models, arguments.seed))
    if arguments.plot:
        figure(found).savefig(arguments.plot, dpi=150)
    print(json.dumps(found.to_dict(), indent=2) if arguments.json else found.to_text())
    return 0
