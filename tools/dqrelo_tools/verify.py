# SPDX-License-Identifier: Apache-2.0
"""Check a delta against its base and its fine-tune."""

from pathlib import Path

import torch
from tqdm import tqdm

from dqrelo_tools.adapter import is_adapter
from dqrelo_tools.fidelity import measure
from dqrelo_tools.pair import fine_tune
from dqrelo_tools.prompts import read_prompts
from dqrelo_tools.report import Entry, Report, matrix_entry
from dqrelo_tools.vocabulary import smaller_vocabulary
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint, resolve
from vllm_dqrelo.format.delta import Delta, weight_files
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.folder import file_bytes
from vllm_dqrelo.format.tensors import ADDED


def checked(folder: Path) -> Delta:
    """The delta in a folder. Progress is shown if the check takes long."""
    with tqdm(
        desc="check",
        total=2 * file_bytes(weight_files(folder)),
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,
    ) as progress:
        return Delta(folder, watch=progress.update)


def open_for_base(delta: Path, base: Checkpoint) -> Delta:
    """The delta in a folder; refused if a tensor does not fit ``base``."""
    opened = checked(delta)
    opened.config.check_base(base.fingerprint(), str(base.folder), str(delta))
    if base.tied and HEAD in opened.matrices:
        base.untie()
    problems = []
    shapes = {name: list(opened.matrix(name).shape) for name in opened.matrices}
    shapes |= {name: list(opened.parameter(name).shape) for name in opened.exact}
    for name, shape in shapes.items():
        matrix = name.removesuffix(ADDED)
        if matrix != name and matrix in base:
            shape, name = [base.spec(matrix)[1][0], *shape[1:]], matrix
        if name not in base:
            problems.append(f"{name} is not in the base")
        elif base.spec(name)[1] != shape:
            problems.append(f"{name} is {shape}, the base has {base.spec(name)[1]}")
    own, old = opened.config.vocab_size, base.model_config.vocab_size
    if own is not None and (old is None or own >= old):
        problems.append(f"vocab_size is {own}, expected fewer than the base's {old}")
    refuse(f"{delta} does not fit {base.folder}:", problems)
    return opened


def verify(
    base: str, delta: Path, model: str | None, prompts: Path | None = None
) -> Report:
    """Check digest, fingerprint and shapes; with ``model`` also every error.

    Args:
        base: the base model, a folder or a Hub id.
        delta: the folder of the delta.
        model: the fine-tune, a folder or a Hub id.
        prompts: a file of text to compare the models on; see ``read_prompts``.

    Returns:
        The sizes, with ``model`` the error of each parameter, and with ``prompts``
        how far base + delta is from the fine-tune there.

    Raises:
        DqreloError: the delta is damaged, or belongs to another base, or is not
            what a conversion of ``model`` gives; or ``prompts`` cannot be used.
        FileNotFoundError: one of the folders is not there.
    """
    if prompts and not model:
        raise DqreloError("--prompts needs --model, the fine-tune to compare with")
    if prompts:
        texts = read_prompts(prompts)
    if model and is_adapter(resolve(model)):
        raise DqreloError(
            f"{model} is a LoRA adapter, and verify compares with a whole model: "
            "leave --model out, or merge the adapter into its base and give that"
        )
    before = Checkpoint(resolve(base))
    opened = open_for_base(delta, before)
    report = Report()
    report.delta_bytes = file_bytes(weight_files(delta))
    after = fine_tune(model, resolve(model), base, before) if model else before
    added = {name for name in opened.exact if name.endswith(ADDED)}
    if model:
        refuse(
            f"{delta} is not a delta of {after.folder}, parameters that differ:",
            sorted((set(before) | added) ^ set(after)),
        )
        if (own := smaller_vocabulary(before, after)) != opened.config.vocab_size:
            raise DqreloError(
                f"{delta} is not the delta of {model}: its vocab_size is "
                f"{opened.config.vocab_size}, expected {own}"
            )
    wrong = []
    names = sorted(set(before) | added)
    for name in tqdm(names, desc="verify", unit=" tensors", disable=None):
        tensor = after.get(name) if name in after else opened.parameter(name)
        old = before.get(name) if name in before else torch.zeros_like(tensor)
        entry = check_parameter(name, old, tensor, opened)
        if model and entry.kind != "matrix" and entry.missed:
            wrong.append(f"{name} is stored as {entry.kind}, {model} has other values")
        report.entries.append(entry)
    refuse(f"{delta} is not the delta of {model}:", wrong)
    if prompts:
        report.fidelity = measure(before.folder, opened, after.folder, texts)
    return report


def check_parameter(
    name: str, before: torch.Tensor, after: torch.Tensor, delta: Delta
) -> Entry:
    """The entry of one parameter: base + delta compared with ``after``."""
    change = after.float() - before.float()
    if name in delta.matrices:
        return matrix_entry(name, after, change, delta.matrix(name))
    kind = "exact" if name in delta.exact else "unchanged"
    got = delta.parameter(name) if kind == "exact" else before
    if got.shape != after.shape:
        raise DqreloError(f"{name} is {list(got.shape)}, expected {list(after.shape)}")
    missed = float((after.double() - got.double()).square().sum())
    size = (after.numel(), after.nbytes)
    return Entry(name, kind, *size, 0, 0, float(change.square().sum()), missed)
