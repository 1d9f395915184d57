# SPDX-License-Identifier: Apache-2.0
"""A base and its fine-tune become a delta folder."""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from dqrelo_tools.adapter import Adapter, is_adapter
from dqrelo_tools.allocate import allocate
from dqrelo_tools.card import write_card
from dqrelo_tools.compress import compress
from dqrelo_tools.configs import config_differences
from dqrelo_tools.journal import Journal, journal_of
from dqrelo_tools.method import BITS, METHODS, Method, Size
from dqrelo_tools.names import match_names
from dqrelo_tools.pair import (
    Parameters,
    always_stored,
    fine_tune,
    half_of,
    is_exact,
    read_ahead,
)
from dqrelo_tools.parallel import results
from dqrelo_tools.report import Entry, Report, matrix_entry
from dqrelo_tools.side_files import side_files, warn_of_images
from dqrelo_tools.spectrum import Spectrum
from dqrelo_tools.vocabulary import smaller_vocabulary
from vllm_dqrelo import __version__
from vllm_dqrelo.format.checkpoint import (
    BESIDE,
    EMBEDDINGS,
    HEADS,
    Checkpoint,
    ends_with,
    resolve,
)
from vllm_dqrelo.format.config import (
    DEFAULT_RATIO,
    DQRELO,
    LORA,
    MAX_SHARD_SIZE,
    DeltaConfig,
)
from vllm_dqrelo.format.delta import weight_files, write_delta
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.folder import (
    check_output,
    file_bytes,
    new_folder,
    require_free,
)
from vllm_dqrelo.format.tensors import ADDED, INT4

logger = logging.getLogger(__name__)

# Elements of a matrix that is compressed by one thread while others are, too. It takes
# about four float32 copies, 80 MB, and parallel.MOST of them 0.6 GB.
SMALL = 5_000_000

Converted = tuple[Entry, dict[str, torch.Tensor]]


def convert(
    base: str,
    model: str,
    output: Path,
    ratio: float = DEFAULT_RATIO,
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    device: str = "cpu",
    method: str = DQRELO,
    budget: int | None = None,
    base_quantized: str | None = None,
) -> Report:
    """Write the delta from ``base`` to ``model`` into the new folder ``output``.

    Parameters are converted one by one. Until the delta is whole, they are kept in a
    folder next to ``output``, or inside of an empty ``output``. When the process is
    killed, the disk is full or a last step fails, the same command continues from that
    folder and writes the same bytes.

    Args:
        base: the base model, a folder or a Hub id.
        model: the fine-tune or a LoRA adapter in PEFT's format, a folder or a Hub id.
        output: must not exist, or be empty; an error leaves it as it was. Not inside
            of ``base`` or ``model``.
        ratio: size of the delta as a fraction of 16 bits per weight, at most 1.
        max_shard_size: of the files with the tensors, in bytes.
        device: where to compute.
        method: a name in ``method.METHODS``.
        budget: in place of ``ratio``: bytes of all files with tensors, for
            ``allocate`` to divide.
        base_quantized: a quantised copy of the base, to serve the delta with. The
            delta is made from the numbers that the copy stands for. So the delta also
            repairs the quantisation error.

    Raises:
        DqreloError: the two do not fit together, or cannot be converted.
        FileNotFoundError: one of the two is not there.
    """
    how = METHODS[method]
    least = (how.planes or 0) / BITS
    if budget is None and not (0 < ratio <= 1 and ratio >= least):
        reason = f"the signs alone take {least} (1/16), and " if least else ""
        raise DqreloError(
            f"--ratio {ratio:g} is out of range: {reason}1 is the size of the fine-tune"
        )
    if budget is not None and method != DQRELO:
        raise DqreloError(
            f"--budget needs --method {DQRELO}: {method} takes --ratio only"
        )
    output = check_output(output)
    before, folder = Checkpoint(resolve(base)), resolve(model)
    names = [base]
    if base_quantized:
        plain, before = before, Checkpoint(resolve(base_quantized))
        if not before.quantization:
            raise DqreloError(f"{base_quantized} is not quantised: give it as --base")
        match_names(before, plain, ("quantised copy", "base"))
        refuse(
            f"{base_quantized} is not a copy of {base}:",
            config_differences(plain.model_config, before.model_config)
            + [f"{name} is in one of the two only" for name in {*plain} ^ {*before}],
        )
        base = base_quantized
        names.append(base)
    config = DeltaConfig(
        base_model_name_or_path=base,
        base_fingerprint=before.fingerprint(),
        digest="",
        method=method,
        ratio=ratio,
    )
    after: Parameters
    if is_adapter(folder):
        if budget is not None:
            raise DqreloError(
                f"{model} is a LoRA adapter, which a delta stores at its own rank: "
                "leave --budget out"
            )
        after = Adapter(folder, before, names)
        config = replace(
            config,
            method=method if after.dense else LORA,
            vocab_size=after.vocab_size,
        )
        compressed, tokens = after.dense, after.tokens
        ratios = dict.fromkeys(after, ratio)
    else:
        after = fine_tune(model, folder, base, before)
        config = replace(config, vocab_size=smaller_vocabulary(before, after))
        compressed, tokens = list(after), after.model_config.vocab_size
        weights = {name: math.prod(after.spec(name)[1]) for name in after}
        if budget is not None:
            ratio = budget / (2 * sum(weights.values()))
            config = replace(config, ratio=ratio)
        ratios = how.ratios(min(ratio, 1), weights)
    others = side_files(before.folder, folder, tokens)
    warn_of_images(before.folder, folder)
    size = predicted_bytes(after, {name: ratios[name] for name in compressed}, how)
    size += copied_bytes(after)
    require_free(output, 2 * size, before.folder, folder)
    limits = None if budget is None else (budget, max_shard_size)
    mark = identity(config, before, after, device, limits)
    with journal_of(output, mark) as journal:
        plan = planned(before, after, device, journal, *limits) if limits else {}
        if isinstance(after, Adapter):
            keep_factors(after, journal)
        entries = convert_all(before, after, ratios, how, device, journal, plan)
        if not journal:
            raise DqreloError(f"{model} has the weights of {base}: nothing to store")
        journal.complete = True
        report = Report(entries)
        write(output, config, journal, report, folder, others, max_shard_size)
    return report


