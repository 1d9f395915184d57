# SPDX-License-Identifier: Apache-2.0
"""What converts is served: a server has room for its ranks, bytes and added tokens."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support.wide import DEFAULT, arguments, made_room, suggested

from dqrelo_tools import cli
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.need import Need, layer_of

vllm = pytest.importorskip("vllm")


# Before a server starts.


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["llama-tied", "llama", "qwen2", "qwen3", "mixtral"])
def test_what_a_server_has_is_known_before_it_starts(family, engine, manager_of, kind):
    from vllm_dqrelo.format.checkpoint import Checkpoint
    from vllm_dqrelo.frontend.start import default_room

    base = family(kind).base
    llm = engine(base, quantization="dqrelo", additional_config={}, max_loras=3)
    manager, room = manager_of(llm), default_room(Checkpoint(base), 3)
    assert (room.rank, room.arena) == (manager.room.rank, manager.room.arena)


def test_what_a_delta_needs_is_in_its_headers(wide):
    """Against every tensor of the file, and q, k and v as one layer."""
    base, made = wide
    layer = "model.layers.0.self_attn."
    for folder, _ in made.values():
        need, tensors = Need.of(folder), load_file(folder / "delta_model.safetensors")
        ranks = {
            name.removesuffix("_lora_A"): len(tensor)
            for name, tensor in tensors.items()
            if name.endswith("_lora_A")
        }
        assert need.ranks == ranks
        qkv = sum(ranks.get(f"{layer}{part}_proj.weight", 0) for part in "qkv")
        mine = {n: layer for n in ranks if layer_of(n) == f"{layer}qkv_proj"}
        assert need.rank(mine.get) == qkv
        assert need.rank() >= qkv > 0
        added = [len(t) for name, t in tensors.items() if name.endswith("_added")]
        assert need.added_tokens == max(added, default=0)
    assert Need.of(made["adapter"][0]).rank() == 3 * 128
    assert {kind for kind in made if Need.of(made[kind][0]).added_tokens} == {"added"}


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["a.self_attn.q_proj", "a.self_attn.k_proj", "a.self_attn.v_proj"], 1),
        (["a.mlp.gate_proj", "a.mlp.up_proj"], 1),
        (["a.experts.0.w1", "a.experts.0.w3"], 1),
        (["a.experts.0.w1", "a.experts.1.w1"], 2),
        (["a.self_attn.q_proj", "b.self_attn.q_proj", "a.self_attn.o_proj"], 3),
        (["a.experts.0.w1", "a.experts.0.w2"], 2),
        (["lm_head"], 1),
    ],
)
def test_matrices_of_one_layer(names, layers):
    assert len({layer_of(f"{name}.weight") for name in names}) == layers


def test_room_is_made_for_what_is_given(wide, family):
    base, made = wide
    assert made_room(base, [("a", family("llama").deltas[0])]) == {}
    assert made_room(base) == {}
    assert made_room(base, [("a", made["0.5"][0])], quantization=None) == {}
    wide_ones = 0
    for kind, (folder, _) in made.items():
        need = Need.of(folder)
        given = made_room(base, [("a", folder)])
        if need.rank() > DEFAULT:
            wide_ones += 1
            assert given["max_rank"] == need.rank()
        else:
            assert "max_rank" not in given
        assert given.get("added_tokens", 0) == need.added_tokens
        # The default is for eight of ratio 1/8; the adapter's factors are float32.
        assert ("delta_memory_gib" in given) == (kind == "adapter")
    assert wide_ones >= 5
    names = ["1", "added", "paper 1"]
    deltas = [(str(i), made[kind][0]) for i, kind in enumerate(names)]
    together = [-(-Need.of(folder).size // 64) * 64 for _, folder in deltas]
    given = made_room(base, deltas, max_loras=2)
    gib = sum(sorted(together)[1:]) / 2**30
    assert gib <= given["delta_memory_gib"] < gib + 1 / 1024
    assert given["added_tokens"] == 5
    # What the user gave stays, and the rest is added.
    own = {"dqrelo": {"delta_memory_gib": 1, "host_memory_gib": 2}, "other": 3}
    given = made_room(base, deltas, additional_config=own)
    ranks = [Need.of(folder).rank() for _, folder in deltas]
    more = {"max_rank": max(ranks), "added_tokens": 5}
    assert given == own["dqrelo"] | more


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"max_rank": 3}, ["rank {rank} in one layer, and there is room for 3"]),
        ({"added_tokens": 4}, ["5 tokens added .*, and there is room for 4"]),
        ({"delta_memory_gib": 1e-4}, ["the 2 largest deltas take .* room for 107,374"]),
        (
            {"max_rank": 1, "added_tokens": 0, "delta_memory_gib": 0},
            ["rank {rank}", "5 tokens added", "take .* room for 0"],
        ),
    ],
)
def test_what_does_not_fit_is_said_at_once(wide, own, said):
    """With the options that make room for all of it."""
    base, made = wide
    deltas = [("a", made["added"][0]), ("b", made["1"][0])]
    rank = max(Need.of(folder).rank() for _, folder in deltas)
    own = {"host_memory_gib": 1} | own
    with pytest.raises(DqreloError) as caught:
        made_room(base, deltas, max_loras=2, additional_config={"dqrelo": own})
    for part in said:
        assert re.search(part.format(rank=rank), str(caught.value))
    options = suggested(str(caught.value))
    assert options.keys() == own.keys() and options["host_memory_gib"] == 1
    assert made_room(base, deltas, max_loras=2, additional_config={"dqrelo": options})


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("max_rank", "added_tokens") for value in (-1, 1.0)]
    + [("max_rank", 0), ("max_rank", True), ("max_rank", "8"), ("added_tokens", True)]
    + [("delta_memory_gib", float("nan")), ("host_memory_gib", True)],
)
def test_options_that_cannot_be(family, name, value):
    with pytest.raises(ValueError, match=f"dqrelo option {name} is "):
        made_room(family("llama").base, additional_config={"dqrelo": {name: value}})


def test_options_that_are_none(family):
    for config, message in (({"dqrelo": 3}, "is 3"), ({"dqrelo": {"a": 1}}, "'a'")):
        with pytest.raises(ValueError, match=message):
            made_room(family("llama").base, additional_config=config)


def test_names_of_deltas(family):
    made = family("llama")
    one, other = made.deltas[:2]
    for deltas, options, message in [
        ([("a", one), ("a", other)], {}, "2 deltas are called a; rename one"),
        ([("", one)], {}, "has an empty name"),
        ([("base", one)], {"served_model_name": ["base"]}, "and so is the base"),
        ([(str(made.base), one)], {}, "and so is the base"),
    ]:
        with pytest.raises(DqreloError, match=message):
            made_room(made.base, deltas, **options)


def test_what_is_no_delta_of_the_base(family, tmp_path):
    made = family("llama")
    with pytest.raises(DqreloError, match="belongs to another base"):
        made_room(made.base, [("a", family("llama-tied").deltas[0])])
    with pytest.raises(FileNotFoundError, match="hf download owner/name --local-dir"):
        made_room(made.base, [("a", "owner/name")])


def test_a_home_folder(family, tmp_path, monkeypatch):
    made = family("llama")
    shutil.copytree(made.deltas[0], tmp_path / "d")
    monkeypatch.setenv("HOME", str(tmp_path))
    from vllm_dqrelo.frontend.start import make_room

    parsed = arguments(made.base, [("a", "~/d")])
    make_room(parsed)
    assert parsed.lora_modules[0].path == str(tmp_path / "d")


# The commands.


@pytest.fixture
def started(monkeypatch):
    """The arguments of servers that would start now."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    given = []
    monkeypatch.setattr(ServeSubcommand, "cmd", given.append)
    return given


