# SPDX-License-Identifier: Apache-2.0
"""The self-check of a worker: it passes, and planted faults do not."""

import json

import pytest
import torch

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.fixture
def start(engine, family, monkeypatch, tmp_path):
    """``start(kind)``: an engine that checks itself; returns what it says of that."""
    from vllm_dqrelo.worker.self_check import check, remembered

    monkeypatch.setattr(remembered, "FOLDER", str(tmp_path))
    said = []
    monkeypatch.setattr(check.logger, "info", lambda text, line: said.append(line))

    def run(kind="llama", self_check="always", **options):
        said.clear()
        room = {"delta_memory_gib": 0.01, "self_check": self_check}
        options = {"max_loras": 3, "additional_config": {"dqrelo": room}} | options
        engine(family(kind).base, quantization="dqrelo", **options)
        return list(said)

    return run


@pytest.mark.parametrize(
    ("kind", "max_loras"),
    [
        pytest.param("llama", 3, marks=pytest.mark.v2),
        pytest.param("llama-tied", 1, marks=pytest.mark.slow),
        pytest.param("qwen2", 2, marks=pytest.mark.slow),
        pytest.param("qwen3", 3, marks=pytest.mark.slow),
        pytest.param("mixtral", 3, marks=pytest.mark.v2),
    ],
)
def test_it_passes(start, kind, max_loras):
    (line,) = start(kind, max_loras=max_loras)
    for check in ("delta_linear_", "delta_embedding_", "delta_norm_", "memory", "step"):
        assert check in line
    assert "not checked" not in line


@pytest.fixture
def few(monkeypatch):
    """Few rows and kinds of deltas: the interpreter takes seconds for a step."""
    from vllm_dqrelo.worker.self_check import ops

    monkeypatch.setattr(ops, "ROWS", {"cpu": (17,)})
    monkeypatch.setattr(ops, "KINDS", ops.KINDS[:1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2", "mixtral"])
def test_it_passes_with_the_kernels_of_a_gpu(start, like_a_gpu, merges, few, kind):
    (line,) = start(kind)
    assert "not checked" not in line
    assert merges


def test_a_check_that_passed_is_remembered(start, tmp_path):
    assert start(self_check="never") == []
    (line,) = start(self_check="once")
    assert start(self_check="once") == []
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["result"] == line
    assert len(start(self_check="once", max_loras=2)) == 1, "another kind of worker"
    assert len(start(self_check="always")) == 1


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.int8, torch.uint8, torch.bfloat16, torch.float32]
)
def test_a_key_has_the_same_numbers_when_its_pool_has_grown(dtype):
    from vllm_dqrelo.worker.self_check import synthetic

    synthetic.free_pools()
    keys = [f"key {i}" for i in range(50)]
    before = [synthetic._random(dtype, (301, 7), key).clone() for key in keys]
    synthetic._random(dtype, (2**20 + 3,), "a larger tensor")
    after = [synthetic._random(dtype, (301, 7), key) for key in keys]
    synthetic.free_pools()
    assert all(map(torch.equal, before, after))
    assert not torch.equal(after[0], after[1])


def swapped_slices(patch):
    """k and v of the first layer have each other's entries."""
    from vllm_dqrelo.worker import residency

    rebase = residency.rebase

    def swapped(entries, offset):
        entries = rebase(entries, offset)
        entries[[2, 3]] = entries[[3, 2]]
        return entries

    patch.setattr(residency, "rebase", swapped)


def stale_table(patch):
    """A slot that had a delta keeps that delta's entries."""
    from vllm_dqrelo.worker.residency import Residency

    write, written = Residency._write_table, set()

    def once(self, delta):
        if delta.slot not in written:
            write(self, delta)
        written.add(delta.slot)

    patch.setattr(Residency, "_write_table", once)


def other_slot(patch):
    """Rows belong to the slot of another delta of the step."""
    from vllm_dqrelo.worker import manager

    slots_of = manager._slots_of

    def swapped(adapter_ids, by_id):
        slots = reversed(by_id.values())
        return slots_of(adapter_ids, dict(zip(by_id, slots, strict=True)))

    patch.setattr(manager, "_slots_of", swapped)


def late_rows(patch):
    """Each request has the delta of the request before it."""
    import numpy as np

    from vllm_dqrelo.worker.manager import DeltaManager

    set_rows = DeltaManager.set_rows
    patch.setattr(
        DeltaManager,
        "set_rows",
        lambda self, requests, ids, tokens=1: set_rows(
            self, requests, np.roll(ids, 1), tokens
        ),
    )


def unmoved(patch):
    """Compaction says where extents are, and leaves their bytes where they were."""
    from vllm_dqrelo.worker.arena import Arena

    patch.setattr(Arena, "_move", lambda *_: None)


def not_restored(patch):
    """An evicted delta comes back to host memory without its last bytes."""
    from vllm_dqrelo.worker.residency import Residency

    evict = Residency.evict

    def damaging(self, digest):
        evict(self, digest)
        self.host.get(digest).extent[-9:] = 0

    patch.setattr(Residency, "evict", damaging)


