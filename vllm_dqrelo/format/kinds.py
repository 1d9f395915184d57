# SPDX-License-Identifier: Apache-2.0
"""Folders that are not a model, a delta or an adapter: their kind, and the way out."""

import re
from collections.abc import Iterator
from pathlib import Path

from vllm_dqrelo.format.errors import DqreloError

POINTER = b"version https://git-lfs"
POINTER_BYTES = 1024  # a pointer is never larger
READ = {".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken"}
SHOWN = 3  # files that a message names
CONVERTED = "convert the 16-bit safetensors checkpoint that they were made from"
MARKS = {
    "model": "config.json",
    "adapter": "adapter_config.json",
    "delta": "delta_config.json",
}
# What a folder is whose MARK is there, and what to do with it.
OTHERS = {
    ("delta", "model"): "it is a delta. Give the fine-tune, or write base and delta as "
    "a model with dqrelo export",
    ("adapter", "model"): "it is a LoRA adapter. Give its base as --base and the "
    "adapter as --model",
    ("model", "delta"): "it is a model. Convert it first, with dqrelo convert",
    ("adapter", "delta"): "it is a LoRA adapter. Convert it first, with dqrelo convert",
}
# Pickles that a trainer writes next to the weights.
STATES = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state|random_states")
# Patterns of files, and what a folder is that has them: {files} are the first of them,
# {parent} the folder that they are in.
FORMATS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("*.gguf",), f"it has GGUF files ({{files}}); {CONVERTED}"),
    (
        ("latest_checkpointed_iteration.txt", "iter_*", "mp_rank_*", "*.nemo"),
        (
            "it is a checkpoint of Megatron or NeMo ({files}). Convert it to the "
            "Hugging Face format with Megatron Bridge or the trainer's own script"
        ),
    ),
    (
        ("zero_to_fp32.py", "global_step*"),
        (
            "it is a DeepSpeed checkpoint ({files}). Run python "
            "{parent}/zero_to_fp32.py {parent} OUTPUT --safe_serialization, copy "
            "config.json into OUTPUT and give OUTPUT"
        ),
    ),
    (
        ("pytorch_model_fsdp*/*.distcp", "*.distcp", "*/*.distcp"),
        (
            "it has shards of FSDP ({files}). Run accelerate merge-weights {parent} "
            "OUTPUT, copy config.json into OUTPUT and give OUTPUT"
        ),
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth"),
        (
            "it has weights in the format of Meta or Mistral ({files}). Take the same "
            "checkpoint in the Hugging Face format, or convert it with transformers' "
            "convert_llama_weights_to_hf.py or convert_mistral_weights_to_hf.py"
        ),
    ),
    (
        ("adapter_model.bin", "adapter_model.pt"),
        (
            "it holds pickle files ({files}), which can run code when opened. Load the "
            "adapter with PEFT, save it with save_pretrained and give that folder"
        ),
    ),
    (
        ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"),
        (
            "it holds pickle files ({files}), which can run code when opened. Save the "
            "model with save_pretrained(..., safe_serialization=True) and give that "
            "folder"
        ),
    ),
    (
        ("*.h5", "*.msgpack", "saved_model.pb"),
        (
            "it has weights of TensorFlow or Flax ({files}). Load them with from_tf "
            "or from_flax in transformers 4, save with save_pretrained and give that "
            "folder"
        ),
    ),
    (("*.onnx", "*/*.onnx"), f"it has ONNX files ({{files}}); {CONVERTED}"),
    (("*.npz",), f"it has weights of MLX ({{files}}); {CONVERTED}"),
    (
        ("model_index.json",),
        "it is a pipeline of diffusers ({files}), not a language model",
    ),
    (
        ("*-of-*.safetensors",),
        (
            "it has shards ({files}) without their index. Download or copy the file "
            "that ends with .safetensors.index.json, too"
        ),
    ),
    (
        ("*.safetensors",),
        (
            "its weights have another name ({files}). Save the model with "
            "save_pretrained, or rename the file"
        ),
    ),
    (
        ("*.incomplete", "*.part", "*.aria2", "*.crdownload", ".cache/**/*.incomplete"),
        "its download is incomplete ({files}). Download it again",
    ),
)


