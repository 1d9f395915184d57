# SPDX-License-Identifier: Apache-2.0
"""The caller of the LM head says which rows it sees; a call without is an error."""

import numpy as np
import pytest
import torch

from vllm_dqrelo.worker.step import Step

TOKENS = np.array([3, 1, 2])  # of three requests


@pytest.fixture
def step():
    """Requests of slot 1, of the base and of slot 0."""
    step = Step(8, 2, 4, "cpu")
    step.set(np.array([1, -1, 0], dtype=np.int32), TOKENS)
    return step


def slots(groups, count):
    return groups.by_row.tolist()[:count]


def test_the_rows_of_tokens(step):
    assert slots(step.tokens, 7) == [1, 1, 1, -1, 0, 0, -1]


def test_the_rows_that_are_sampled(step):
    hidden = torch.zeros(6, 4)
    with step.sampled_rows(np.array([1, 1, 1])):
        assert slots(step.head_rows(hidden[:3]), 4) == [1, -1, 0, -1]
    with step.sampled_rows(np.array([2, 0, 1])):  # with drafts
        assert slots(step.head_rows(hidden[:3]), 4) == [1, 1, 0, -1]


def test_the_rows_of_prompts(step):
    hidden = torch.zeros(8, 4)  # a graph has more rows than the step
    with step.prompt_rows(hidden):
        for first, last in ((0, 6), (2, 5), (5, 6)):
            found = slots(step.head_rows(hidden[first:last]), last - first)
            assert found == [1, 1, 1, -1, 0, 0][first:last]


@pytest.mark.parametrize(("first", "last", "known"), [(0, 7, 6), (5, 8, 1), (7, 8, 0)])
def test_rows_beyond_the_step_are_an_error(step, first, last, known):
    hidden = torch.zeros(8, 4)
    message = f"with {last - first} rows, expected {known};"
    with step.prompt_rows(hidden), pytest.raises(RuntimeError, match=message):
        step.head_rows(hidden[first:last])


def test_rows_that_are_no_slice_are_an_error(step):
    hidden = torch.zeros(8, 4)
    others = [hidden[2:].flatten()[1:5].view(1, 4), hidden[:2]]
    for scope, other in zip((hidden, hidden[4:]), others, strict=True):
        with step.prompt_rows(scope), pytest.raises(RuntimeError, match="not a slice"):
            step.head_rows(other)


@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 2, 2], [2]])
def test_another_number_of_sampled_rows_is_an_error(step, counts):
    error = pytest.raises(RuntimeError, match="with 4 rows, expected .;")
    with step.sampled_rows(np.array(counts)), error:
        step.head_rows(torch.zeros(4, 4))


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 1, 1]])
def test_another_number_of_requests_is_an_error(step, counts):
    with step.sampled_rows(np.array(counts)), pytest.raises(ValueError):
        step.head_rows(torch.zeros(4, 4))


def test_a_call_outside_of_a_scope_is_an_error_where_there_are_deltas(step):
    hidden = torch.zeros(3, 4)
    message = "does not know the delta of each row"
    with pytest.raises(RuntimeError, match=message):
        step.head_rows(hidden)
    for scope in (step.sampled_rows(np.array([1, 1, 1])), step.prompt_rows(hidden)):
        with scope:
            step.head_rows(hidden)
        with pytest.raises(RuntimeError, match=message):
            step.head_rows(hidden)
    step.set(np.array([-1, -1], dtype=np.int32))
    assert slots(step.head_rows(hidden), 8) == [-1] * 8
    assert not int(step.head_rows(hidden).num_active)
