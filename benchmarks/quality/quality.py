# SPDX-License-Identifier: Apache-2.0
"""How much of a fine-tune survives compression, by method and by bytes.

    python -m benchmarks.quality.quality [--output-dir benchmarks/results] [--short]

Real fine-tunes of SmolLM2-135M and Gemma 3 270M (bench.py), of several tasks and ways
to train. A method compresses every matrix of a fine-tune; vectors stay exact. Then the
model answers held-out prompts, and its next-token distributions on them and on other
text are compared with the fine-tune's. Rows that ``quality.csv`` has already are not
measured again.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.machine import MACHINE, machine
from benchmarks.models.tasks import TASKS
from benchmarks.paths import RESULTS
from benchmarks.quality.bench import Bench, FineTune, State, Training
from benchmarks.table import Table
from dqrelo_tools.advise import RATIOS, survey
from dqrelo_tools.compress import Factors, compress
from dqrelo_tools.method import BITS, METHODS, Method
from dqrelo_tools.report import relative_error
from dqrelo_tools.spectrum import Spectrum
from dqrelo_tools.svd import truncated_svd
from vllm_dqrelo.format.checkpoint import EMBEDDINGS, ends_with

FINE_TUNES = [Training(task, steps) for steps in (10, 30) for task in TASKS]
# Other lengths, learning rates, tasks and ways to train. Nothing in the converter was
# chosen by the first, the third and the sixth.
OTHERS = [
    Training("orders", 90),
    Training("orders", 20, lr=1e-3),
    Training("tickets", 60, lr=2e-5),
    Training("code", 24),
    Training("queries", 30, lr=1e-3, lora=16),
    Training("tickets", 10, after=Training("orders", 30)),
    Training("orders", 20, base="gemma3"),
    Training("queries", 60, lr=5e-5, base="gemma3"),
]
HALF = torch.bfloat16

# A matrix's name, and the changes of all -> what stands for its change, and the bytes.
Compressor = Callable[[str, State], tuple[torch.Tensor, int]]


def of(method: Method, ratio: float) -> Compressor:
    """A method of the converter."""

    def run(name: str, changes: State) -> tuple[torch.Tensor, int]:
        n, k = changes[name].shape
        ratios = method.ratios(ratio, {m: c.numel() for m, c in changes.items()})
        size = method.size(n, k, ratios[name], HALF)
        kept = compress(changes[name], size, method, ends_with(name, EMBEDDINGS))
        return kept.dense(), size.bytes(n, k)

    return run


def mixed_precision_svd(ratio: float) -> Compressor:
    """Singular vectors in 8, 3 and 2 bits, as Delta-CoMe has it, without its data.

    arXiv 2406.08903 quantises with GPTQ on calibration text; here each vector is
    rounded to the uniform levels with the least squared error, and has one 16-bit
    scale a side. 2 vectors of 8 bits, 32 of 3, and of 2 bits as many as fit.
    """

    def run(name: str, changes: State) -> tuple[torch.Tensor, int]:
        delta = changes[name]
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

    def run(name: str, changes: State) -> tuple[torch.Tensor, int]:
        delta = changes[name]
        n, k = delta.shape
        method = replace(OURS, planes=1)
        size = method.size(n, k, ratio - 4 / (BITS / 8 * n), HALF)
        signs = torch.zeros_like(delta)
        part = Factors.of(delta, size.rank, size.dtype, refit=False)
        for _ in range(1 + OURS.sweeps):
            part = part.refitted(delta - signs)
            left = delta - part.dense()
            column = left.abs().mean(0, keepdim=True)
            for _ in range(4):
                row = (left.abs() @ column.T) / column.square().sum()
                column = (row.T @ left.abs()) / row.square().sum()
            signs = torch.where(left > 0, row * column, -row * column)
        return signs + part.dense(), size.bytes(n, k) + 4 * k

    return run


PAPER, OURS = METHODS["dqrelo-paper"], METHODS["dqrelo"]
# Of every fine-tune.
COMPARED: dict[str, Compressor] = {
    "dqrelo 1/8": of(OURS, 1 / 8),
    "dqrelo 1/16": of(OURS, 1 / 16),
    "dqrelo 1/32": of(OURS, 1 / 32),
    "dqrelo-paper 1/8": of(PAPER, 1 / 8),
}
# Of FINE_TUNES.
MAIN: dict[str, Compressor] = {
    **COMPARED,
    "BitDelta": of(PAPER, 1 / 16),
    "BitDelta, scale per row": of(Method(planes=1, dtype=None, sweeps=0), 1 / 16),
    "SVD 1/8": of(Method(planes=0, dtype=None), 1 / 8),
    "mixed-precision SVD 1/8": mixed_precision_svd(1 / 8),
    "2-bit Lloyd per row": of(Method(planes=2, sweeps=0), 1 / 8),
}
# Of one fine-tune: other sizes, and the steps from the paper's method to ours.
ALSO: dict[str, Compressor] = {
    **{f"dqrelo {r}/32": of(OURS, r / 32) for r in (3, 6, 8)},
    **{f"dqrelo-paper {r}/32": of(PAPER, r / 32) for r in (3, 6, 8)},
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
COLUMNS += ("kl_off_task", "top1_off_task", "exact_match", "cpu_seconds", *MACHINE)
SCALE_COLUMNS = ("fine_tune", "steps", "mean_magnitude", "mean_singular_value")
SCALE_COLUMNS += ("entropy_bits", "exact_match", "kl_of_base")
PREDICTED_COLUMNS = ("fine_tune", "ratio", "predicted_error")


def approximated(
    model: FineTune, method: Compressor
) -> tuple[State, dict[str, object]]:
    """The weights that stand for a fine-tune's, their bits and their error."""
    base, changes = model.bench.base, model.changes
    state, missed, whole, size, weights = dict(base), 0.0, 0.0, 0, 0
    for parameter, change in changes.items():
        kept = change
        if change.ndim == 2:
            kept, taken = method(parameter, changes)
            size, weights = size + taken, weights + change.numel()
            missed += float((change - kept).square().sum())
            whole += float(change.square().sum())
        state[parameter] = base[parameter] + kept
    return state, {
        "bits_per_weight": round(8 * size / weights, 4),
        "relative_error": round((missed / whole) ** 0.5, 5),
    }