def explain(path: Path, wanted: str) -> str:
    """Why ``path`` is not a folder of the kind ``wanted``, and the way out.

    Args:
        path: does not have the weights of such a folder.
        wanted: a key of MARKS.
    """
    article = "an" if wanted == "adapter" else "a"
    return f"{path} is not {article} {wanted} folder: {_reason(path, wanted)}"


def _reason(path: Path, wanted: str) -> str:
    if path.is_symlink() and not path.exists():
        return f"it is a link to {path.readlink()}, which does not exist"
    if path.is_file():
        return f"it is a file. Give the folder that it is in, {path.parent}"
    if not path.is_dir():
        may_be_on_hub = wanted == "delta" and not path.is_absolute()
        if may_be_on_hub and len(path.parts) == 2:
            fetch = f"hf download {path} --local-dir FOLDER"
            return (
                f"it does not exist. If it is on the Hub, fetch it first with {fetch}"
            )
        return "it does not exist"
    if problem := _broken(path):
        return problem
    for (kind, other), what in OTHERS.items():
        if other == wanted and (path / MARKS[kind]).is_file():
            return what
    for patterns, what in FORMATS if wanted != "delta" else ():
        found = [p for pattern in patterns for p in _weights(path, pattern)]
        if found := [*dict.fromkeys(found)]:
            files = ", ".join(str(p.relative_to(path)) for p in found[:SHOWN])
            return what.format(files=files, parent=found[0].parent)
    if below := sorted(_below(path, wanted), key=_number):
        names = ", ".join(str(folder.relative_to(path)) for folder in below)
        return f"there are such folders below it: {names}. Give {below[-1]}"
    if not any(path.iterdir()):
        return "it is empty"
    if (path / MARKS[wanted]).is_file():
        return f"it has {MARKS[wanted]}, but not its weights"
    names = ", ".join(p.name for p in _files(path)[:SHOWN])
    return f"it has {names}, but not {MARKS[wanted]}"


def _files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def _weights(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    return [path for path in found if not STATES.match(path.name)]


def _below(folder: Path, wanted: str) -> Iterator[Path]:
    """Folders of the kind below ``folder``, as in a trainer's output or a Hub cache."""
    kinds = ("model", "adapter") if wanted == "model" else (wanted,)
    for mark in (MARKS[kind] for kind in kinds):
        yield from (p.parent for p in folder.glob(f"*/{mark}"))
        yield from (p.parent for p in folder.glob(f"snapshots/*/{mark}"))
    if wanted == "model":  # of FSDP: its shards, without a config.json
        yield from (p for p in folder.glob("checkpoint-*") if not _is_marked(p))


def _is_marked(folder: Path) -> bool:
    return any((folder / mark).is_file() for mark in MARKS.values())


def _number(folder: Path) -> tuple[int, str]:
    """The newest checkpoint comes last, and after it a folder without a number."""
    number = re.fullmatch(r"(?:checkpoint|epoch|step)[-_](\d+)", folder.name)
    return (int(number[1]) if number else 2**63), folder.name


def refuse_broken(folder: Path) -> None:
    """Raise a DqreloError where a file is a dangling link or a pointer of Git LFS."""
    if problem := _broken(folder):
        raise DqreloError(f"{folder} cannot be used: {problem}")


def _broken(folder: Path) -> str | None:
    """What is wrong with files that we would read."""
    pointers = []
    for path in (p for p in _files(folder) if p.suffix in READ):
        if path.is_symlink() and not path.exists():
            return (
                f"{path.name} is a link to {path.readlink()}, which does not exist. "
                "Download it again"
            )
        small = path.is_file() and path.stat().st_size <= POINTER_BYTES
        if small and path.read_bytes().startswith(POINTER):
            pointers.append(path.name)
    if not pointers:
        return None
    names = ", ".join(pointers[:SHOWN])
    return f"it has Git LFS pointers, not the files ({names}). Run git lfs pull in it"
