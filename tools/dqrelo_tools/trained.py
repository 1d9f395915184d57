# SPDX-License-Identifier: Apache-2.0
"""A model that a trainer has in memory becomes a delta."""

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict
from torch.distributed.tensor import DTensor

from dqrelo_tools.convert import convert
from dqrelo_tools.journal import Interrupted
from vllm_dqrelo.format.checkpoint import HEADS, ends_with, resolve
from vllm_dqrelo.format.config import DEFAULT_RATIO, DQRELO
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError, refuse

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_MEMORY = "the model in memory"


def delta_of(
    base: str,
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    ratio: float = DEFAULT_RATIO,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    method: str = DQRELO,
    device: str = "cpu",
) -> Delta:
    """Make the delta from ``base`` to a model in memory.

    Semantics: the delta that ``dqrelo convert`` makes of ``model.save_pretrained``.

    The model is saved to a temporary folder and converted from there; ``TMPDIR`` needs
    room for the whole model meanwhile. The folder of the delta is removed when the
    returned object is freed; ``Delta.save_pretrained`` keeps a copy.

    Args:
        base: the base model, a folder or a Hub id, as it was before the training.
        model: a model of transformers or PEFT; or another module or a state dict, which
            has the config of ``base``. Not mutated; on any device. Its adapter is
            taken of a PEFT model. Parameters that are sharded must be gathered first.
        ratio, method, device: as for ``convert``.
        tokenizer: of the model, where it is not the base's.

    Raises:
        DqreloError: as for ``convert``; a parameter is sharded, or is not a tensor.
        FileNotFoundError: ``base`` is not there.
    """
    root = Path(tempfile.mkdtemp(prefix="dqrelo-"))
    try:
        saved, folder = root / "model", root / "delta"
        saved.mkdir()
        save(model, saved, base)
        if tokenizer is not None:
            tokenizer.save_pretrained(saved)
        try:
            convert(base, str(saved), folder, ratio, method=method, device=device)
        except DqreloError as error:
            reason = error.reason if isinstance(error, Interrupted) else str(error)
            raise DqreloError(reason.replace(str(saved), IN_MEMORY)) from error
        shutil.rmtree(saved)
        delta = Delta(folder)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise
    weakref.finalize(delta, shutil.rmtree, root, ignore_errors=True)
    return delta


def save(model: Any, folder: Path, base: str) -> None:
    """Write a model in memory as a checkpoint, or as an adapter.

    Args:
        model: as for :func:`delta_of`.
        folder: exists and is empty.
        base: has the config of a state dict.
    """
    is_module = isinstance(model, torch.nn.Module)
    tensors = model.state_dict() if is_module else dict(model)
    refuse(f"{IN_MEMORY} cannot be saved:", problems(tensors))
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        return
    # A tied LM head shares the embedding's memory, and is left out by its name.
    heads = [name for name in tensors if ends_with(name, HEADS)]
    save_torch_state_dict(tensors, folder, shared_tensors_to_discard=heads)
    shutil.copyfile(resolve(base) / "config.json", folder / "config.json")


def problems(tensors: Mapping[str, Any]) -> list[str]:
    """Why parameters cannot be saved, one line each."""
    found = []
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            found.append(
                f"{name} is of type {type(tensor).__name__}, expected a tensor; "
                "give a state dict of parameters only"
            )
        elif isinstance(tensor, DTensor):
            found.append(
                f"{name} is sharded; gather the parameters with torch's "
                "get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True))"
            )
    return found
