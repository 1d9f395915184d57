# SPDX-License-Identifier: Apache-2.0
"""How many sign planes and what rank each matrix gets, under one budget of bytes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from dqrelo_tools.method import LOW_RANK_BITS, MAX_PLANES, Size
from dqrelo_tools.spectrum import Spectrum
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.format.tensors import INT4, LORA_SCALE

RANKS = 128  # considered for each number of planes, or a few more
# Upper bounds of what safetensors adds to the tensors: a file's length, metadata and
# padding, and the widest offset.
FILE_BYTES = 64
OFFSET = 10**12


@dataclass(frozen=True)
class Option:
    """One size that a matrix may have.

    Attributes:
        size: planes and rank.
        bytes: of its tensors and their part of a file's header, an upper bound.
        error: predicted, squared, relative to the change; times the number of weights.
    """

    size: Size
    bytes: int
    error: float


def allocate(
    spectra: Mapping[str, Spectrum],
    exact: Mapping[str, int],
    budget: int,
    max_shard_size: int,
) -> dict[str, Size]:
    """The size of each matrix, such that the files take at most ``budget`` bytes.

    Semantics: least sum of ``weights * predicted squared error / squared norm``, up
    to one step: of all steps along the hulls of all matrices, the step with the largest
    gain per byte is taken, as long as a step fits. The bytes that are left go to the
    matrix that gains most by them.

    Args:
        spectra: name -> spectrum, of the matrices that changed.
        exact: name -> bytes, of the parameters that are stored as they are.
        budget: of all files with tensors, in bytes.
        max_shard_size: of one of them, in bytes.

    Raises:
        DqreloError: the budget is too small even for rank 1 in each matrix.
    """
    found = {name: options(name, spectrum) for name, spectrum in spectra.items()}
    hulls = {name: hull(some) for name, some in found.items()}
    chosen = {name: points[0] for name, points in hulls.items()}
    least = sum(option.bytes for option in chosen.values()) + exact_bytes(exact)
    left = room(budget, max_shard_size) - least
    if left < 0:
        raise DqreloError(
            f"a budget of {budget:,} bytes is too small: this delta takes at least "
            f"{files_bytes(least, max_shard_size):,}, with rank 1 in each of "
            f"{len(spectra)} matrices and {len(exact)} vectors exact"
        )
    ahead = [
        (-gain(*points[:2]), name, 1) for name, points in hulls.items() if points[1:]
    ]
    heapify(ahead)
    while ahead:
        _, name, i = heappop(ahead)
        here, there = hulls[name][i - 1 : i + 1]
        if there.bytes - here.bytes > left:
            continue
        left -= there.bytes - here.bytes
        chosen[name] = there
        if i + 1 < len(hulls[name]):
            heappush(ahead, (-gain(there, hulls[name][i + 1]), name, i + 1))
    fitting = [
        (chosen[name].error - option.error, name, option)
        for name, some in found.items()
        for option in some
        if option.bytes - chosen[name].bytes <= left
    ]
    if fitting:
        _, name, option = max(fitting, key=lambda change: change[0])
        chosen[name] = option
    return {name: option.size for name, option in chosen.items()}


def options(name: str, spectrum: Spectrum) -> list[Option]:
    """All sizes that are considered for the matrix called ``name``.

    Sign planes need a low-rank part of at least LOW_RANK_BITS bits a weight.
    """
    n, k = spectrum.shape
    largest = min(n, k)
    step = 2 * -(-largest // (2 * RANKS))  # a byte holds two of INT4
    ranks = sorted({1, *range(step, largest, step), largest})
    weight = n * k / (spectrum.total or 1)
    found = []
    for planes in range(MAX_PLANES + 1):
        for rank in ranks:
            if planes and 8 * low_rank_bytes(n, k, rank) < LOW_RANK_BITS * n * k:
                continue
            size = Size(planes, rank, INT4)
            error = weight * spectrum.error(size)
            found.append(Option(size, matrix_bytes(name, n, k, size), error))
    return found


def hull(options: list[Option]) -> list[Option]:
    """The lower convex hull, cheapest first: each byte gains less than the last one."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda option: (option.bytes, option.error)):
        if kept and option.error >= kept[-1].error:
            continue
        while len(kept) > 1 and gain(*kept[-2:]) <= gain(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def gain(here: Option, there: Option) -> float:
    """Error that a byte takes away on the way from ``here`` to the larger ``there``."""
    return (here.error - there.error) / (there.bytes - here.bytes)


def low_rank_bytes(n: int, k: int, rank: int) -> int:
    """Bytes of INT4 factors and their scales."""
    return Size(0, rank, INT4).bytes(n, k) - Size(0, 0, INT4).bytes(n, k)


def matrix_bytes(name: str, n: int, k: int, size: Size) -> int:
    """An upper bound of a matrix's tensors and their part of a header, in bytes."""
    tensors = 1 + 2 * bool(size.planes) + 3 * bool(size.rank)
    header = header_bytes(name + LORA_SCALE, MAX_PLANES, n, k)
    return size.bytes(n, k) + tensors * header


def exact_bytes(exact: Mapping[str, int]) -> int:
    """The same of parameters stored as they are; ``exact`` is name -> bytes."""
    return sum(size + header_bytes(name, size) for name, size in exact.items())


def header_bytes(name: str, *shape: int) -> int:
    """Bytes of a tensor's entry in a header, if it is at the last offset."""
    entry = {"dtype": "BF16", "shape": shape, "data_offsets": [OFFSET, OFFSET]}
    return len(json.dumps({name: entry}, separators=(",", ":")))


def files_bytes(content: int, max_shard_size: int) -> int:
    """Bytes of the files that hold ``content`` bytes of tensors and entries.

    Semantics: ``content + FILE_BYTES * (1 + 2 content / max_shard_size)``, because
    any two files in a row hold more than ``max_shard_size``.
    """
    files = max_shard_size + 2 * FILE_BYTES
    return FILE_BYTES + -(-content * files // max_shard_size)


def room(budget: int, max_shard_size: int) -> int:
    """The most content whose ``files_bytes`` are within ``budget``."""
    files = max_shard_size + 2 * FILE_BYTES
    return (budget - FILE_BYTES) * max_shard_size // files
