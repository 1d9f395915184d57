# SPDX-License-Identifier: Apache-2.0
"""How much of a fine-tune survives compression, by method and by bytes.

    python -m benchmarks.quality.quality [--output-dir benchmarks/results] [--short]

Real full fine-tunes of SmolLM2-135M (finetune.py): three tasks, each trained for three
lengths. Every method compresses every matrix of them; vectors stay exact. Then the
model answers held-out prompts, and its next-token distributions are compared with the
fine-tune's. Rows that ``quality.csv`` has already are not measured again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import MACHINE, machine
from benchmarks.models import smollm
from benchmarks.models.finetune import encode, finetune, generate
from benchmarks.models.tasks import TASKS
from benchmarks.paths import CACHE, RESULTS
from benchmarks.table import Table
from dqrelo_tools.advise import RATIOS, survey
from dqrelo_tools.compress import (
    BITS,
    METHODS,
    Factors,
    Method,
    compress,
)
from dqrelo_tools.fidelity import Distance
from dqrelo_tools.report import relative_error
from dqrelo_tools.spectrum import Spectrum
from dqrelo_tools.svd import truncated_svd
from vllm_dqrelo.format.checkpoint import EMBEDDINGS, ends_with

LENGTHS = (10, 30, 90)  # steps of training
HELD_OUT = 24  # examples whose tokens are compared, and prompts that are answered
HALF = torch.bfloat16

State = dict[str, torch.Tensor]
# A matrix, and whether its rows are tokens' -> what stands for it, and its bytes.
Compressor = Callable[[torch.Tensor, bool], tuple[torch.Tensor, int]]


def of(method: Method, ratio: float) -> Compressor:
    """A method of the converter."""

    def run(delta: torch.Tensor, of_tokens: bool) -> tuple[torch.Tensor, int]:
        n, k = delta.shape
        size = method.size(n, k, ratio, HALF)
        return compress(delta, size, method, of_tokens).dense(), size.bytes(n, k)

    return run


def mixed_precision_svd(ratio: float) -> Compressor:
    """Singular vectors in 8, 3 and 2 bits, as Delta-CoMe has it, without its data.

    arXiv 2406.08903 quantises with GPTQ on calibration text; here each vector is
    rounded to the uniform levels with the least squared error, and has one 16-bit
    scale a side. 2 vectors of 8 bits, 32 of 3, and of 2 bits as many as fit.
    """

    def run(delta: torch.Tensor, _: bool) -> tuple[torch.Tensor, int]:
        n, k = delta.shape
        left = ratio * 16 * n * k
        bits: list[int] = []
        while len(bits) < min(n, k):
            width = 8 if len(bits) < 2 else 3 if len(bits) < 34 else 2
            left -= width * (n + k) + 32
            if left < 0:
                break
            bits.append(width)
        b, a = (side.float() for side in truncated_svd(delta, len(bits)))
        widths = torch.tensor(bits)[:, None]
        b, a = uniform(b.T, widths).T, uniform(a, widths)
        return b @ a, sum(w * (n + k) + 32 for w in bits) // 8

    return run


def uniform(rows: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Each row rounded to 2^bits levels around zero, the best of a few scales."""
    top = 2.0**bits / 2
    best, least = torch.zeros_like(rows), rows.square().sum(1, keepdim=True)
    for clip in (1.0, 0.85, 0.7, 0.55, 0.45):
        step = clip * rows.abs().amax(1, keepdim=True).clamp_min(1e-30) / top
        level = (rows / step - 0.5).round().clamp(-top, top - 1) + 0.5
        error = (rows - level * step).square().sum(1, keepdim=True)
        best = torch.where(error < least, level * step, best)
        least = torch.minimum(error, least)
    return best


def row_and_column_scales(ratio: float) -> Compressor:
    """Ours, with ``row[i] column[j]`` as the size of a sign: no format has that.

    The scales are the nearest to the magnitudes in squared error, by turns; the rank
    is lower by what the columns' scales take.
    """

    def run(delta: torch.Tensor, _: bool) -> tuple[torch.Tensor, int]:
        n, k = delta.shape
        size = OURS.size(n, k, ratio - 4 / (BITS / 8 * n), HALF)
        signs, part = torch.zeros_like(delta), None
        for _ in range(1 + OURS.sweeps):
            part = Factors.of(delta - signs, size.rank, size.dtype, part)
            left = delta - part.dense()
            column = left.abs().mean(0, keepdim=True)
            for _ in range(4):
                row = (left.abs() @ column.T) / column.square().sum()
                column = (row.T @ left.abs()) / row.square().sum()
            signs = torch.where(left > 0, row * column, -row * column)
        return signs + part.dense(), size.bytes(n, k) + 4 * k

    return run