def no_head(patch):
    """The LM head is the base's."""
    from vllm_dqrelo.worker.step import Step

    patch.setattr(Step, "head_rows", lambda self, x: self._head)


def wrong_integers(patch):
    """Integers of four bits are one too large."""
    from dqrelo_kernels import reference

    unpack = reference.unpack_int4
    patch.setattr(reference, "unpack_int4", lambda *a: unpack(*a) + 1)


def wrong_signs(patch):
    """The first two columns of each run have each other's signs."""
    from dqrelo_kernels import reference

    unpack = reference.unpack_signs

    def swapped(words, columns, dtype):
        signs = unpack(words, columns, dtype)
        signs[:, [0, 1]] = signs[:, [1, 0]]
        return signs

    patch.setattr(reference, "unpack_signs", swapped)


def no_bias(patch):
    """Biases are left out."""
    from dqrelo_kernels.table import Field
    from vllm_dqrelo.worker import residency

    rebase = residency.rebase

    def without(entries, offset):
        entries = rebase(entries, offset)
        entries[:, Field.BIAS] = -1
        return entries

    patch.setattr(residency, "rebase", without)


FAULTS = [
    (swapped_slices, "delta_linear_: .*qkv_proj"),
    (stale_table, "delta_"),
    (other_slot, "step: .*delta 0"),
    (late_rows, "step: "),
    (unmoved, "memory: .*after compaction"),
    (not_restored, "memory: .*after evicting"),
    (no_head, "step: .*delta 0"),
    (no_bias, "delta_linear_: .*qkv_proj"),
]


@pytest.mark.parametrize(
    ("plant", "said"), FAULTS, ids=lambda f: getattr(f, "__name__", "")
)
def test_a_planted_fault_is_found(start, monkeypatch, plant, said):
    plant(monkeypatch)
    with pytest.raises(Exception, match=f"the self-check failed: {said}"):
        start("qwen2")


@pytest.mark.parametrize("plant", [wrong_integers, wrong_signs])
def test_a_fault_of_an_op_is_found(start, monkeypatch, plant):
    from dqrelo_kernels.cpu import build as cpu

    monkeypatch.setenv("DQRELO_NATIVE", "0")
    cpu.reset()
    try:
        plant(monkeypatch)
        with pytest.raises(Exception, match="self-check failed: delta_.* tolerance"):
            start("qwen2")
    finally:
        cpu.reset()


def wrong_kernel_signs(patch):
    """A sign is read from the bit next to its own."""
    from dqrelo_kernels.gpu import sign_matmul

    decode = sign_matmul._decode

    def shifted(words, BIT, dtype, IN_PAIRS):
        return decode(words, BIT ^ 1, dtype, IN_PAIRS)

    patch.setattr(sign_matmul, "_decode", shifted)


def wrong_merge(patch):
    """A merged matrix is the base's."""

    def base(made, bias, weight, *_):
        made.copy_(weight)
        bias.zero_()

    patch.setattr(torch.ops.dqrelo, "merge_", base)


def test_a_fault_of_a_merged_matrix_is_found(start, merges, monkeypatch):
    wrong_merge(monkeypatch)
    with pytest.raises(Exception, match="self-check failed: step: .* delta 0"):
        start("llama")


def test_a_fault_of_a_kernel_is_found(start, like_a_gpu, few, monkeypatch):
    wrong_kernel_signs(monkeypatch)
    with pytest.raises(Exception, match="self-check failed: delta_linear_"):
        start("llama")


@pytest.fixture
def graphs(like_a_gpu, few, monkeypatch):
    """torch.cuda's graphs, emulated, of ops alone: what was captured, in order."""
    from support.graphs import Graph

    from vllm_dqrelo.worker.self_check import check, ops

    monkeypatch.setattr(check, "check_step", lambda *_: None)

    captured = []

    class CUDAGraph(Graph):
        def __init__(self):
            super().__init__(host=())
            captured.append(self)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", CUDAGraph.capture)
    monkeypatch.setattr(ops, "has_graphs", lambda device: True)
    return captured


@pytest.mark.slow
def test_graphs_are_replayed(start, graphs):
    (line,) = start("llama")
    assert ", graph 0" in line
    assert graphs and all(graph.triton for graph in graphs)


@pytest.mark.slow
def test_a_graph_that_keeps_the_rows_of_its_capture_is_found(
    start, graphs, monkeypatch
):
    from dqrelo_kernels.rows import RowGroups

    write = RowGroups.set

    def elsewhere(self, slots):
        buffers, count = self._device.clone(), self.capacity
        self._device, self.starts = buffers, buffers[4 * count :]
        self.rows, self.slots, self.by_row, _ = buffers[: 4 * count].chunk(4)
        self.of_rows = (self.rows, self.slots, self.starts, self.num_active)
        write(self, slots)

    monkeypatch.setattr(RowGroups, "set", elsewhere)
    with pytest.raises(Exception, match="self-check failed: graph: "):
        start("llama")
