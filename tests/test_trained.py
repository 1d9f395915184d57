# SPDX-License-Identifier: Apache-2.0
"""A model in memory becomes a delta: as ``convert`` makes one of a saved model."""

import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dqrelo_tools.convert import convert
from vllm_dqrelo import delta_of
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError


def trained(folder) -> torch.nn.Module:
    """A model in memory."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Where temporary folders are."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


@pytest.mark.parametrize("kind", ["llama-tied", "llama"])
def test_a_model_and_its_state_dict_are_what_convert_makes_of_their_files(
    kind, family, tmp_path, scratch
):
    made = family(kind)
    model = trained(made.models[0])
    model.save_pretrained(tmp_path / "saved")
    convert(str(made.base), str(tmp_path / "saved"), tmp_path / "delta")
    expected = Delta(tmp_path / "delta").config.digest
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for given in (model, model.state_dict(), torch.nn.ModuleDict({"module": model})):
        delta = delta_of(str(made.base), given)
        assert delta.config.digest == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    kept = delta.save_pretrained(tmp_path / "kept")
    del delta
    gc.collect()
    assert not list(scratch.iterdir())
    assert Delta(kept).config.digest == expected


def test_a_tokenizer_of_its_own_comes_along(family, own):
    made = family("llama")
    words = AutoTokenizer.from_pretrained(own.merged)
    model = trained(made.models[0])
    delta = delta_of(str(made.base), model, tokenizer=words)
    found = AutoTokenizer.from_pretrained(delta.folder)
    assert found.get_vocab() == words.get_vocab()
    assert not (delta_of(str(made.base), model).folder / "tokenizer.json").exists()


def test_of_a_model_of_peft_the_adapter_is_taken(family):
    made = family("llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    delta = delta_of(str(made.base), get_peft_model(trained(made.base), config))
    assert delta.config.method == "lora"
    name = "model.layers.0.self_attn.q_proj.weight"
    assert name in delta.matrices and delta.matrix(name).rank == 4


def test_what_cannot_be_a_delta_is_refused_and_nothing_stays(family, scratch):
    made = family("llama")
    base, model = str(made.base), trained(made.models[0])
    weights = model.state_dict()
    extra = {**weights, "_extra_state": 1}
    bad = {
        "the model in memory has the weights": trained(made.base),
        r"the model in memory is not a fine-tune.*\n.*norm": {
            name: tensor for name, tensor in weights.items() if "norm" not in name
        },
        "_extra_state is of type int, expected a tensor": extra,
        "NaN": {name: tensor * float("nan") for name, tensor in weights.items()},
    }
    for reason, given in bad.items():
        with pytest.raises(DqreloError, match=reason) as refused:
            delta_of(base, given)
        assert str(scratch) not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        delta_of(str(made.base / "missing"), model)
    assert not list(scratch.iterdir())


def test_a_sharded_parameter_is_refused(family):
    from torch.distributed.tensor import DTensor

    weights = trained(family("llama").models[0]).state_dict()
    name = next(iter(weights))
    weights[name] = torch.Tensor._make_subclass(DTensor, weights[name])
    with pytest.raises(DqreloError, match="is sharded; gather the parameters"):
        delta_of(str(family("llama").base), weights)


def test_a_full_disk_says_nothing_of_a_second_try(family, scratch, monkeypatch):
    saved = []

    def filling(*args, **options):
        saved.append(args)
        if len(saved) == 3:
            raise OSError("No space left on device")
        save_file(*args, **options)

    monkeypatch.setattr("dqrelo_tools.journal.save_file", filling)
    made = family("llama")
    with pytest.raises(DqreloError, match="is full") as refused:
        delta_of(str(made.base), trained(made.models[0]))
    assert "goes on from there" not in str(refused.value)
    assert len(saved) == 3 and not list(scratch.iterdir())