PAPER, OURS = METHODS["dqrelo-paper"], METHODS["dqrelo"]
# On every fine-tune.
MAIN: dict[str, Compressor] = {
    "dqrelo 1/8": of(OURS, 1 / 8),
    "dqrelo 1/16": of(OURS, 1 / 16),
    "dqrelo-paper 1/8": of(PAPER, 1 / 8),
    "BitDelta": of(PAPER, 1 / 16),
    "BitDelta, scale per row": of(Method(planes=1, dtype=None, sweeps=0), 1 / 16),
    "SVD 1/8": of(Method(planes=0, dtype=None), 1 / 8),
    "mixed-precision SVD 1/8": mixed_precision_svd(1 / 8),
    "2-bit Lloyd per row": of(Method(planes=2, sweeps=0), 1 / 8),
}
# On those of the middle length: other sizes, and the steps from the paper's to ours.
ALSO: dict[str, Compressor] = {
    **{f"dqrelo {r}/32": of(OURS, r / 32) for r in (1, 3, 6, 8)},
    **{f"dqrelo-paper {r}/32": of(PAPER, r / 32) for r in (3, 5, 6, 7, 8, 9)},
    "SVD 1/16": of(Method(planes=0, dtype=None), 1 / 16),
    "SVD + one-bit 1/8": of(Method(1, False, None, True, 0), 1 / 8),
    "one-bit + SVD, int8 factors": of(Method(1, False, torch.int8, False, 0), 1 / 8),
    "one-bit + SVD, int4 factors": of(Method(1, False, OURS.dtype, False, 0), 1 / 8),
    "SVD + one-bit, int4 factors": of(Method(1, False, OURS.dtype, True, 0), 1 / 8),
    "+ scale per row": of(Method(1, True, OURS.dtype, True, 0), 1 / 8),
    "+ scale per column": row_and_column_scales(1 / 8),
    "+ 4 sweeps": of(Method(1, True, OURS.dtype, True, 4), 1 / 8),
    "low-rank int4 alone": of(Method(planes=0), 1 / 8),
    "low-rank int8 alone": of(Method(planes=0, dtype=torch.int8), 1 / 8),
}

COLUMNS = ("fine_tune", "method", "bits_per_weight", "relative_error", "kl", "top1")
COLUMNS += ("exact_match", "seconds", *MACHINE)
SCALE_COLUMNS = ("fine_tune", "steps", "mean_magnitude", "mean_singular_value")
SCALE_COLUMNS += ("entropy_bits", "exact_match", "kl_of_base")
PREDICTED_COLUMNS = ("fine_tune", "ratio", "predicted_error")


@dataclass
class FineTune:
    """A fine-tune, and what it says to held-out examples.

    Attributes:
        task: name in TASKS.
        steps: of training.
    """

    bench: "Bench"
    task: str
    steps: int
    state: State = field(init=False)

    def __post_init__(self) -> None:
        finetune(self.bench.folder, TASKS[self.task], self.folder, steps=self.steps)
        loaded = load_file(self.folder / "model.safetensors")
        self.state = {name: tensor.float() for name, tensor in loaded.items()}

    @property
    def name(self) -> str:
        return f"{self.task}-{self.steps}"

    @property
    def folder(self) -> Path:
        return CACHE / "quality" / "finetunes" / self.name

    @property
    def changes(self) -> State:
        """Fine-tune minus base."""
        return {n: t - self.bench.base[n] for n, t in self.state.items()}

    @cached_property
    def log_p(self) -> torch.Tensor:
        """The fine-tune's own log-probabilities of every next token."""
        return self.bench.log_probabilities(self.state, self.task)