def keep_factors(adapter: Adapter, journal: Journal) -> None:
    """Record the matrices that an adapter changes by factors, at their own rank."""
    for number, name in enumerate(adapter):
        if journal.entry(number) is None and (matrix := adapter.matrix(name)):
            weights = matrix.shape[0] * matrix.shape[1]
            entry = Entry(name, "matrix", weights, 2 * weights, matrix.rank)
            journal.record(number, entry, matrix.tensors(name))


def write(
    output: Path,
    config: DeltaConfig,
    journal: Journal,
    report: Report,
    model: Path,
    others: Mapping[str, bytes],
    max_shard_size: int,
) -> None:
    """Write the whole delta folder, and its size into ``report``.

    Args:
        others: content of the tokenizer and settings, by file name.
    """
    changed = [entry.name for entry in report.entries if entry.kind != "unchanged"]
    if beside := [name for name in changed if BESIDE.search(name)]:
        logger.warning(
            "%d parameters outside of the language model changed, for instance %s: a "
            "server that loads this delta later than at its start needs "
            "--enable-tower-connector-lora",
            len(beside),
            beside[0],
        )
    progress = tqdm(
        desc="write",
        total=2 * journal.size,
        unit="B",
        unit_scale=True,
        delay=2,
        leave=False,
        disable=None,
    )
    with new_folder(output) as folder, progress:
        config = write_delta(folder, config, journal, max_shard_size, progress.update)
        report.delta_bytes = file_bytes(weight_files(folder))
        for name, content in others.items():
            (folder / name).write_bytes(content)
        write_card(folder, config, report, model)


def planned(
    before: Checkpoint,
    after: Parameters,
    device: str,
    journal: Journal,
    budget: int,
    max_shard_size: int,
) -> dict[str, Size]:
    """The size of each matrix under ``budget``; made once and kept in ``journal``."""
    path = journal.folder / "plan.json"
    if not path.is_file():
        spectra: dict[str, Spectrum] = {}
        exact: dict[str, int] = {}
        names = tqdm(list(after), desc="plan", unit=" tensors", disable=None)
        pairs = read_ahead(before, after, list(after))
        for name, (tensor, change) in zip(names, pairs, strict=True):
            if not bool(change.any()) and not always_stored(name, before):
                continue
            if is_exact(name, tensor):
                exact[name] = tensor.nbytes
            else:
                spectra[name] = Spectrum.of(change.to(device))
        sizes = allocate(spectra, exact, budget, max_shard_size)
        made = {name: (size.planes, size.rank) for name, size in sizes.items()}
        scratch = journal.folder / "scratch"
        scratch.write_text(json.dumps(made))
        scratch.rename(path)
    kept = json.loads(path.read_text())
    return {name: Size(planes, rank, INT4) for name, (planes, rank) in kept.items()}


