# SPDX-License-Identifier: Apache-2.0
"""Views of some rows of a matrix: temporaries stay small, and in a CPU's cache."""

import torch

ELEMENTS = 2**19  # of a view on a CPU
ELSEWHERE = 2**25  # on a device that is slow to start many small operations


def pieces(matrix: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``matrix`` [N, ...] in views of as many rows each, at least one."""
    return matrix.split(rows_of_piece(matrix))


def rows_of_piece(matrix: torch.Tensor) -> int:
    """How many rows a view of ``matrix`` [N, ...] has."""
    most = ELEMENTS if matrix.is_cpu else ELSEWHERE
    return max(most * len(matrix) // max(matrix.numel(), 1), 1)
