# SPDX-License-Identifier: Apache-2.0
"""A folder of another kind than was expected: named in one line, with the way out."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dqrelo_tools.cli import main

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder that opens as a model."""
    return model(tmp_path / "base")


def model(folder: Path) -> Path:
    """A model of one parameter."""
    files(folder, "config.json")
    save_file({"norm.weight": torch.ones(4)}, folder / "model.safetensors")
    return folder


def files(folder: Path, *names: str, text: str = "{}") -> Path:
    """A folder of small files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def refused(capsys, arguments: list[object]) -> str:
    """The error of a command, which must be one line."""
    assert main([str(argument) for argument in arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dqrelo: error: ")
    assert error.count("\n") == 1
    return error


def converting(base: object, model: object) -> list[object]:
    """The command that would convert."""
    return ["convert", "--base", base, "--model", model, "--output", "/no/such/delta"]


KINDS = {
    "gguf": (["config.json", "m-q4.gguf"], "GGUF files (m-q4.gguf)"),
    "deepspeed": (
        ["config.json", "zero_to_fp32.py", "latest", "global_step5/a_optim_states.pt"],
        "/given/zero_to_fp32.py ",
    ),
    "deepspeed, nothing else": (["global_step5/x.pt"], "DeepSpeed"),
    "fsdp": (
        [
            "config.json",
            "optimizer_0/__0_0.distcp",
            "pytorch_model_fsdp_0/__0_0.distcp",
        ],
        "/pytorch_model_fsdp_0 OUTPUT",
    ),
    "fsdp, its folder": (["__0_0.distcp", ".metadata"], "accelerate merge-weights"),
    "megatron": (
        ["latest_checkpointed_iteration.txt", "iter_0000005/__0_0.distcp"],
        "Megatron",
    ),
    "meta": (["params.json", "consolidated.00.pth"], "convert_llama_weights_to_hf"),
    "mistral": (
        ["params.json", "consolidated.safetensors"],
        "format of Meta or Mistral",
    ),
    "pickle": (
        ["config.json", "pytorch_model.bin"],
        "pickle files (pytorch_model.bin)",
    ),
    "pickles": (["config.json", "pytorch_model-00001-of-00002.bin"], "pickle files"),
    "torchtune": (["config.json", "hf_model_0001_0.pt"], "pickle files"),
    "lightning": (["epoch=1.ckpt"], "pickle files (epoch=1.ckpt)"),
    "pickled adapter": (
        ["adapter_config.json", "adapter_model.bin"],
        "Load the adapter with PEFT",
    ),
    "tensorflow": (["config.json", "tf_model.h5"], "TensorFlow or Flax"),
    "flax": (["config.json", "flax_model.msgpack"], "TensorFlow or Flax"),
    "onnx": (["config.json", "onnx/model.onnx"], "ONNX files"),
    "mlx": (["config.json", "weights.npz"], "MLX"),
    "diffusers": (["model_index.json"], "diffusers"),
    "no index": (
        ["config.json", "model-00001-of-00002.safetensors"],
        "without their index",
    ),
    "other name": (["config.json", "weights.safetensors"], "(weights.safetensors)"),
    "incomplete": (
        ["config.json", ".cache/huggingface/download/abc.incomplete"],
        "download is incomplete",
    ),
    "checkpoints": (
        [
            "training_args.bin",
            "checkpoint-500/config.json",
            "checkpoint-1000/config.json",
            "checkpoint-99/config.json",
        ],
        "checkpoint-99, checkpoint-500, checkpoint-1000. Give ",
    ),
    "checkpoints of FSDP": (["checkpoint-5/x/__0_0.distcp"], "checkpoint-5. Give "),
    "checkpoints of adapters": (["checkpoint-5/adapter_config.json"], "checkpoint-5. "),
    "final": (
        ["checkpoint-5/config.json", "final/config.json", "runs/x"],
        "/final",
    ),
    "cache": (["snapshots/abc/config.json", "refs/main"], "/snapshots/abc"),
    "empty": ([], "it is empty"),
    "without weights": (["config.json", "tokenizer.json"], "but not its weights"),
    "something": (["README.md"], "it has README.md, but not config.json"),
    "delta": (["delta_config.json", "delta_model.safetensors"], "dqrelo export"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["base", "model"])
def test_kind_is_named(kind, side, base, tmp_path, capsys):
    """As the base and as the fine-tune; in the folder or with a slash at its end."""
    names, what = KINDS[kind]
    folder = tmp_path / "given"
    folder.mkdir()
    files(folder, *names)
    if "adapter_config.json" in names:
        config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if side == "base" and "adapter" in kind and "checkpoints" not in kind:
        what = "it is a LoRA adapter"
    sides = (folder, base) if side == "base" else (base, f"{folder}/")
    error = refused(capsys, converting(*sides))
    assert what in error
    assert str(folder) in error


def test_the_newest_checkpoint_is_given(base, tmp_path, capsys):
    files(tmp_path / "out", "checkpoint-900/config.json", "checkpoint-1000/config.json")
    error = refused(capsys, converting(base, tmp_path / "out"))
    assert error.endswith(f"Give {tmp_path / 'out' / 'checkpoint-1000'}\n")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer.model"]
)
@pytest.mark.parametrize("side", ["base", "model"])
def test_pointer(name, side, base, tmp_path, capsys):
    """A pointer is never taken for the file, nor a tokenizer for the fine-tune's."""
    other = model(tmp_path / "other")
    files(other, name, text=POINTER)
    sides = (other, base) if side == "base" else (base, other)
    error = refused(capsys, converting(*sides))
    assert f"Git LFS pointers, not the files ({name}). Run git lfs pull" in error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_dangling_link(name, base, tmp_path, capsys):
    other = model(tmp_path / "other")
    (other / name).unlink(missing_ok=True)
    (other / name).symlink_to("../blobs/0123")
    error = refused(capsys, converting(base, other))
    assert f"{name} is a link to ../blobs/0123, which does not exist" in error


