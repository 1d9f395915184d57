# SPDX-License-Identifier: Apache-2.0
"""What serving does on a GPU only, on a CPU."""

import pytest
import torch


@pytest.fixture(name="merges")
def merges_fixture(monkeypatch):
    """What a GPU does with prompts, here: weights stay readable, 4 rows are merged.

    Returns:
        a list with an element for every matrix that was made.
    """
    from vllm.model_executor.layers import utils

    from vllm_dqrelo.worker import compat, limits

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    def counted(*arguments):
        made.append(arguments)
        return merge(*arguments)

    made, merge = [], torch.ops.dqrelo.merge_
    gemm = utils.cpu_unquantized_gemm
    monkeypatch.setattr(torch.ops.dqrelo, "merge_", counted)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
    monkeypatch.setattr(
        compat,
        "multiplies_by_weight",
        lambda method: getattr(method, "_gemm_impl", None) is gemm,
    )
    rows, gpu = limits.merge_rows, torch.device("cuda")
    monkeypatch.setattr(limits, "MERGE_ROWS", 4)
    monkeypatch.setattr(limits, "merge_rows", lambda c, _, sites: rows(c, gpu, sites))
    return made


@pytest.fixture(name="like_a_gpu")
def like_a_gpu_fixture(monkeypatch):
    """Deltas lie in memory as on a GPU, and Triton's interpreter computes with them."""
    from support import interpreter  # before the kernels

    from vllm_dqrelo.worker import packed

    monkeypatch.setattr(packed._Extent, "side_by_side", False)
    with interpreter.launchers():
        yield
