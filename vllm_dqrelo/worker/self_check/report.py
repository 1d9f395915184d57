# SPDX-License-Identifier: Apache-2.0
"""What a self-check found."""

from dataclasses import dataclass, field

import torch


class SelfCheckError(RuntimeError):
    """A worker does not compute what deltas say."""


@dataclass
class Report:
    """The largest errors, each as a part of what is allowed.

    Attributes:
        worst: kind of check -> error / tolerance.
        problem: the first error that is larger than its tolerance.
        left_out: what was not checked, and why.
    """

    worst: dict[str, float] = field(default_factory=dict)
    problem: str | None = None
    left_out: list[str] = field(default_factory=list)

    def note(self, check: str, part: float, what: str) -> None:
        """Take in one comparison. The check goes on: other workers wait for this one.

        Args:
            check: its kind.
            part: error / tolerance.
            what: op, shape, dtype.
        """
        self.worst[check] = max(part, self.worst.get(check, 0.0))
        if not part <= 1 and self.problem is None:
            self.problem = f"{check}: {what}: {part:.3g} times the tolerance"

    def compare(
        self,
        check: str,
        got: torch.Tensor,
        want: torch.Tensor,
        tolerance: torch.Tensor,
        what: str,
    ) -> None:
        """Compare tensors of one shape, element by element."""
        error = (got.double() - want.double()).abs()
        part = (error / tolerance).nan_to_num(nan=torch.inf)
        if not part.numel():
            return
        at = int(part.argmax())
        largest, allowed = float(error.flatten()[at]), float(tolerance.flatten()[at])
        text = f"{what}: error {largest:.3g}, tolerance {allowed:.3g}"
        self.note(check, float(part.flatten()[at]), text)

    def same(
        self, check: str, got: torch.Tensor, want: torch.Tensor, what: str
    ) -> None:
        """Compare bytes."""
        one, other = (t.contiguous().view(-1).view(torch.uint8) for t in (got, want))
        equal = torch.equal(one, other)
        self.note(check, 0.0 if equal else torch.inf, f"{what}: other bytes")

    def __str__(self) -> str:
        return ", ".join(f"{check} {part:.2g}" for check, part in self.worst.items())