CONFIG = "--additional-config"
SPELLINGS = [
    [],
    [CONFIG, '{"dqrelo": {"host_memory_gib": 2}, "other": 1}'],
    [CONFIG + '={"dqrelo": {"host_memory_gib": 2}, "other": 1}'],
    [CONFIG + ".dqrelo.host_memory_gib", "2", CONFIG + ".other=1"],
    ["--additional_config", '{"dqrelo": {"host_memory_gib": 2}, "other": 1}'],
]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=str)
def test_dqrelo_serve_makes_room(wide, started, monkeypatch, spelling):
    """What the user gives of --additional-config does not hide what is computed."""
    base, made = wide
    delta = made["added"][0]
    monkeypatch.delenv("DQRELO_DELTA_DIR", raising=False)
    assert cli.main(["serve", str(base), "--delta", f"a={delta}", *spelling]) == 0
    own = {"dqrelo": {"host_memory_gib": 2}, "other": 1} if spelling else {"dqrelo": {}}
    computed = {"max_rank": Need.of(delta).rank(), "added_tokens": 5}
    expected = own | {"dqrelo": computed | own["dqrelo"]}
    assert started[0].additional_config == expected


START = """
import sys
from dqrelo_tools import cli
from vllm.entrypoints.cli.serve import ServeSubcommand
ServeSubcommand.cmd = print
cli.main(sys.argv[1:])
"""


def test_dqrelo_serve_says_what_it_makes_room_for(wide):
    base, made = wide
    delta = made["0.5"][0]
    command = [sys.executable, "-c", START, "serve", base, "--delta", f"a={delta}"]
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"},
    )
    said = "dqrelo: the deltas take more than the default: --additional-config"
    (line,) = [one for one in done.stdout.splitlines() if said in one]
    assert suggested(line) == {"max_rank": Need.of(delta).rank()}


