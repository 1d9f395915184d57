# SPDX-License-Identifier: Apache-2.0
"""What crosses a process: plain values, and the path FOLDER#sha256:DIGEST."""

import pickle
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4  # as in test_serving.py
HEX = "0123456789abcdef" * 4
FOLDERS = ["d", "/d#1/math", "d#sha256:1/x", f"d#sha256:{HEX}/x", f"d#sha256:{HEX}"]


def test_what_crosses_arrives_as_it_was():
    from vllm_dqrelo.messages.load import Loaded, Memory, Refused, Usage
    from vllm_dqrelo.messages.report import Report
    from vllm_dqrelo.messages.request import Bound

    for sent in (
        Memory(1, 2, 3, 4, 5, 6),
        Usage(frozenset({"sha256:1"}), 1, 2, 3),
        Loaded("sha256:1", 5, 0.5, frozenset({"layer.2"})),
        Refused("a bad disk", missing=True),
        Report(loads=[0.5], finished=[("math", "stop", 1, 2)]),
        Bound("sha256:1", 1, "d#sha256:1", model="math"),
    ):
        assert pickle.loads(pickle.dumps(sent)) == sent


def test_the_calls_of_a_worker_have_names_of_their_own():
    """``collective_rpc`` finds them by name, among all that vLLM's workers have."""
    import inspect

    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    from vllm_dqrelo.engine import deltas
    from vllm_dqrelo.worker.calls import CALLS

    names = [call.__name__ for call in CALLS]
    assert all("delta" in name for name in names)
    theirs = {*vars(WorkerBase), *vars(WorkerWrapperBase)}
    added = {call.__name__ for call in CALLS if call in vars(WorkerBase).values()}
    assert not theirs.difference(added).intersection(names)
    called = re.findall(r'_rpc\(\s*"(\w+)"', inspect.getsource(deltas))
    assert {*called, "delta_status"} == {*names}


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_path_is_cut_where_it_was_joined(folder):
    from vllm_dqrelo.messages.request import path_with_digest, split_path

    digest = f"sha256:{HEX[::-1]}"
    assert split_path(path_with_digest(folder, digest)) == (Path(folder), digest)


@pytest.mark.parametrize("folder", FOLDERS[:-1])  # the last one does end in a digest
def test_a_path_without_a_digest_is_a_folder(folder):
    from vllm_dqrelo.messages.request import split_path

    assert split_path(folder) == (Path(folder), None)


def test_a_delta_below_a_folder_with_a_number_sign_is_read_again(
    family, alone, engine, load, tmp_path, prompts, answers, difference
):
    """It is not in memory when it is asked for: its folder is looked for again."""
    from vllm.lora.request import LoRARequest

    made, expected = family("llama"), alone("llama")
    options = {"dqrelo": {"delta_memory_gib": 0.001, "host_memory_gib": 0}}
    llm = engine(made.base, quantization="dqrelo", additional_config=options)
    requests = []
    for i in range(2):
        folder = tmp_path / "d#1" / str(i)
        shutil.copytree(made.deltas[i], folder)
        if i:  # as a client of vLLM names it
            requests.append(LoRARequest("other", 2, str(folder)))
            llm.llm_engine.add_lora(requests[i])
        else:
            requests.append(load(llm, "one", folder))
    deltas = llm.llm_engine.engine_core.engine_core.scheduler.deltas
    assert not deltas.ready
    got = answers(llm, prompts[:1] * 2, requests)
    for i in range(2):
        assert difference(got[i], expected[i + 1][0]) <= TOLERANCE
