# SPDX-License-Identifier: Apache-2.0
"""What a conversion or a check found about each parameter, and in all."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dqrelo_tools.compress import squared_norm
from dqrelo_tools.fidelity import Fidelity
from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.tensors import MatrixDelta


@dataclass(frozen=True)
class Entry:
    """One parameter of the fine-tune.

    Attributes:
        name: as in the checkpoint.
        kind: "matrix" (compressed), "exact" (stored as it is) or "unchanged".
        weights: number of elements.
        model_bytes: their size in the fine-tune.
        rank: of the low-rank part; 0 unless a matrix.
        planes: sign planes; 0 unless a matrix.
        change: squared Frobenius norm of fine-tune minus base.
        missed: squared Frobenius norm of what the delta misses of it.
    """

    name: str
    kind: str
    weights: int
    model_bytes: int
    rank: int = 0
    planes: int = 0
    change: float = 0.0
    missed: float = 0.0

    @property
    def module(self) -> str:
        """``q_proj`` of ``model.layers.0.self_attn.q_proj.weight``."""
        return self.name.split(".")[-2] if "." in self.name else self.name


def matrix_entry(
    name: str, tensor: torch.Tensor, change: torch.Tensor, matrix: MatrixDelta
) -> Entry:
    """The entry of a compressed matrix ``tensor`` that differs by ``change``."""
    return Entry(
        name,
        "matrix",
        tensor.numel(),
        tensor.nbytes,
        matrix.rank,
        matrix.planes,
        squared_norm(change),
        squared_norm(matrix.dense().sub_(change)),
    )


def relative_error(entries: list[Entry]) -> float:
    """``||change - delta|| / ||change||`` over all of them (Frobenius)."""
    change = sum(entry.change for entry in entries)
    missed = sum(entry.missed for entry in entries)
    return (missed / change) ** 0.5 if change else float(missed > 0)


def span(values: Iterable[int]) -> str:
    """ "3", or "2-5" of several."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[-1]
    return str(low) if low == high else f"{low}-{high}"


@dataclass
class Report:
    """The sizes and errors of a delta.

    Attributes:
        entries: one for each parameter.
        delta_bytes: size of the files with its tensors.
        fidelity: on prompts, if it was measured.
    """

    entries: list[Entry] = field(default_factory=list)
    delta_bytes: int = 0
    fidelity: Fidelity | None = None

    @property
    def bits_per_weight(self) -> float:
        """Size of the delta over the number of weights of the fine-tune."""
        return 8 * self.delta_bytes / sum(entry.weights for entry in self.entries)

    def modules(self) -> dict[str, list[Entry]]:
        """The compressed matrices by module type, in order of appearance."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.kind == "matrix":
                found.setdefault(entry.module, []).append(entry)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
        measured = {"fidelity": self.fidelity.to_dict()} if self.fidelity else {}
        return {
            "delta_bytes": self.delta_bytes,
            "model_bytes": sum(entry.model_bytes for entry in self.entries),
            "bits_per_weight": self.bits_per_weight,
            "relative_error": {
                module: relative_error(entries)
                for module, entries in self.modules().items()
            },
            **measured,
            "parameters": [asdict(entry) for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Report":
        """The inverse of :meth:`to_dict`, without ``fidelity``."""
        return cls([Entry(**entry) for entry in raw["parameters"]], raw["delta_bytes"])

    def to_text(self) -> str:
        """The text for people."""
        rows = [("module", "matrices", "planes", "rank", "relative error")]
        for module, entries in self.modules().items():
            planes = span(entry.planes for entry in entries)
            rank = span(entry.rank for entry in entries)
            error = f"{relative_error(entries):.4f}"
            rows.append((module, str(len(entries)), planes, rank, error))
        kinds = [entry.kind for entry in self.entries]
        model_bytes = sum(entry.model_bytes for entry in self.entries)
        counts = (
            f"{kinds.count('matrix')} matrices compressed, {kinds.count('exact')} "
            f"parameters exact, {kinds.count('unchanged')} unchanged"
        )
        size = (
            f"{self.delta_bytes:,} bytes, {self.bits_per_weight:.3f} bits per weight, "
            f"1/{model_bytes / self.delta_bytes:.2f} of the fine-tune's "
            f"{model_bytes:,} bytes"
        )
        lines = [text_table(rows), "", counts, size]
        if self.fidelity:
            lines += ["", self.fidelity.to_text()]
        return "\n".join(lines)