def test_paths(base, tmp_path, capsys, monkeypatch):
    """A file, a dangling link to a folder, an empty name; "~" and "." work."""
    other = model(tmp_path / "other")
    error = refused(capsys, converting(base, other / "model.safetensors"))
    assert f"it is a file. Give the folder that it is in, {other}" in error
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert "gone, which does not exist" in refused(
        capsys, converting(base, tmp_path / "link")
    )
    assert "empty name" in refused(capsys, converting(base, ""))
    assert "neither a folder nor a model" in refused(
        capsys, converting(base, "someone/nothing")
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(base)
    error = refused(capsys, converting("~/base/", "."))
    assert "nothing to store" in error
    assert "no-delta is not a delta folder" in refused(
        capsys, ["inspect", "~/no-delta"]
    )


DELTAS = {
    "model": (["config.json", "model.safetensors"], "Convert it first"),
    "adapter": (["adapter_config.json"], "it is a LoRA adapter. Convert it first"),
    "below": (["mine/delta_config.json"], "mine. Give "),
    "empty": ([], "it is empty"),
    "without tensors": (["delta_config.json"], "but not its weights"),
    "missing": (None, "it does not exist"),
}


@pytest.mark.parametrize("kind", DELTAS)
@pytest.mark.parametrize("command", ["inspect", "verify", "export", "serve"])
def test_not_a_delta(kind, command, base, tmp_path, capsys, converted):
    names, what = DELTAS[kind]
    folder = tmp_path / "given"
    if names is not None:
        folder.mkdir()
        files(folder, *names)
    if kind == "without tensors":
        (folder / "delta_config.json").write_bytes(converted)
    options = {
        "inspect": [folder],
        "verify": ["--base", base, "--delta", folder],
        "export": ["--base", base, "--delta", folder, "--output", tmp_path / "out"],
        "serve": [base, "--delta", f"a={folder}"],
    }
    error = refused(capsys, [command, *options[command]])
    assert f"{folder} is not a delta folder: " in error
    assert what in error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def converted(base: Path, tmp_path: Path) -> bytes:
    """The delta_config.json of a delta of ``base``."""
    tuned = model(tmp_path / "tuned")
    save_file({"norm.weight": torch.zeros(4)}, tuned / "model.safetensors")
    delta = tmp_path / "converted"
    arguments = ["--base", base, "--model", tuned, "--output", delta]
    assert main(["convert", *map(str, arguments)]) == 0
    return (delta / "delta_config.json").read_bytes()


def test_delta_with_a_pointer(base, tmp_path, capsys, converted):
    """A tokenizer that Git LFS did not fetch, for one."""
    delta = tmp_path / "converted"
    files(delta, "tokenizer.json", text=POINTER)
    error = refused(capsys, ["verify", "--base", base, "--delta", delta])
    assert "Git LFS pointers" in error


def test_config_is_not_an_object(base, tmp_path, capsys):
    other = model(tmp_path / "other")
    (other / "config.json").write_text(json.dumps([1]))
    assert "is not a JSON object" in refused(capsys, converting(base, other))


def test_weights_without_config(base, tmp_path, capsys):
    other = model(tmp_path / "other")
    os.remove(other / "config.json")
    assert "Copy the config.json" in refused(capsys, converting(base, other))
