# SPDX-License-Identifier: Apache-2.0
"""Bytes of a base and of a delta, against what the server lays out and keeps."""

import json
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM

from dqrelo_tools import footprint
from dqrelo_tools.footprint import base_bytes, bytes_of, delta_bytes
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["llama-tied", "llama", "qwen2"])
def test_a_delta_takes_what_the_server_packs(family, kind):
    pytest.importorskip("vllm")
    from vllm_dqrelo.worker.packed import pack
    from vllm_dqrelo.worker.sites import Place, Site

    for folder in family(kind).deltas:
        delta = Delta(folder)

        def places(name, tied, delta=delta):
            matrix = name in delta.matrices
            n, k = (
                delta.matrix(name).shape
                if matrix
                else (*delta.parameter(name).shape, 0)
            )
            return [Place(Site(name, None, 0, (n,), k, (n,), k), 0, "weight")]

        sites = types.SimpleNamespace(
            count=1,
            places=places,
            added_tokens=0,
            tokens=0,
            by_name={},
        )
        assert delta_bytes(str(folder)) == pack(delta, sites, torch.device("cpu")).size


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_a_base_takes_16_bits_a_weight(family, kind):
    base = family(kind).base
    model = AutoModelForCausalLM.from_pretrained(base)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert base_bytes(str(base)) == 2 * weights
    assert bytes_of("1.5GB", base_bytes) == 1_500_000_000
    assert bytes_of(str(base), base_bytes) == 2 * weights


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["llama-tied", "llama", "qwen2", "mixtral"])
def test_a_base_on_the_cpu_takes_what_vllm_keeps(family, engine, kind, monkeypatch):
    """The parameters that are left once vLLM has packed some, and what it packed."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    pack, packed = utils.dispatch_cpu_unquantized_gemm, []

    def noted(layer, remove_weight):
        packed.append(layer.weight.nbytes)
        pack(layer, remove_weight)

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", noted)
    base = family(kind).base
    core = engine(base, quantization="dqrelo").llm_engine.engine_core.engine_core
    model = core.model_executor.driver_worker.worker.model_runner.model
    held = sum(packed) + sum(parameter.nbytes for parameter in model.parameters())
    for layer in model.modules():
        if isinstance(layer, RoutedExperts):  # whose width is filled up to 32s
            more = layer.w2_weight.shape[2] - layer.intermediate_size_per_partition
            held -= 4 * 3 * more * layer.hidden_size * layer.local_num_experts
    assert 2 * base_bytes(str(base), "cpu") == held  # in 32 bits


def test_a_base_without_a_matrix_of_the_vocabulary(family, tmp_path):
    base = shutil.copytree(family("llama").base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 321}))
    assert base_bytes(str(base)) == base_bytes(str(family("llama").base))
    with pytest.raises(DqreloError, match="no matrix of 321 rows"):
        base_bytes(str(base), "cpu")


def test_a_model_on_the_hub_is_described_not_fetched(monkeypatch, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"vocab_size": 3}')

    def described(self, repo_id):
        weights = {
            "a": types.SimpleNamespace(dtype="BF16", shape=[3, 5]),
            "b": types.SimpleNamespace(dtype="F32", shape=[7]),
            "c": types.SimpleNamespace(dtype="F8_E4M3", shape=[2, 2]),
        }
        file = types.SimpleNamespace(tensors=weights)
        return types.SimpleNamespace(files_metadata={repo_id: file})

    monkeypatch.setattr(footprint.HfApi, "get_safetensors_metadata", described)
    monkeypatch.setattr(footprint, "hf_hub_download", lambda *_: str(config))
    assert base_bytes("owner/model") == 2 * 15 + 2 * 7 + 4
    assert base_bytes("owner/model", "cpu") == 2 * 15 + 2 * 7 + 4 + 2 * 2 * 15