def test_dqrelo_serve_ends_before_the_base_is_loaded(wide, started, capsys):
    base, made = wide
    delta = made["0.5"][0]
    command = ["serve", str(base), "--delta", f"a={delta}"]
    assert cli.main([*command, CONFIG, '{"dqrelo": {"max_rank": 7}}']) == 1
    said = capsys.readouterr().err
    assert said.startswith("dqrelo: error: a does not fit this server: rank")
    assert suggested(said) == {"max_rank": Need.of(delta).rank()}
    assert cli.main([*command, "--served-model-name", "a"]) == 1
    assert "a delta is called a, and so is the base" in capsys.readouterr().err
    for option in (["--lora-modules", f"b={delta}"], ["--quantization=fp8"]):
        assert cli.main([*command, *option]) == 1
        assert option[0].partition("=")[0] in capsys.readouterr().err
    assert not started


def test_vllm_serve_too(wide, tmp_path):
    """The plugin is in vLLM's own command; here it is refused, without loading."""
    base, made = wide
    command = [Path(sys.executable).parent / "vllm", "serve", base, "--lora-modules"]
    command += [f"a={made['0.5'][0]}", "--quantization", "dqrelo"]
    command += [CONFIG + ".dqrelo.max_rank", "7"]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("dqrelo: error: a does not fit this server: rank")


# A catalogue, whose deltas may come later.


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log."""
    from vllm_dqrelo.frontend import start

    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            start.logger, level, lambda text, *args: lines.append(text % args)
        )
    return lines


@pytest.fixture
def catalogue(wide, family, tmp_path, monkeypatch):
    """Deltas, a delta of another base, a broken one, a folder and a file."""
    base, made = wide
    folder = tmp_path / "deltas"
    shutil.copytree(made["0.5"][0], folder / "wide")
    shutil.copytree(made["added"][0], folder / "added")
    shutil.copytree(family("llama-tied").deltas[0], folder / "another")
    shutil.copytree(made["1"][0], folder / "broken")
    (folder / "broken" / "delta_model.safetensors").write_bytes(b"cut short")
    (folder / "empty").mkdir()
    (folder / "file").write_text("")
    monkeypatch.setenv("DQRELO_DELTA_DIR", str(folder))
    return folder


def test_room_for_a_catalogue(wide, catalogue, logged):
    base, _ = wide
    needs = [Need.of(catalogue / name) for name in ("wide", "added")]
    rank = max(need.rank() for need in needs)
    options = {"max_rank": rank, "added_tokens": 5}
    assert made_room(base) == options
    assert logged[0].startswith("dqrelo: another, broken of the catalogue cannot be")
    (line,) = logged[1:]
    assert line.startswith("dqrelo: the deltas take more than the default: ")
    assert suggested(line) == options


def test_a_catalogue_never_stops_a_server(wide, catalogue, logged, monkeypatch):
    """What does not fit the user's options, or the machine, is named in the log."""
    from vllm_dqrelo.frontend import start

    base, _ = wide
    own = {"max_rank": 10, "delta_memory_gib": 1e-4}
    given = made_room(base, additional_config={"dqrelo": own})
    assert given == own | {"added_tokens": 5}
    refused = next(line for line in logged if "will be refused" in line)
    assert "added, wide of the catalogue" in refused
    options = suggested(refused)
    sizes = [Need.of(catalogue / name).size for name in ("wide", "added")]
    assert (
        options["max_rank"] > 10 and options["delta_memory_gib"] >= max(sizes) / 2**30
    )
    logged.clear()
    monkeypatch.setattr(start, "available", lambda: 0)
    shutil.rmtree(catalogue / "added")
    monkeypatch.setattr(
        start, "default_room", lambda *_: start.Room(10, sizes[0] - 1, 0, {})
    )
    assert made_room(base) == {}
    assert any(
        "wide of the catalogue will be refused: the 8" in line for line in logged
    )


def test_deltas_that_no_memory_is_for(wide, monkeypatch):
    from vllm_dqrelo.format.checkpoint import Checkpoint
    from vllm_dqrelo.frontend import start

    base, made = wide
    deltas = [(str(i), made["1"][0]) for i in range(4)]
    size = -(-Need.of(made["1"][0]).size // 64) * 64
    room = start.Room(10, 1000, 0, {})
    monkeypatch.setattr(start, "default_room", lambda *_: room)
    for fits, said in ((3, "Serve with --max-loras 3, or"), (1, "Convert them with")):
        free = Checkpoint(base).nbytes(2) + fits * size
        monkeypatch.setattr(start, "available", lambda free=free: free)
        with pytest.raises(DqreloError, match=said):
            made_room(base, deltas)
    own = {"dqrelo": {"delta_memory_gib": 1}}
    assert made_room(base, deltas, additional_config=own)["delta_memory_gib"] == 1


def test_a_large_catalogue_takes_bounded_time(wide, catalogue, logged, monkeypatch):
    from vllm_dqrelo.frontend import start

    monkeypatch.setattr(start, "CATALOGUE_SECONDS", 0.5)
    times = iter([0.0, *(0.2 * i for i in range(100))])
    monkeypatch.setattr(start.time, "monotonic", lambda: next(times))
    made_room(wide[0])
    assert any("3 deltas of the catalogue were looked at" in line for line in logged)
    assert any("and 1 were not" in line for line in logged)
