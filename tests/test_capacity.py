# SPDX-License-Identifier: Apache-2.0
"""What fits into one memory: which servers are started, and what they hold."""

import importlib
import os
import signal
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

pytest.importorskip("vllm")
pytest.importorskip("gguf")

MIB = 2**20


@pytest.fixture(scope="module")
def capacity():
    return importlib.import_module("benchmarks.serving.capacity")


@pytest.fixture
def running(capacity, monkeypatch):
    """Servers and clients that do nothing; the models of each server that runs."""
    found = {}

    @contextmanager
    def start(models):
        address = f"http://{len(found)}"
        found[address] = models
        try:
            yield address
        finally:
            del found[address]

    def drive(address, tokenizer, models, load):
        asked = dict.fromkeys(models)
        assert len(models) == load.num_prompts and asked.keys() <= {*found[address]}
        return {"duration": 2.0, "output_lens": [16] * len(models), "asked": asked}

    for module in (capacity, importlib.import_module("benchmarks.serving.rivals")):
        monkeypatch.setattr(module, "drive", drive)
        monkeypatch.setattr(module, "base", lambda: Path("base"))
    monkeypatch.setattr(capacity, "delta", lambda i: Path(f"delta-{i}"))
    monkeypatch.setattr(capacity, "merged", lambda i: Path(f"merged-{i}"))
    monkeypatch.setattr(capacity, "stock", lambda model, *_, log: start(["base"]))
    monkeypatch.setattr(capacity, "ours", lambda deltas, *_: start([*deltas]))
    monkeypatch.setattr(capacity, "metric", lambda address, _: len(found[address]))
    return found


def test_servers_stay_and_one_server_of_ours_has_all_deltas(capacity, running):
    with closing(capacity.separate(set())) as steps:
        for expected, (count, results, _) in zip((1, 2, 3), steps, strict=False):
            assert count == expected == len(running) == len(results)
            answers = sum(len(result["output_lens"]) for result in results)
            assert answers == count * (capacity.LOAD.num_prompts // count)
    assert not running
    for count, (result,), seconds in capacity.together({1, 16}):
        assert len(running) == 1 and len(result["asked"]) == count != 16
        assert seconds == 2
    assert count == capacity.MOST and not running


def test_it_ends_with_the_first_that_does_not_fit(
    capacity, running, tmp_path, monkeypatch
):
    """Servers of 3 GiB in 8; ours takes 2, and 1/16 for a delta: all 64 fit."""
    measured = []

    def held():
        measured.append(len(running))
        (*_, models) = running.values()
        gib = 3 * len(running) if models == ["base"] else 2 + len(models) / 16
        return int(gib * 2**30)

    monkeypatch.setattr(capacity, "held", held)
    for _ in range(2):
        table = capacity.Table(
            tmp_path / "capacity.csv", ("system", "models"), capacity.COLUMNS
        )
        for system in capacity.SYSTEMS:
            capacity.measure(table, system, 8)
    assert [(row["system"], row["models"]) for row in table.rows] == [
        *(("a server for each model", str(n)) for n in (1, 2, 3)),
        *(("ours", str(n)) for n in (1, 8, 16, 32, 64)),
    ]
    assert float(table.rows[2]["held_gib"]) == 9
    assert measured == [1, 2, 3, 1, 1, 1, 1, 1] and not running
    # More memory: the servers are started again, and only the fourth is a new row.
    capacity.measure(table, "a server for each model", 11)
    assert table.rows[-1]["models"] == 4 and measured[8:] == [4]


PARENT = """
import mmap, os, sys, time
size = int(sys.argv[1])
own = bytearray(b"x" * size)
with open(sys.argv[2], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
if os.fork() == 0:
    sum(mapped[::4096])
    os.write(1, b"ready\\n")
    time.sleep(600)
sum(mapped[::4096])
os.write(1, b"ready\\n")
os.wait()
"""


def test_what_processes_share_counts_once(capacity, tmp_path, monkeypatch):
    """A process of 64 MiB and a mapped file of 32, and its copy by fork."""
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * (32 * MIB // 256))
    command = [sys.executable, "-c", PARENT, str(64 * MIB), file]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        parent = psutil.Process(process.pid)
        these = [parent, *parent.children()]  # other tests may have left processes
        found = SimpleNamespace(children=lambda recursive: these)
        monkeypatch.setattr(capacity.psutil, "Process", lambda: found)
        held = capacity.held()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # Python itself takes some MiB of each.
    assert 96 * MIB <= held <= 116 * MIB


def test_the_table_and_the_figure_say_what_fits(capacity):
    rows = [
        {"system": s, "models": n, "budget_gib": "8.0", "held_gib": gib}
        for s, n, gib in [("one each", "1", "2.24"), ("ours", "2", "8.001")]
    ]
    tables = importlib.import_module("benchmarks.documents.serving_tables")
    table = tables.capacity_table(rows)
    assert table.splitlines()[2:] == [
        "| one each | 1 | 2.24 | yes |",
        "| ours | 2 | 8.00 | no |",
    ]
    figures = importlib.import_module("benchmarks.documents.figures")
    (axes,) = figures.capacity_figure(rows).axes
    first, second, budget = (line.get_xydata().tolist() for line in axes.lines)
    assert first == [[1, 2.24]] and second == [[2, 8.001]]
    assert [y for _, y in budget] == [8, 8]
