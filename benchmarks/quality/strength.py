# SPDX-License-Identifier: Apache-2.0
"""How long a low-rank part should be: KL on a fine-tune's task and on other text.

    python -m benchmarks.quality.strength [--output strength.csv] [--only NAME]

The fine-tunes differ in learning rate and steps. A low-rank part without sign planes
is multiplied by its ``compress.strength`` with several limits; 1 is the part as it is.
Rows that the file has already are not measured again.
"""

import argparse
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import load_file

from benchmarks.machine import MACHINE, machine
from benchmarks.models.finetune import encode, finetune
from benchmarks.models.tasks import TASKS
from benchmarks.paths import CACHE, RESULTS
from benchmarks.quality.quality import HALF, OURS, Bench, State
from benchmarks.table import Table
from dqrelo_tools import compress
from dqrelo_tools.compress import Factors
from dqrelo_tools.fidelity import Distance

# Task, steps and learning rate.
FINE_TUNES = (
    ("queries", 10, 2e-4),
    ("orders", 20, 1e-3),
    ("tickets", 30, 2e-4),
)
RATIOS = (1 / 16, 1 / 32)
LIMITS = (1.0, 1.02, 1.05, 1.1)
EXAMPLES = 12  # held-out, of the task
ROWS, LENGTH = 4, 192  # of Python's help texts, which no task has seen

COLUMNS = ("fine_tune", "lr", "ratio", "limit", "kl", "top1", "kl_off_task")
COLUMNS += ("top1_off_task", *MACHINE)


class Texts:
    """Tokens of a task and of other text, and what a model says to them."""

    def __init__(self, bench: Bench, task: str) -> None:
        self.bench = bench
        ids, _ = encode(bench.tokenizer, TASKS[task].test(EXAMPLES))
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics)[:20])
        other = torch.tensor(bench.tokenizer.encode(text)[: ROWS * LENGTH])
        other = other.view(ROWS, LENGTH)
        there = ids != bench.tokenizer.pad_token_id
        self.texts = ((ids, there), (other, torch.ones_like(other, dtype=torch.bool)))

    @torch.no_grad()
    def log_probabilities(self, state: State) -> list[torch.Tensor]:
        """float32 [tokens, vocabulary] of the task and of the other text."""
        self.bench.become(state)
        model = self.bench.model
        hidden = [
            model.model(ids[:, :-1]).last_hidden_state[there[:, :-1]]
            for ids, there in self.texts
        ]
        return [model.lm_head(one).log_softmax(-1) for one in hidden]

    def distances(self, expected: list[torch.Tensor], state: State) -> dict[str, str]:
        """KL and top-1 agreement on both texts, as columns of a results file.

        Args:
            expected: the log-probabilities of the fine-tune.
            state: the weights of its approximation.
        """
        columns = {}
        got = self.log_probabilities(state)
        for log_p, log_q, end in zip(expected, got, ("", "_off_task"), strict=True):
            found = Distance()
            found.add(log_p, log_q)
            columns[f"kl{end}"] = f"{found.to_dict()['kl']:.4e}"
            columns[f"top1{end}"] = f"{found.to_dict()['top1']:.4f}"
        return columns


def fine_tuned(bench: Bench, task: str, steps: int, lr: float) -> tuple[str, State]:
    """The name and the weights of a fine-tune, which is made once."""
    name = f"{task}-{steps}-{lr:g}"
    folder = CACHE / "quality" / "finetunes" / name
    finetune(bench.folder, TASKS[task], folder, steps, lr)
    loaded = load_file(folder / "model.safetensors")
    return name, {n: loaded[n].float() for n in bench.base}


def measure(bench: Bench, task: str, steps: int, lr: float, table: Table) -> None:
    """Add the rows of one fine-tune."""
    name, state = fine_tuned(bench, task, steps, lr)
    changes = {n: tensor - bench.base[n] for n, tensor in state.items()}
    texts = Texts(bench, task)
    expected = texts.log_probabilities(state)
    for ratio in RATIOS:
        if all((name, f"{ratio:g}", f"{limit:g}") in table for limit in LIMITS):
            continue
        kept: State = {}
        for parameter, change in changes.items():
            kept[parameter] = change
            if change.ndim == 2:
                size = OURS.size(*change.shape, ratio, HALF)
                kept[parameter] = Factors.of(change, size.rank, size.dtype).dense()
        for limit in LIMITS:
            compress.MAX_STRENGTH = limit
            approximate = {
                n: bench.base[n] + compress.strength(changes[n], part) * part
                for n, part in kept.items()
            }
            row = {"fine_tune": name, "lr": f"{lr:g}", "ratio": f"{ratio:g}"}
            row["limit"] = f"{limit:g}"
            row |= texts.distances(expected, approximate)
            print(*row.values(), flush=True)
            table.add({**row, **machine()})


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS / "strength.csv")
    parser.add_argument("--only", help="one fine-tune, such as orders-20-0.001")
    arguments = parser.parse_args()
    table = Table(arguments.output, ("fine_tune", "ratio", "limit"), COLUMNS)
    bench = Bench()
    for task, steps, lr in FINE_TUNES:
        if arguments.only in (None, f"{task}-{steps}-{lr:g}"):
            measure(bench, task, steps, lr, table)


if __name__ == "__main__":
    main()