def convert_all(
    before: Checkpoint,
    after: Parameters,
    ratios: Mapping[str, float],
    method: Method,
    device: str,
    journal: Journal,
    plan: Mapping[str, Size],
) -> list[Entry]:
    """The entries of all parameters; converts those that ``journal`` lacks."""
    names = dict(enumerate(after))
    entries = {number: journal.entry(number) for number in names}
    missing = {n: name for n, name in names.items() if entries[n] is None}
    progress = tqdm(
        desc="convert",
        unit=" tensors",
        total=len(names),
        initial=len(names) - len(missing),
        disable=None,
    )
    pairs = read_ahead(before, after, list(missing.values()))

    def jobs() -> Iterator[tuple[bool, Callable[[], Converted]]]:
        for name, (tensor, change) in zip(missing.values(), pairs, strict=True):
            job = partial(
                convert_parameter,
                name,
                tensor,
                change.to(device),
                ratios[name],
                method,
                plan.get(name),
                always_stored(name, before),
            )
            yield device == "cpu" and tensor.numel() <= SMALL, job

    with progress:
        for number, (entry, stored) in zip(missing, results(jobs()), strict=True):
            journal.record(number, entry, stored)
            entries[number] = journal.entry(number)
            progress.update()
    return [entry for entry in entries.values() if entry is not None]


def convert_parameter(
    name: str,
    tensor: torch.Tensor,
    change: torch.Tensor,
    ratio: float,
    method: Method,
    size: Size | None = None,
    keep: bool = False,
) -> Converted:
    """One parameter's entry in the report, and its stored tensors.

    Args:
        name: of the parameter.
        tensor: as the fine-tune has it; of a matrix, dtype and shape are enough.
        change: fine-tune minus base, float32, on the device to compute on.
        ratio: as for :func:`convert`.
        method: how to compress a matrix.
        size: of a matrix; None where ``ratio`` decides.
        keep: store the parameter even if it did not change.
    """
    counts = (tensor.numel(), tensor.nbytes)
    if not bool(change.any()) and not keep:
        return Entry(name, "unchanged", *counts), {}
    if is_exact(name, tensor):
        return Entry(name, "exact", *counts), {name: tensor.clone()}
    n, k = tensor.shape
    size = size or method.size(n, k, ratio, half_of(tensor.dtype))
    matrix = compress(change, size, method, ends_with(name, EMBEDDINGS + HEADS))
    stored = {key: value.cpu() for key, value in matrix.tensors(name).items()}
    return matrix_entry(name, tensor, change, matrix), stored


def identity(
    config: DeltaConfig,
    base: Checkpoint,
    model: Parameters,
    device: str,
    limits: tuple[int, int] | None,
) -> str:
    """Text that is equal for two conversions that would write the same bytes.

    Args:
        limits: budget and largest size of a file; None without a budget.
    """
    files = {
        str(path): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted({*base.files.values(), *model.files.values()})
    }
    return json.dumps([__version__, config.to_json(), files, device, limits])


def copied_bytes(model: Parameters) -> int:
    """The size of an adapter, whose factors a delta takes as they are."""
    return file_bytes(model.files.values()) if isinstance(model, Adapter) else 0


def predicted_bytes(
    model: Parameters, ratios: Mapping[str, float], method: Method
) -> int:
    """An upper bound of the delta's size, before anything is computed.

    Args:
        ratios: of the parameters that are compressed, or stored as they are.
    """
    total = 1 << 20  # headers and side files
    for name, ratio in ratios.items():
        _, shape = model.spec(name)
        if len(shape) == 2 and not name.endswith(ADDED):
            n, k = shape
            total += method.size(n, k, ratio, torch.bfloat16).bytes(n, k)
        else:
            total += 4 * math.prod(shape)
    return total
