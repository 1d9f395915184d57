# SPDX-License-Identifier: Apache-2.0
"""Which rows and columns of a checkpoint's matrices this worker has.

With tensor parallelism a worker has a part of most matrices. Which one, its layers
know: their own loaders are given the numbers of the rows, or of the columns, and keep
those that they would keep of the matrix.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs


def sizes_here(module: Any, added_tokens: int) -> tuple[tuple[int, ...], int]:
    """Rows of each slice of a linear or vocabulary layer, and columns, of this worker.

    Args:
        added_tokens: rows of a vocabulary layer that are not the base's.
    """
    if isinstance(module, LinearBase):
        columns = getattr(module, "input_size_per_partition", module.input_size)
        return tuple(module.output_partition_sizes), columns
    base = module.org_vocab_size - added_tokens
    part = module.shard_indices
    rows = min(part.org_vocab_end_index, base) - part.org_vocab_start_index
    if rows < 1:
        raise ValueError(
            f"a vocabulary of {base} tokens is too small for --tensor-parallel-size "
            f"{module.tp_size}"
        )
    return (rows,), module.embedding_dim


def sizes_in_all(module: Any, added_tokens: int) -> tuple[tuple[int, ...], int]:
    """The same of the checkpoint's matrices."""
    if isinstance(module, VocabParallelEmbedding):
        return (module.org_vocab_size - added_tokens,), module.embedding_dim
    sizes, _ = sizes_here(module, 0)
    if module.tp_size > 1 and isinstance(module, QKVParallelLinear):
        # A head of k and v that several workers have is one in the checkpoint.
        widths = module.head_size, module.head_size, module.v_head_size
        heads = (module.total_num_heads, *(module.total_num_kv_heads,) * 2)
        sizes = tuple(h * width for h, width in zip(heads, widths, strict=True))
    elif module.tp_size > 1 and isinstance(module, ColumnParallelLinear):
        sizes = tuple(getattr(module, "output_sizes", [module.output_size]))
    return sizes, module.input_size


def added_here(module: VocabParallelEmbedding, added_tokens: int) -> range:
    """Those of the rows that are not the base's that this worker has."""
    base = module.org_vocab_size - added_tokens
    part = module.shard_indices
    first, end = part.org_vocab_start_index, part.org_vocab_end_index
    return range(max(first - base, 0), max(end - base, 0))


def rows_here(
    module: Any, sizes: tuple[int, ...], index: int, whole: int
) -> torch.Tensor:
    """The rows of the checkpoint's matrix that are in slice ``index``, in order.

    Args:
        module: a linear or vocabulary layer.
        sizes: of its slices.
        whole: rows of the matrix.

    Returns:
        int64 [sizes[index]].
    """
    if isinstance(module, VocabParallelEmbedding):
        size, whole = module.num_embeddings_per_partition, module.org_vocab_size
        return _kept(module, "output_dim", size, whole)[: sizes[0]]
    if not isinstance(module, ColumnParallelLinear):
        return torch.arange(sizes[index])
    shard: tuple[Any, ...] = () if len(sizes) == 1 else (index,)
    if shard and isinstance(module, QKVParallelLinear):
        shard = ("qkv"[index],)
    kept = _kept(module, "output_dim", sum(sizes), whole, *shard)
    return kept[sum(sizes[:index]) :][: sizes[index]]


def columns_here(module: Any, columns: int, whole: int) -> torch.Tensor:
    """The columns of the checkpoint's matrices that this worker has, int64."""
    if columns == whole:
        return torch.arange(columns)
    return _kept(module, "input_dim", columns, whole)


def expert_rows_here(module: Any, part: int, size: int, whole: int) -> torch.Tensor:
    """The rows of an expert's gate (``part`` 0) or up matrix, int64 [size]."""
    numbers = torch.nn.Parameter(torch.full((1, 2 * size, 1), -1), requires_grad=False)
    rows = torch.arange(whole)[:, None]
    module.weight_loader(numbers, rows, "weight", ("w1", "w3")[part], 0)
    return numbers.data.flatten()[part * size :][:size]


def expert_columns_here(module: Any, size: int, whole: int) -> torch.Tensor:
    """The columns of an expert's down matrix, int64 [size]."""
    numbers = torch.nn.Parameter(torch.full((1, 1, size), -1), requires_grad=False)
    module.weight_loader(numbers, torch.arange(whole)[None], "weight", "w2", 0)
    return numbers.data.flatten()


def _kept(module: Any, dim: str, size: int, whole: int, *shard: Any) -> torch.Tensor:
    """What the loader of ``module`` keeps of the numbers up to ``whole``."""
    numbers = torch.nn.Parameter(torch.full((size,), -1), requires_grad=False)
    set_weight_attrs(numbers, {dim: 0})
    module.weight_loader(numbers, torch.arange(whole), *shard)
    return numbers.data
