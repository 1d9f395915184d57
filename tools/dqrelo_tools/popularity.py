# SPDX-License-Identifier: Apache-2.0
"""Which model each request is for: laws of popularity, and recorded traces.

"Zipf" has several meanings in the literature of LoRA serving; these are ours, with
``p(i)`` the share of requests for the i-th of ``N`` models, i = 1..N:

    identical      p(1) = 1, all others 0
    distinct       no chance: request t is for model 1 + t mod N
    uniform        p(i) = 1 / N
    zipf:s         p(i) = i^-s / sum over j of j^-s       a power law of the rank
    geometric:r    p(i) = r^-i / sum over j of r^-j       r > 1; what Punica calls Zipf
    FILE           a trace: one model's name a line, in the order of the requests
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_dqrelo.format.errors import DqreloError

PARAMETERS = {"zipf": 0.0, "geometric": 1.0}  # and what must be exceeded
EXPECTED = "expected identical, distinct, uniform, zipf:S (S > 0), geometric:R (R > 1)"


@dataclass(frozen=True)
class Popularity:
    """A law, or a trace.

    Attributes:
        text: as it was given.
        law: "identical", ... or "trace".
        parameter: s of zipf, r of geometric; else 0.
        trace: the model of each request, numbered in the order of their first
            requests. Empty unless a trace.
    """

    text: str
    law: str
    parameter: float = 0.0
    trace: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Popularity":
        """Read a law such as "zipf:1.0", or the trace in a file.

        Raises:
            DqreloError: ``text`` is neither.
        """
        law, _, value = text.partition(":")
        if text in ("identical", "distinct", "uniform"):
            return cls(text, text)
        if law in PARAMETERS:
            try:
                parameter = float(value)
            except ValueError:
                parameter = 0.0
            if not PARAMETERS[law] < parameter < float("inf"):
                raise DqreloError(f"popularity {text}: {EXPECTED}")
            return cls(text, law, parameter)
        if not Path(text).is_file():
            raise DqreloError(f"popularity {text}: not a file; {EXPECTED} or a file")
        lines = Path(text).read_text().splitlines()
        names = [name for line in lines if (name := line.strip())]
        if not names:
            raise DqreloError(f"popularity {text}: a file without a model's name")
        numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return cls(text, "trace", trace=tuple(numbers[name] for name in names))

    def models(self, asked: int | None) -> int:
        """The number of models: as asked for, or what the trace has.

        Raises:
            DqreloError: the trace has more than ``asked``, or nothing says how many.
        """
        traced = 1 + max(self.trace, default=-1)
        if asked is None and not traced:
            raise DqreloError(
                f"popularity {self.text} does not say how many models: add --models N"
            )
        if asked is not None and asked < traced:
            raise DqreloError(f"{self.text} names {traced} models, more than {asked}")
        return traced if asked is None else asked

    def shares(self, models: int) -> np.ndarray:
        """p(i), float64 [models]; distinct and traces have none."""
        ranks = np.arange(1, models + 1, dtype=np.float64)
        if self.law == "zipf":
            weights = ranks**-self.parameter
        elif self.law == "geometric":
            weights = self.parameter ** (1 - ranks)  # the first is 1: no underflow
        else:
            weights = (ranks == 1) if self.law == "identical" else np.ones(models)
        return weights / weights.sum()

    def draw(self, models: int, requests: int, rng: np.random.Generator) -> np.ndarray:
        """The models of ``requests`` requests in order, int64, each 0 <= m < models.

        A trace shorter than that starts again from its first line.
        """
        if self.law == "distinct":
            return np.arange(requests) % models
        if self.law == "trace":
            return np.resize(np.array(self.trace), requests)
        return rng.choice(models, size=requests, p=self.shares(models))
