# SPDX-License-Identifier: Apache-2.0
import itertools

import numpy as np
import pytest
import torch

from dqrelo_kernels.rows import ExpertGroups, RowGroups


def test_the_example_of_the_docstring():
    groups = RowGroups(capacity=6, slots=3, device="cpu")
    groups.set(np.array([2, -1, 0, 2], dtype=np.int32))
    assert groups.rows.tolist() == [2, 0, 3, -1, -1, -1]
    assert groups.slots.tolist() == [0, 2, 2, -1, -1, -1]
    assert groups.starts.tolist() == [0, 1, 1, 3]
    assert groups.by_row.tolist() == [2, -1, 0, 2, -1, -1]
    assert groups.num_active.tolist() == [2]


def test_the_merged_slots_of_the_docstring():
    groups = RowGroups(capacity=6, slots=3, device="cpu", merge_rows=2)
    groups.set(np.array([2, -1, 0, 2], dtype=np.int32))
    assert groups.rows.tolist() == [2, 0, 3, -1, -1, -1]
    assert groups.starts.tolist() == [0, 1, 1, 1]
    assert groups.merged.tolist() == [[2, 1, 3], [-1, -1, -1], [-1, -1, -1]]
    assert groups.unmerged.tolist() == [1, 2, 4, 5, -1, -1]
    assert groups.num_active.tolist() == [2]


def steps(random):
    """Random steps, some of them of the base alone, also one after another."""
    for _ in range(10):
        slot_of_row = random.integers(-1, 5, random.integers(0, 41)).astype(np.int32)
        yield slot_of_row if random.random() < 0.5 else np.full_like(slot_of_row, -1)


def test_a_copy_that_comes_late(monkeypatch):
    """A device copies when it gets to it, and may be more than one step behind."""
    groups, late = RowGroups(capacity=3, slots=2, device="cpu"), []
    copy_ = torch.Tensor.copy_

    def delayed(self, source, non_blocking=False):
        late.append((self, source, non_blocking))

    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "copy_", delayed)
        for slot_of_row in ([1, -1], [0, 0, 1]):
            groups.set(np.array(slot_of_row, dtype=np.int32))
    for (target, source, non_blocking), by_row in zip(
        late, ([1, -1, -1], [0, 0, 1]), strict=True
    ):
        copy_(target, source)
        assert groups.by_row.tolist() == by_row
        assert non_blocking


@pytest.mark.parametrize("seed", range(8))
def test_merged_slots_against_a_plain_loop(seed):
    random = np.random.default_rng(seed)
    groups = RowGroups(capacity=40, slots=5, device="cpu", merge_rows=6)
    for slot_of_row in steps(random):
        groups.set(slot_of_row)
        of = {s: [i for i, t in enumerate(slot_of_row) if t == s] for s in range(5)}
        merged = [s for s in range(5) if len(of[s]) >= 6]
        separate = [s for s in range(5) if s not in merged]
        rows = [i for s in separate + merged for i in of[s]]
        assert groups.rows.tolist()[: len(rows)] == rows
        assert groups.slots.tolist()[: len(rows)] == [slot_of_row[i] for i in rows]
        starts = groups.starts.tolist()
        for slot in range(5):
            want = of[slot] if slot in separate else []
            assert rows[starts[slot] : starts[slot + 1]] == want
        found = {s: rows[a:b] for s, a, b in groups.merged.tolist() if s >= 0}
        assert found == {s: of[s] for s in merged}
        others = sorted(set(range(40)) - {i for s in merged for i in of[s]})
        assert groups.unmerged.tolist() == others + [-1] * (40 - len(others))


@pytest.mark.parametrize("seed", range(8))
def test_against_a_plain_loop_and_reused_buffers(seed):
    random = np.random.default_rng(seed)
    groups = RowGroups(capacity=40, slots=5, device="cpu")
    addresses = [t.data_ptr() for t in (groups.rows, groups.slots, groups.starts)]
    for slot_of_row in steps(random):
        groups.set(slot_of_row)
        rows, starts = [], [0]
        for slot in range(5):
            rows += [i for i, s in enumerate(slot_of_row) if s == slot]
            starts.append(len(rows))
        tail = [-1] * (40 - len(rows))
        assert groups.rows.tolist() == rows + tail
        assert groups.slots.tolist() == [int(slot_of_row[i]) for i in rows] + tail
        assert groups.starts.tolist() == starts
        assert groups.by_row.tolist()[: len(slot_of_row)] == slot_of_row.tolist()
        assert set(groups.by_row.tolist()[len(slot_of_row) :]) <= {-1}
        assert groups.num_active.item() == len(set(slot_of_row.tolist()) - {-1})
    assert addresses == [
        t.data_ptr() for t in (groups.rows, groups.slots, groups.starts)
    ]


def test_too_many_rows():
    with pytest.raises(ValueError, match="3 rows, room for 2"):
        RowGroups(2, 1, "cpu").set(np.zeros(3, dtype=np.int32))


def test_only_in_a_step_without_deltas_a_layer_is_vllms_own():
    from vllm_dqrelo.worker.step import Step

    class Delta(torch.nn.Linear):
        pass

    layer = torch.nn.Linear(2, 2)
    layer.quant_method = "own"
    step, base = Step(4, 2, 8, "cpu"), np.array([-1, -1], dtype=np.int32)
    step.put(layer, "quant_method", "delta")
    step.put(layer, "__class__", Delta)
    step.set(base)  # a graph may be captured, the probe of coverage run
    assert not step.skipping and (layer.quant_method, type(layer)) == ("delta", Delta)
    step.may_skip = True
    for _ in range(2):
        step.set(base)
        assert step.skipping and type(layer) is torch.nn.Linear
        assert layer.quant_method == "own"
        step.set(np.array([-1, 1], dtype=np.int32))
        assert not step.skipping and type(layer) is Delta
        assert layer.quant_method == "delta"


def expert_groups(slot_of_row, expert_of_row, slots, experts):
    return ExpertGroups.of(
        torch.tensor(slot_of_row, dtype=torch.int32),
        torch.tensor(expert_of_row),
        slots,
        experts,
    )


def test_the_experts_of_the_docstring():
    groups = expert_groups([2, -1, 0, 2], [0, 0, 1, 0], slots=3, experts=2)
    assert groups.rows.tolist() == [2, 0, 3, -1]
    assert groups.slots.tolist() == [1, 4, 4, -1]
    assert groups.starts.tolist() == [0, 0, 1, 1, 1, 3, 3]


@pytest.mark.parametrize("seed", range(8))
def test_experts_against_a_plain_loop(seed):
    random = np.random.default_rng(seed)
    for slot_of_row in steps(random):
        expert_of_row = random.integers(0, 7, len(slot_of_row))
        groups = expert_groups(slot_of_row, expert_of_row, slots=5, experts=7)
        pairs = [(slot, expert) for slot in range(5) for expert in range(7)]
        chosen = list(zip(slot_of_row, expert_of_row, strict=True))
        of = [[i for i, one in enumerate(chosen) if one == pair] for pair in pairs]
        rows = [i for group in of for i in group]
        behind = [-1] * (len(slot_of_row) - len(rows))
        assert groups.rows.tolist() == rows + behind
        want = [7 * slot_of_row[i] + expert_of_row[i] for i in rows]
        assert groups.slots.tolist() == want + behind
        starts = groups.starts.tolist()
        assert [rows[a:b] for a, b in itertools.pairwise(starts)] == of
        assert groups.rows.dtype == groups.slots.dtype == groups.starts.dtype
        assert groups.rows.dtype == torch.int32