def row(model: FineTune, name: str, method: Compressor) -> dict[str, object]:
    """Compress a fine-tune, and compare."""
    start = time.process_time()
    state, numbers = approximated(model, method)
    seconds = time.process_time() - start
    return {
        "fine_tune": model.name,
        "method": name,
        **numbers,
        **model.distances(state),
        "exact_match": round(model.exact_match(), 4),
        "cpu_seconds": round(seconds, 1),
    }


def scale(model: FineTune) -> dict[str, object]:
    """The measures of the paper's Table 1, and what the fine-tune knows."""
    matrices = [c for c in model.changes.values() if c.ndim == 2]
    count = sum(c.numel() for c in matrices)
    magnitude = sum(float(c.abs().sum()) for c in matrices) / count
    singular = torch.cat([Spectrum.of(c).squares.sqrt() for c in matrices])
    kl = model.distances(model.bench.base)["kl"]
    model.bench.become(model.state)
    return {
        "fine_tune": model.name,
        "steps": model.training.steps,
        "mean_magnitude": f"{magnitude:.4e}",
        "mean_singular_value": f"{float(singular.mean()):.4e}",
        "entropy_bits": round(entropy(matrices), 3),
        "exact_match": round(model.exact_match(), 4),
        "kl_of_base": kl,
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
    scales = Table(output / "finetunes.csv", ("fine_tune",), SCALE_COLUMNS)
    keys = ("fine_tune", "ratio")
    predicted = Table(output / "predicted.csv", keys, PREDICTED_COLUMNS)
    plan = [(training, MAIN) for training in FINE_TUNES]
    plan += [(training, COMPARED) for training in OTHERS]
    plan += [(Training("orders", 30), ALSO)]
    plan = plan[:1] if arguments.short else plan
    total, bench = sum(len(methods) for _, methods in plan), Bench()
    with tqdm(total=total, desc="quality", unit=" rows") as progress:
        for training, methods in plan:
            if bench.name != training.base:
                bench = Bench(training.base)
            model = FineTune(bench, training)
            if (model.name,) not in scales:
                scales.add(scale(model))
            if (model.name, str(RATIOS[0])) not in predicted:
                for expected in predictions(model):
                    predicted.add(expected)
            for name, method in methods.items():
                progress.set_postfix_str(f"{model.name}: {name}")
                if (model.name, name) not in quality:
                    quality.add({**row(model, name, method), **machine()})
                progress.update()
    print(f"the files in {output} are complete")


if __name__ == "__main__":
    main()
