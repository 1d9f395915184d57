# SPDX-License-Identifier: Apache-2.0
"""Small jobs at the same time, large ones alone, results in order."""

import threading

import pytest
import torch

from dqrelo_tools.parallel import MOST, results


@pytest.fixture(autouse=True)
def two_threads():
    """As on a machine with two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if threads_of_a_new_thread() != 2:
        torch.set_num_threads(before)
        pytest.skip("an engine that ran in this process limits torch's threads")
    yield
    torch.set_num_threads(before)


def threads_of_a_new_thread():
    """As torch counts them."""
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return seen[0]


def test_small_jobs_meet_and_a_large_one_is_alone():
    both, running, seen = threading.Barrier(2, timeout=60), set(), {}
    before = threads_of_a_new_thread()

    def small(number):
        running.add(number)
        both.wait()  # fails unless another small job runs now
        seen[number] = torch.get_num_threads()
        running.discard(number)
        return number

    def large(number):
        assert not running
        seen[number] = torch.get_num_threads()
        return number

    def jobs():
        for number in range(9):
            is_small = number != 4
            job = small if is_small else large
            yield is_small, lambda job=job, number=number: job(number)

    assert list(results(jobs())) == list(range(9))
    assert seen == {number: 2 if number == 4 else 1 for number in range(9)}
    assert torch.get_num_threads() == 2 and threads_of_a_new_thread() == before


def test_few_results_wait():
    """A machine with many cores does not hold a model in memory."""
    taken = []

    def jobs():
        for number in range(100):
            taken.append(number)
            yield True, lambda number=number: number

    for number in results(jobs()):
        assert len(taken) <= number + 2 + min(2, MOST)


def test_a_failure_is_raised_in_its_place():
    def fail():
        raise ValueError("no")

    got = results((True, job) for job in (lambda: 0, fail, lambda: 2))
    assert next(got) == 0
    with pytest.raises(ValueError, match="no"):
        next(got)
    assert torch.get_num_threads() == 2