class Bench:
    """The base, one model in memory whose weights are replaced, and its tokenizer."""

    def __init__(self) -> None:
        self.folder = smollm.base()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32
        ).eval()
        self.parameters = dict(self.model.named_parameters())
        self.base = {n: p.detach().clone() for n, p in self.parameters.items()}

    def become(self, state: State) -> None:
        """Give the model these weights."""
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[name])

    @torch.no_grad()
    def log_probabilities(self, state: State, task: str) -> torch.Tensor:
        """float32 [tokens, vocabulary] over held-out prompts with their answers."""
        self.become(state)
        ids, _ = encode(self.tokenizer, TASKS[task].test(HELD_OUT))
        there = (ids != self.tokenizer.pad_token_id)[:, :-1]
        hidden = self.model.model(ids[:, :-1]).last_hidden_state[there]
        return self.model.lm_head(hidden).log_softmax(-1)

    def exact_match(self, task: str) -> float:
        """Share of held-out prompts that the model answers right as it is now."""
        prompts, answers = zip(*TASKS[task].test(HELD_OUT), strict=True)
        replies = generate(self.model, self.tokenizer, prompts)
        return sum(map(str.__eq__, replies, answers)) / HELD_OUT

    def distance(self, model: FineTune, state: State) -> dict[str, float]:
        """KL and top-1 agreement of a model with these weights, which stay in place."""
        found = Distance()
        found.add(model.log_p, self.log_probabilities(state, model.task))
        return found.to_dict()

    def row(self, model: FineTune, name: str, method: Compressor) -> dict[str, object]:
        """Compress a fine-tune, and compare."""
        state, missed, whole, size, weights = dict(self.base), 0.0, 0.0, 0, 0
        start = time.perf_counter()
        for parameter, change in model.changes.items():
            kept = change
            if change.ndim == 2:
                kept, taken = method(change, ends_with(parameter, EMBEDDINGS))
                size, weights = size + taken, weights + change.numel()
                missed += float((change - kept).square().sum())
                whole += float(change.square().sum())
            state[parameter] = self.base[parameter] + kept
        seconds = time.perf_counter() - start
        found = self.distance(model, state)
        return {
            "fine_tune": model.name,
            "method": name,
            "bits_per_weight": round(8 * size / weights, 4),
            "relative_error": round((missed / whole) ** 0.5, 5),
            "kl": f"{found['kl']:.4e}",
            "top1": round(found["top1"], 4),
            "exact_match": round(self.exact_match(model.task), 4),
            "seconds": round(seconds, 1),
        }

    def scale(self, model: FineTune) -> dict[str, object]:
        """The measures of the paper's Table 1, and what the fine-tune knows."""
        matrices = [c for c in model.changes.values() if c.ndim == 2]
        count = sum(c.numel() for c in matrices)
        magnitude = sum(float(c.abs().sum()) for c in matrices) / count
        singular = torch.cat([Spectrum.of(c).squares.sqrt() for c in matrices])
        kl = self.distance(model, self.base)["kl"]
        self.become(model.state)
        return {
            "fine_tune": model.name,
            "steps": model.steps,
            "mean_magnitude": f"{magnitude:.4e}",
            "mean_singular_value": f"{float(singular.mean()):.4e}",
            "entropy_bits": round(entropy(matrices), 3),
            "exact_match": round(self.exact_match(model.task), 4),
            "kl_of_base": f"{kl:.4e}",
        }


def predictions(model: FineTune) -> Iterator[dict[str, object]]:
    """What ``dqrelo advise`` expects of each ratio."""
    found = survey(str(model.bench.folder), str(model.folder), "cpu")
    for ratio in RATIOS:
        error = relative_error(found.uniform(ratio).entries)
        yield {
            "fine_tune": model.name,
            "ratio": str(ratio),
            "predicted_error": round(error, 5),
        }


def entropy(matrices: list[torch.Tensor]) -> float:
    """Bits a value, in bins of 2^-16 (a fine-tune's smallest step or so)."""
    bins = torch.cat([(m.flatten() * 2**16).round().int() for m in matrices])
    share = bins.unique(return_counts=True)[1].double() / len(bins)
    return float(-(share * share.log2()).sum())


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--short", action="store_true", help="one fine-tune only")
    arguments = parser.parse_args()
    output = arguments.output_dir
    output.mkdir(parents=True, exist_ok=True)
    quality = Table(output / "quality.csv", ("fine_tune", "method"), COLUMNS)
    scale = Table(output / "finetunes.csv", ("fine_tune",), SCALE_COLUMNS)
    keys = ("fine_tune", "ratio")
    predicted = Table(output / "predicted.csv", keys, PREDICTED_COLUMNS)
    bench, middle = Bench(), LENGTHS[len(LENGTHS) // 2]
    plan = [(task, steps, MAIN) for steps in LENGTHS for task in TASKS]
    plan += [(task, middle, ALSO) for task in TASKS]
    plan = plan[:1] if arguments.short else plan
    total = sum(len(methods) for _, _, methods in plan)
    with tqdm(total=total, desc="quality", unit=" rows") as progress:
        for task, steps, methods in plan:
            model = FineTune(bench, task, steps)
            if (model.name,) not in scale:
                scale.add(bench.scale(model))
            if (model.name, str(RATIOS[0])) not in predicted:
                for row in predictions(model):
                    predicted.add(row)
            for name, method in methods.items():
                progress.set_postfix_str(f"{model.name}: {name}")
                if (model.name, name) not in quality:
                    quality.add({**bench.row(model, name, method), **machine()})
                progress.update()
    print(f"the files in {output} are complete")


if __name__ == "__main__":
    main()
