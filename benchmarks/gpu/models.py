# SPDX-License-Identifier: Apache-2.0
"""A base of random weights in the shape of Llama-3.1-8B, and random deltas of it.

The base has fewer layers than the model, of the same shapes. A delta changes the
matrices and norms of all layers, by a third of a weight's size; the first two change
embedding and LM head as well. All are made once and kept.
"""

import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu.part import DEVICE, DTYPE, Sizes, options
from dqrelo_kernels.layout import int4_bytes, words_per_row
from dqrelo_tools.method import METHODS
from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.config import CONFIG_NAME, DQRELO, DeltaConfig
from vllm_dqrelo.format.delta import Delta, write_delta
from vllm_dqrelo.format.folder import new_folder
from vllm_dqrelo.format.tensors import MatrixDelta

STD = 0.02  # of a weight
CHANGE = STD / 3  # of a sign plane, and of a low-rank part
NIBBLE = 4.6  # RMS of an integer of four bits
WHOLE = 2  # deltas that change embedding and LM head


def base(models: Path, sizes: Sizes) -> Path:
    """The folder of the base; it is made if it is not there."""
    folder = models / "base"
    if not folder.exists():
        config = LlamaConfig(**sizes.config, tie_word_embeddings=False)
        torch.manual_seed(0)
        with torch.device(DEVICE):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
        with new_folder(folder) as made:
            model.save_pretrained(made)
    return folder


def deltas(models: Path, count: int, ratio: float, whole: int = 0) -> list[Path]:
    """The folders of ``count`` deltas of the base; those that are missing are made.

    Args:
        ratio: bytes of a delta over bytes of what it changes.
        whole: how many of them change embedding and LM head.
    """
    kinds = [index < whole for index in range(count)]
    folders = [
        models / f"delta-1-{round(1 / ratio)}{'-whole' * kind}-{index}"
        for index, kind in enumerate(kinds)
    ]
    jobs = [
        (models / "base", folder, ratio, kind, index)
        for index, (folder, kind) in enumerate(zip(folders, kinds, strict=True))
        if not folder.exists()
    ]
    if jobs:
        workers = min(len(jobs), max((os.cpu_count() or 2) // 2, 1))
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            list(pool.map(_write, jobs))
    return folders


def _write(job: tuple[Path, Path, float, bool, int]) -> None:
    """Write one delta."""
    base_folder, folder, ratio, whole, seed = job
    torch.set_num_threads(2)
    source = Checkpoint(base_folder)
    random = np.random.Generator(np.random.SFC64([seed, round(1 / ratio), whole]))
    tensors: dict[str, torch.Tensor] = {}
    for name in source:
        dtype, shape = source.spec(name)
        if len(shape) == 1:
            values = 1 + 0.1 * random.standard_normal(shape)
            tensors[name] = torch.from_numpy(values).to(source.get(name).dtype)
        elif whole or ".layers." in name:
            tensors |= random_matrix(*shape, ratio, random).tensors(name)
    config = DeltaConfig(
        base_model_name_or_path=str(base_folder),
        base_fingerprint=source.fingerprint(),
        digest="",
        method=DQRELO,
        ratio=ratio,
    )
    with new_folder(folder) as made:
        write_delta(made, config, tensors)


def random_matrix(
    n: int, k: int, ratio: float, random: np.random.Generator
) -> MatrixDelta:
    """A random change of an N x K matrix, as large as the converter would make it.

    Args:
        k: a multiple of 16. Any bits are signs then.
    """
    size = METHODS[DQRELO].size(n, k, ratio, torch.bfloat16)

    def words(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        count = math.prod(shape) * dtype.itemsize
        data = np.frombuffer(bytearray(random.bytes(count)), np.uint8)
        return torch.from_numpy(data).view(dtype).reshape(shape)

    scale = CHANGE / (NIBBLE**2 * math.sqrt(max(size.rank, 1)))
    return MatrixDelta(
        shape=(n, k),
        signs=words(size.planes, n, words_per_row(k), dtype=torch.int16),
        scale=torch.full((size.planes, n), CHANGE),
        lora_a=words(size.rank, int4_bytes(k), dtype=torch.uint8),
        lora_b=words(n, int4_bytes(size.rank), dtype=torch.uint8),
        lora_scale=torch.full((size.rank,), scale),
    )


def merged(
    delta: Delta, weights: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters that a delta changes, of base + delta, unrounded.

    Args:
        weights: of the base, float32, on the device that computes.
    """
    for name in delta.exact:
        yield name, delta.parameter(name).to(weights[name])
    for name in delta.matrices:
        matrix, device = delta.matrix(name), weights[name].device
        parts = {
            field: value.to(device)
            for field, value in vars(matrix).items()
            if isinstance(value, torch.Tensor)
        }
        yield name, weights[name] + replace(matrix, **parts).dense()


def main() -> None:
    """Make the base, and the deltas that are served beside it."""
    found = options()
    folder = base(found.models, found.sizes)
    made = deltas(found.models, found.sizes.deltas, found.sizes.ratios[0], WHOLE)
    lines = [str(path / CONFIG_NAME) for path in made]
    print("\n".join([str(folder), *lines]))


if __name__ == "__main__":
    main()
