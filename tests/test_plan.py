# SPDX-License-Identifier: Apache-2.0
"""Popularity laws, the simulation against closed forms and plain loops, the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from dqrelo_tools import cli
from dqrelo_tools.footprint import base_bytes
from dqrelo_tools.plan import plan
from dqrelo_tools.popularity import Popularity
from dqrelo_tools.simulate import Fleet, Traffic, gpus_needed, simulate
from vllm_dqrelo.format.errors import DqreloError

GB = 10**9


def fleet(models, resident, gpus=1, in_host=None) -> Fleet:
    """A fleet whose GPUs hold ``resident`` deltas of 1 GB."""
    memory = (resident + 11) * GB  # and a base and a KV cache
    host = (models if in_host is None else in_host) * GB
    return Fleet(
        base=6 * GB,
        delta=GB,
        models=models,
        gpus=gpus,
        gpu_memory=memory,
        gpu_memory_utilization=1.0,
        kv=5 * GB,
        host=host,
        disk=GB,
        link=GB,
        rate=1,
        hit_rate=0.9,
    )


def traffic(law, requests=20_000, seed=0) -> Traffic:
    return Traffic(Popularity.parse(law), requests, seed)


def four_sigma(p: float, draws: int) -> float:
    """Four standard deviations of the mean of independent draws of probability p."""
    return 4 * math.sqrt(p * (1 - p) / draws)


# Popularity.


@pytest.mark.parametrize(
    ("law", "weight"),
    [
        ("identical", lambda i: float(i == 1)),
        ("uniform", lambda i: 1.0),
        ("zipf:1.5", lambda i: 1 / i**1.5),
        ("geometric:1.5", lambda i: 1.5**-i),
    ],
)
def test_draws_follow_the_formula(law, weight):
    popularity, n, draws = Popularity.parse(law), 12, 40_000
    drawn = popularity.draw(n, draws, np.random.default_rng(1)).tolist()
    total = sum(weight(i) for i in range(1, n + 1))
    for i in range(1, n + 1):
        expected = weight(i) / total
        assert popularity.shares(n)[i - 1] == pytest.approx(expected, rel=1e-12)
        measured = drawn.count(i - 1) / draws
        assert abs(measured - expected) <= four_sigma(expected, draws)


def test_distinct_takes_turns_and_a_trace_repeats(tmp_path):
    rng = np.random.default_rng(0)
    turns = Popularity.parse("distinct").draw(3, 7, rng)
    assert turns.tolist() == [0, 1, 2, 0, 1, 2, 0]
    path = tmp_path / "trace"
    path.write_text("math\n\ncode\nmath\n  chat\n")
    trace = Popularity.parse(str(path))
    assert trace.models(None) == 3 and trace.models(5) == 5
    assert trace.draw(5, 6, rng).tolist() == [0, 1, 0, 2, 0, 1]
    with pytest.raises(DqreloError, match="names 3 models, more than 2"):
        trace.models(2)


@pytest.mark.parametrize(
    "law",
    ["zipf", "zipf:0", "zipf:x", "zipf:nan", "geometric:1", "geometric:inf", "no"],
)
def test_what_is_no_law_is_refused(law, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DqreloError, match="expected identical, distinct, uniform"):
        Popularity.parse(law)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(DqreloError, match="without a model's name"):
        Popularity.parse("empty")


# The simulation.


@pytest.mark.parametrize("in_host", [0, 15, 30])
def test_uniform_requests_find_what_share_is_there(in_host):
    """All models are alike, so that a hit has the probability C / N each time."""
    given, requests = fleet(50, 10, gpus=3, in_host=in_host), traffic("uniform")
    counted = requests.requests // 2
    one = simulate(replace(given, gpus=1), requests, affinity=True)
    assert abs(one.device - 10 / 50) <= four_sigma(0.2, counted)
    host = in_host / 50
    assert abs(one.host - host) <= four_sigma(host, counted)
    assert one.device + one.host + one.disk == pytest.approx(1)
    apart = simulate(given, requests, affinity=False)
    assert abs(apart.device - 10 / 50) <= four_sigma(0.2, counted)
    assert abs(apart.busiest - 1 / 3) <= four_sigma(1 / 3, requests.requests)
    together = simulate(given, requests, affinity=True)
    assert abs(together.device - 30 / 50) <= four_sigma(0.6, counted)


def test_one_model_is_always_there_and_has_one_replica():
    found = simulate(fleet(50, 10, gpus=3), traffic("identical"), affinity=True)
    assert (found.device, found.host, found.disk, found.busiest) == (1, 0, 0, 1)


def test_taking_turns_is_the_worst_for_lru():
    turns = traffic("distinct")
    assert simulate(fleet(11, 10), turns, affinity=True).device == 0
    assert simulate(fleet(10, 10), turns, affinity=True).device == 1
    assert simulate(fleet(12, 10, in_host=1), turns, affinity=True).disk == 1
    assert simulate(fleet(12, 10, in_host=2), turns, affinity=True).host == 1


def plain_lru(requests: list[int], capacity: int) -> list[bool]:
    """Whether each request hit, by a list with the oldest first."""
    held: list[int] = []
    hits = []
    for model in requests:
        hits.append(model in held)
        held = [other for other in held if other != model] + [model]
        held = held[-capacity:]
    return hits


@pytest.mark.parametrize("law", ["zipf:1", "zipf:0.7", "geometric:1.5"])
def test_the_same_as_a_plain_loop(law):
    requests = traffic(law, 6000, seed=3)
    rng = np.random.default_rng(3)
    drawn = requests.popularity.draw(60, 6000, rng).tolist()
    device = np.array(plain_lru(drawn, 7))[3000:]
    host = np.array(plain_lru(drawn, 7 + 20))[3000:]
    found = simulate(fleet(60, 7, in_host=20), requests, affinity=True)
    assert found.device == device.mean()
    assert found.host == (host & ~device).mean()
    assert found.disk == (~host).mean()
    where = rng.integers(2, size=6000)
    hits = np.zeros(6000, dtype=bool)
    for replica in range(2):
        mine = np.flatnonzero(where == replica)
        hits[mine] = plain_lru([drawn[i] for i in mine], 7)
    found = simulate(fleet(60, 7, gpus=2), requests, affinity=False)
    assert found.device == hits[3000:].mean()


def test_two_slots_have_a_closed_form():
    """King 1971: the last two different models were i, then j, with probability
    p(i) p(j) / (1 - p(i)). Hits depend on one another over a few requests only: twice
    the standard deviation of independent ones is more than enough.
    """
    p = Popularity.parse("zipf:1").shares(6)
    exact = sum(
        p[i] * p[j] / (1 - p[i]) * (p[i] + p[j])
        for i in range(6)
        for j in range(6)
        if i != j
    )
    found = simulate(fleet(6, 2), traffic("zipf:1"), affinity=True)
    assert abs(found.device - exact) <= 2 * four_sigma(exact, 10_000)


@pytest.mark.parametrize(("law", "capacity"), [("zipf:1", 20), ("zipf:0.8", 60)])
def test_near_ches_approximation(law, capacity):
    """Its error is below 1% of requests at these sizes (Fricker et al. 2012)."""
    p = Popularity.parse(law).shares(200)
    low, high = 0.0, 1e6  # of the time that a model stays
    for _ in range(100):
        middle = (low + high) / 2
        held = (1 - np.exp(-p * middle)).sum()
        low, high = (middle, high) if held < capacity else (low, middle)
    che = float((p * (1 - np.exp(-p * low))).sum())
    found = simulate(fleet(200, capacity), traffic(law, 60_000), affinity=True)
    assert abs(found.device - che) <= 0.01 + four_sigma(che, 30_000)


@pytest.mark.parametrize("law", ["uniform", "zipf:1", "distinct"])
def test_affinity_fills_every_gpu_and_keeps_it(law):
    given, requests = fleet(30, 10, gpus=3), traffic(law)
    assert simulate(given, requests, affinity=True).device == 1
    assert simulate(given, requests, affinity=False).device < 0.9


@pytest.mark.parametrize("law", ["uniform", "zipf:1.2", "identical"])
def test_the_fewest_gpus_for_the_hit_rate(law):
    given, requests = fleet(40, 5), traffic(law, 10_000)
    needed = gpus_needed(given, requests)
    assert simulate(replace(given, gpus=needed), requests, True).device >= 0.9
    if needed > 1:
        assert simulate(replace(given, gpus=needed - 1), requests, True).device < 0.9
    assert needed == {"identical": 1}.get(law, needed)


def test_full_copies_and_what_waiting_costs():
    """20 GB for three whole models of 6, eight deltas of 1 beside one base."""
    given = replace(fleet(24, 9, gpus=2), gpu_memory=25 * GB, disk=GB // 2)
    deltas, random, full = (
        case.numbers() for case in plan(given, traffic("uniform")).cases
    )
    assert deltas["resident_per_gpu"] == 14 and full["resident_per_gpu"] == 3
    assert deltas["gpus_for_all"] == 2 and full["gpus_for_all"] == 8
    assert random["gpus_for_all"] is None
    assert full["seconds_per_copy"] == 6 and full["seconds_per_cold_start"] == 18
    cold = 3600 * full["disk"]
    assert full["cold_starts_per_hour"] == pytest.approx(cold)
    waited = 6 * 3600 * full["host"] + 18 * cold
    assert full["seconds_waited_per_hour"] == pytest.approx(waited)


# The command.

COMMAND = ["plan", "--base", "16.1GB", "--delta", "1.9GB"]
COMMAND += ["--models", "60", "--gpus", "2"]


def run(*arguments) -> int:
    return cli.main([*COMMAND, *map(str, arguments)])


def test_the_command(capsys):
    assert run() == 0
    text = capsys.readouterr().out
    # floor((80 * 0.92 - 20 - 16.1) / 1.9), floor((80 * 0.92 - 20) / 16.1)
    assert "resident on each GPU 19 19 3" in " ".join(text.split())
    assert '--max-loras 8 --additional-config \'{"dqrelo": ' in text
    assert "Assumed:" in text and "zipf:1" in text
    answers = []
    for seed in (0, 0, 1):
        assert run("--json", "--seed", seed) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1] != answers[2]
    cases = answers[0]["cases"]
    assert cases["full copies"]["gpus_for_all"] == 20
    assert cases["deltas"]["gpus_for_all"] == 4
    assert cases["deltas"]["device"] > cases["random routing"]["device"]


def test_a_base_on_the_cpu_has_deltas_of_the_same_size(family, capsys):
    """The default, an eighth of the weights, which are packed for the base alone."""
    base, fleets = str(family("llama").base), {}
    for device in ("cuda", "cpu"):
        options = ["--base", base, "--models", "2", "--device", device, "--json"]
        assert cli.main(["plan", *options]) == 0
        fleets[device] = json.loads(capsys.readouterr().out)["fleet"]
        assert fleets[device]["base"] == base_bytes(base, device)
    assert fleets["cpu"]["base"] > fleets["cuda"]["base"]
    assert fleets["cpu"]["delta"] == fleets["cuda"]["delta"]


def test_the_options_give_a_server_room_for_what_is_resident(capsys):
    """The arena of vllm_dqrelo.options holds the deltas that the plan counted on."""
    assert run("--json") == 0
    options = json.loads(capsys.readouterr().out)["options"]
    given = json.loads(options.split("'")[1])["dqrelo"]
    arena = int(given["delta_memory_gib"] * 2**30)
    assert 19 * 1.9 * GB <= arena < 19 * 1.9 * GB + 2**20
    assert 64 * GB <= int(given["host_memory_gib"] * 2**30) < 64 * GB + 2**20


def test_a_trace_says_how_many_models(tmp_path, capsys):
    path = tmp_path / "trace"
    path.write_text("one\ntwo\n" * 10 + "three\n")
    assert cli.main([*COMMAND[:5], "--popularity", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fleet"]["models"] == 3 and answer["requests"] == 42
    assert answer["cases"]["deltas"]["device"] == 1
    plot = ["--plot", str(tmp_path / "plan.svg")]
    assert cli.main([*COMMAND[:5], "--popularity", str(path), *plot]) == 1
    assert "a trace has its own" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv", "60GB"], "do not fit together"),
        (["--rate", "-1"], "0 or more"),
        (["--rate", "nan"], "0 or more"),
        (["--base", "0GB"], "has 0 bytes"),
        (["--popularity", "zipf"], "expected identical"),
        (["--delta", "/no/such"], "not a delta folder"),
        (["--base", "/no/such"], "neither a size such as 16GB"),
        (["--plot", "a.jpeg"], "expected a name in"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [("--models", "0"), ("--hit-rate", "2")])
def test_numbers_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        run(*option)
    assert option[1] in capsys.readouterr().err


def test_the_picture(tmp_path):
    path = tmp_path / "plan.svg"
    assert run("--plot", path) == 0
    text = path.read_text()
    assert text.count("<!-- deltas -->") == 1 and "<!-- full copies -->" in text
