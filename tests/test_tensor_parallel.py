# SPDX-License-Identifier: Apache-2.0
"""Several workers, each with its part of the base and of every delta."""

import gc

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.shapes import SHAPE, UNTIED
from transformers import Qwen2MoeConfig

from dqrelo_kernels.table import ABSENT, Field, read
from dqrelo_tools.convert import convert
from dqrelo_tools.export import export
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import Delta, write_delta
from vllm_dqrelo.format.side_files import TOKENIZER_FILES
from vllm_dqrelo.format.tensors import MatrixDelta

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

# fp32 sums of up to 320 terms in another order, through two layers.
TOLERANCE = 1e-4
FEWER = 12  # tokens


@pytest.fixture
def worker(monkeypatch):
    """``worker(rank, size, names)``: the sites of a layer of each kind, as it has them.

    Args:
        names: of the checkpoint; modules that are one parameter there, too.
        times: how much larger the layers are.
        fully_sharded: as in --fully-sharded-loras.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    from vllm_dqrelo.worker.sites import Sites

    def make(rank, size, names=(), tokens=120, times=1, fully_sharded=False):
        for module in (parameter, linear, vocab_parallel_embedding):
            for name, value in (("rank", rank), ("world_size", size)):
                full = f"get_tensor_model_parallel_{name}"
                monkeypatch.setattr(module, full, lambda value=value: value)
        model = torch.nn.Module()
        with set_current_vllm_config(VllmConfig()):
            narrow, wide = 24 * times, 40 * times
            model.column = linear.ColumnParallelLinear(narrow, wide)
            model.merged = linear.MergedColumnParallelLinear(narrow, [wide, 2 * wide])
            model.qkv = linear.QKVParallelLinear(narrow, 8 * times, 4, 2)
            model.one_head = linear.QKVParallelLinear(narrow, 8 * times, 4, 1)
            model.row = linear.RowParallelLinear(wide, narrow)
            model.replicated = linear.ReplicatedLinear(narrow, 5)
            model.head = vocab_parallel_embedding.ParallelLMHead(tokens + 8, narrow)
        for parameters in model.parameters():
            parameters.data.fill_(1)
        return Sites(model, names, added_tokens=8, fully_sharded=fully_sharded)

    return make


# Module, slice, the rows of the first and of the second of two workers.
ROWS = [
    ("column", 0, range(20), range(20, 40)),
    ("merged", 0, range(20), range(20, 40)),
    ("merged", 1, range(40), range(40, 80)),
    ("qkv", 0, range(16), range(16, 32)),
    ("qkv", 1, range(8), range(8, 16)),
    ("qkv", 2, range(8), range(8, 16)),
    # One head of k and v, which both have.
    ("one_head", 0, range(16), range(16, 32)),
    ("one_head", 1, range(8), range(8)),
    ("one_head", 2, range(8), range(8)),
    ("row", 0, range(24), range(24)),
    ("replicated", 0, range(5), range(5)),
    # 120 tokens and 8 more, of which the second has all
    ("head", 0, range(64), range(64, 120)),
]
# q, k and v are one matrix, and gate and up.
FUSED = [
    ("qkv", [*range(16), *range(32, 40), *range(48, 56)]),
    ("one_head", [*range(16), *range(32, 48)]),
    ("merged", [*range(20), *range(40, 80)]),
]


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_and_columns_of_each_of_two_workers(worker, rank):
    """Written by hand from what tensor parallelism means."""
    sites = worker(rank, 2)
    for name, index, *rows in ROWS:
        site = sites.by_name[name]
        assert site.rows(index).tolist() == [*rows[rank]], name
        columns = range(20 * rank, 20 * rank + 20) if name == "row" else range(24)
        assert site.kept_columns().tolist() == [*columns], name
    assert sites.added_here(sites.by_name["head"]) == (range(0), range(8))[rank]


def test_rows_of_what_is_fused_in_the_checkpoint(worker):
    sites = worker(0, 2, [f"{name}.weight" for name, _ in FUSED])
    for name, rows in FUSED:
        (place,) = sites.places(f"{name}.weight")
        assert place.rows.tolist() == rows, name
    assert sites.places("qkv.weight")[0].shape == (64, 24)


def test_a_vocabulary_that_leaves_a_worker_without_tokens_is_refused(worker):
    worker(0, 2, tokens=60)
    with pytest.raises(ValueError, match="60 tokens is too small for --tensor-par"):
        worker(1, 2, tokens=60)


def write(folder, tensors):
    folder.mkdir()
    write_delta(folder, DeltaConfig("base", "", "", "dqrelo", 0.125), tensors)
    return Delta(folder)


def zeros(n, k, rank):
    """The stored change of a matrix, of one sign plane and factors of four bits."""
    return MatrixDelta(
        (n, k),
        torch.zeros(1, n, -(-k // 16), dtype=torch.int16),
        torch.ones(1, n),
        torch.zeros(rank, -(-k // 2), dtype=torch.uint8),
        torch.zeros(n, -(-rank // 2), dtype=torch.uint8),
        torch.ones(rank),
    )


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_bytes_of_a_delta_in_each_of_two_workers(worker, tmp_path, fully_sharded):
    """Signs halve, and of the two factors the one that is split, or both."""
    from vllm_dqrelo.worker.packed import pack

    rows, columns, rank = 40, 24, 64

    def size(n, k, of_a=rank, of_b=rank):
        parts = (n * -(-k // 16) * 2, 4 * n, of_a * k // 2, n * of_b // 2, 4 * of_a)
        return sum(-(-part // 64) * 64 for part in parts)

    half = rank // 2 if fully_sharded else rank
    for name, n, k, here in (
        ("column", rows, columns, (20, 24, half, rank)),
        ("row", columns, rows, (24, 20, rank, half)),
    ):
        stored = zeros(n, k, rank).tensors(f"{name}.weight")
        delta = write(tmp_path / name, stored)
        for workers, shape in ((1, (n, k)), (2, here)):
            for worker_rank in range(workers):
                sites = worker(worker_rank, workers, fully_sharded=fully_sharded)
                packed = pack(delta, sites, torch.device("cpu"))
                assert packed.size == size(*shape), (name, workers)


@pytest.mark.parametrize("fully_sharded", [False, True])
def test_room_for_a_delta_of_the_default_ratio(worker, tmp_path, fully_sharded):
    """A delta of every matrix fits, and little of the room is left."""
    from dqrelo_tools.method import METHODS
    from vllm_dqrelo.format.config import DEFAULT_RATIO
    from vllm_dqrelo.worker.limits import typical_bytes
    from vllm_dqrelo.worker.packed import pack

    size = {"times": 40, "tokens": 5000}
    names = ["column", "row", "head", "merged", "qkv", "one_head"]
    whole = worker(0, 1, [f"{name}.weight" for name in names], **size)
    stored = {}
    for name in names:
        n, k = whole.places(f"{name}.weight")[0].shape
        rank = METHODS["dqrelo"].size(n, k, DEFAULT_RATIO, torch.bfloat16).rank
        stored |= zeros(n, k, rank).tensors(f"{name}.weight")
    delta = write(tmp_path / "delta", stored)
    taken = []
    for workers in (1, 2):
        sites = worker(
            workers - 1,
            workers,
            [f"{name}.weight" for name in names],
            fully_sharded=fully_sharded,
            **size,
        )
        packed = pack(delta, sites, torch.device("cpu"))
        room = typical_bytes(sites)
        assert 0.9 * room <= packed.size <= room, workers
        taken.append(packed.size)
    assert taken[1] / taken[0] <= (0.53 if fully_sharded else 0.67)


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_comes_back_from_host_memory_as_it_was(
    worker, tmp_path, rank, fully_sharded
):
    """Two deltas take turns on the device of a worker that has half of each."""
    from vllm_dqrelo.worker.host import HostTier
    from vllm_dqrelo.worker.packed import pack
    from vllm_dqrelo.worker.residency import Residency

    cpu, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
    sites = worker(rank, 2, fully_sharded=fully_sharded)
    packed = []
    for i in range(2):
        stored = {}
        for name, n, k in (("column", 40, 24), ("row", 24, 40)):
            stored |= zeros(n, k, 64).tensors(f"{name}.weight")
        for name, tensor in stored.items():
            if not name.endswith(("_shape", "_packed")):  # whose padding stays clear
                some = torch.randint(1, 99, tensor.shape, generator=generator)
                stored[name] = some.to(tensor.dtype)
        packed.append(pack(write(tmp_path / str(i), stored), sites, cpu))
    assert not torch.equal(packed[0].extent, packed[1].extent)
    expected = [(delta.extent.clone(), delta.entries.clone()) for delta in packed]
    host = HostTier(packed[0].size)  # what is on the device is read back from it
    residency = Residency(sites, packed[0].size, 2, host, cpu)
    for delta in packed:
        host.put(delta)
    for turn in range(6):
        delta, (extent, table) = packed[turn % 2], expected[turn % 2]
        slot = residency.use([delta.digest])[delta.digest]
        assert torch.equal(residency.arena.data[: delta.size], extent), turn
        for name in ("column", "row"):
            site = sites.by_name[name]
            entries = table[site.first : site.first + 1]
            assert torch.equal(residency.table(site)[slot], entries), turn
    assert residency.evicted == 5


def test_a_bias_is_added_once(worker, tmp_path):
    """The outputs of row-parallel layers are summed, those of others are not."""
    from vllm_dqrelo.worker.packed import pack

    biases = {"row.bias": torch.arange(24.0), "column.bias": torch.arange(40.0)}
    delta = write(tmp_path / "delta", biases)
    found = {"row": [], "column": []}
    for rank in (0, 1):
        sites = worker(rank, 2)
        packed = pack(delta, sites, torch.device("cpu"))
        for name, parts in found.items():
            site = sites.by_name[name]
            offset = int(packed.entries[site.first, Field.BIAS])
            assert offset != ABSENT
            parts.append(read(packed.extent, offset, torch.float32, *site.sizes))
    assert torch.equal(sum(found["row"]), torch.arange(24.0) - 1)
    assert torch.equal(torch.cat(found["column"]), torch.arange(40.0) - 1)


class Executor:
    """Two workers, of which the second cannot read what is called "bad"."""

    def __init__(self):
        self.held = [set(), set()]
        self.read = ""

    def collective_rpc(self, call, args=()):
        return [getattr(self, call)(worker, *args) for worker in range(2)]

    def start_deltas(self, worker):
        from vllm_dqrelo.messages.load import Memory

        return Memory(1, (4096, 2048)[worker], 2**20, 1, 8, 1)

    def start_delta_load(self, worker, request, others):
        self.read = request.lora_path

    def delta_load_done(self, worker):
        return True

    def finish_delta_load(self, worker, keep):
        from vllm_dqrelo.messages.load import Loaded, Refused

        if worker and self.read == "bad":
            return Refused("a bad disk"), []
        self.held[worker].add(f"sha256:{self.read}")
        return Loaded(f"sha256:{self.read}", 1024 * (worker + 1)), []

    def forget_delta(self, worker, digest):
        self.held[worker].discard(digest)


def test_what_fails_in_one_worker_fails_in_all():
    from vllm.lora.request import LoRARequest

    from vllm_dqrelo.engine.deltas import Deltas

    executor = Executor()
    deltas = Deltas(executor, max_loras=1)
    good = deltas.add_lora(LoRARequest("good", 1, "good"))
    bad = deltas.add_lora(LoRARequest("bad", 2, "bad"))
    assert deltas.wait_for(good)
    with pytest.raises(Exception, match="a bad disk"):
        deltas.wait_for(bad)
    assert executor.held == [{"sha256:good"}] * 2
    assert deltas.list_loras() == {1}
    # The larger of the two parts must fit the smaller of the two arenas.
    assert deltas.sizes == {"sha256:good": 2048} and deltas.memory.arena == 2048


@pytest.fixture
def base_and_tuned(tmp_path, save_model):
    """A base with experts, biases and one head of k and v; a fine-tune adds tokens.

    Another lacks the base's last tokens, which are likely in the base.
    """
    experts = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "moe_intermediate_size": 40,  # 20 columns of a worker are not whole words
        "shared_expert_intermediate_size": 72,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    }
    config = Qwen2MoeConfig(**SHAPE | experts, **UNTIED)
    base = save_model(config, tmp_path / "base", 1)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][-FEWER:] *= 4
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for i, added_tokens in enumerate((-FEWER, 5)):
        model = tmp_path / f"model-{i}"
        save_model(config, model, 2 + i, added_tokens=added_tokens)
        for file in TOKENIZER_FILES:  # LLM has one tokenizer in a call
            (model / file).unlink(missing_ok=True)
        if added_tokens > 0:
            tensors = load_file(model / "model.safetensors")
            tensors["lm_head.weight"][-added_tokens:] *= 4
            save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        convert(str(base), str(model), tmp_path / f"delta-{i}", 0.25)
        export(str(base), tmp_path / f"delta-{i}", tmp_path / f"merged-{i}")
    return base, *([tmp_path / f"{x}-{i}" for i in (0, 1)] for x in ("delta", "merged"))


@pytest.mark.slow
@pytest.mark.v2
def test_workers_equal_each_model_alone(
    base_and_tuned, engine, answers, reference, difference, load, prompts, monkeypatch
):
    """Two that share all layers and both factors of a delta; and two pairs that have
    half of the layers each, and share one factor."""
    base, deltas, merged = base_and_tuned
    expected = [reference(folder, prompts) for folder in (base, *merged)]
    assert max(token for tokens, _, _ in expected[2] for token in tokens) >= 320
    assert max(token for tokens, _, _ in expected[0] for token in tokens) >= 320 - FEWER

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    order = [(p, m) for p in range(len(prompts)) for m in range(3)]
    for stages in (1, 2):
        llm = engine(
            base,
            quantization="dqrelo",
            max_loras=2,
            tensor_parallel_size=2,
            pipeline_parallel_size=stages,
            fully_sharded_loras=stages == 1,
            additional_config={
                "dqrelo": {
                    "delta_memory_gib": 0.001,
                    "added_tokens": 6,
                    "self_check": "always",
                }
            },
        )
        requests = [None] + [load(llm, folder.name, folder) for folder in deltas]
        got = answers(
            llm, [prompts[p] for p, _ in order], [requests[m] for _, m in order], 1
        )
        for (p, m), answer in zip(order, got, strict=True):
            assert difference(answer, expected[m][p]) <= TOLERANCE, (p, m, stages)
        with pytest.raises(Exception, match="is not a delta folder"):
            load(llm, "none", base)
        del llm
        gc.collect()
