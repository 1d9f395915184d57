# SPDX-License-Identifier: Apache-2.0
"""Which part of a stored tensor a parameter is."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """Some rows of a tensor, or of one expert's matrix in it.

    Semantics: ``stored[expert].T[start:stop]``, with ``[expert]`` where that is a
    number, and ``.T`` where it is ``transposed``.
    """

    start: int = 0
    stop: int | None = None
    expert: int | None = None
    transposed: bool = False

    def shape(self, stored: list[int]) -> list[int]:
        """The shape of the part, from the shape of the stored tensor."""
        shape = stored if self.expert is None else stored[1:]
        shape = shape[::-1] if self.transposed else shape
        rows = range(shape[0] if shape else 0)[self.start : self.stop]
        return [len(rows), *shape[1:]] if shape else shape

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """The part of a tensor or of an expert's matrix, in memory of its own."""
        matrix = matrix.T if self.transposed else matrix
        if not matrix.ndim:
            return matrix
        rows = matrix[self.start : self.stop]
        return rows.clone(memory_format=torch.contiguous_format)


WHOLE = Part()
