# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes of small bases, and how far a model with other weights is from them."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from pydoc_data import topics

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.models import smollm
from benchmarks.models.bases import fetch_base
from benchmarks.models.finetune import LR, encode, finetune, generate
from benchmarks.models.tasks import CODE, TASKS, Task
from benchmarks.paths import CACHE
from dqrelo_tools.fidelity import Distance

HELD_OUT = 24  # examples whose tokens are compared, and prompts that are answered
ROWS, LENGTH = 4, 192  # of Python's help texts, which no fine-tune has seen

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Training:
    """How a fine-tune is made.

    Attributes:
        task: name in TASKS, or CODE's.
        steps: of training.
        lr: learning rate.
        lora: rank of the adapters that are trained in place of all weights, and merged
            at the end; 0 for all weights.
        after: the fine-tune that it starts from; None for the base.
        base: in bases.BASES.
    """

    task: str
    steps: int
    lr: float = LR
    lora: int = 0
    after: "Training | None" = None
    base: str = "smollm2"

    @property
    def name(self) -> str:
        """Names the folder and the rows of results."""
        parts = [self.base] * (self.base != "smollm2")
        parts += [self.task, str(self.steps)]
        parts += [f"{self.lr:g}"] * (self.lr != LR) + ["lora"] * bool(self.lora)
        return "-".join(parts + (["after", self.after.name] if self.after else []))

    def run(self, base: Path) -> Path:
        """The folder of the fine-tune, which is made once."""
        folder = CACHE / "quality" / "finetunes" / self.name
        start = self.after.run(base) if self.after else base
        task = CODE if self.task == CODE.name else TASKS[self.task]
        return finetune(start, task, folder, self.steps, self.lr, self.lora)


class Bench:
    """The base, one model in memory whose weights are replaced, and its tokenizer.

    Args:
        base: in bases.BASES.
    """

    def __init__(self, base: str = "smollm2") -> None:
        self.name = base
        self.folder = (
            smollm.base()
            if base == "smollm2"
            else fetch_base(CACHE / "quality" / "bases" / base, base)
        )
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


@dataclass
class FineTune:
    """A fine-tune, and what it says to held-out examples and to other text.

    Attributes:
        state: its weights, float32.
    """

    bench: Bench
    training: Training
    state: State = field(init=False)

    def __post_init__(self) -> None:
        loaded = load_file(self.folder / "model.safetensors")
        self.state = {name: loaded[name].float() for name in self.bench.base}

    @cached_property
    def folder(self) -> Path:
        return self.training.run(self.bench.folder)

    @property
    def name(self) -> str:
        return self.training.name

    @property
    def task(self) -> Task:
        return CODE if self.training.task == CODE.name else TASKS[self.training.task]

    @property
    def changes(self) -> State:
        """Fine-tune minus base."""
        return {n: t - self.bench.base[n] for n, t in self.state.items()}

    @cached_property
    def texts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Tokens of the task and of other text, and where they are not padding."""
        tokenizer = self.bench.tokenizer
        ids, _ = encode(tokenizer, self.task.test(HELD_OUT))
        text = "\n".join(topics.topics[name] for name in sorted(topics.topics)[:20])
        other = torch.tensor(tokenizer.encode(text)[: ROWS * LENGTH])
        other = other.view(ROWS, LENGTH)
        return [
            (ids, ids != tokenizer.pad_token_id),
            (other, torch.ones_like(other, dtype=torch.bool)),
        ]

    @cached_property
    def log_p(self) -> list[torch.Tensor]:
        """Its own log-probabilities of every next token."""
        return self.log_probabilities(self.state)

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

    def distances(self, state: State) -> dict[str, str]:
        """KL and top-1 agreement on both texts, as columns of a results file.

        Args:
            state: the weights of its approximation; they stay in the bench's model.
        """
        columns = {}
        expected, got = self.log_p, self.log_probabilities(state)
        for log_p, log_q, end in zip(expected, got, ("", "_off_task"), strict=True):
            found = Distance()
            # Some tokens at a time: a vocabulary may have 262,144 of them.
            for some in zip(log_p.split(256), log_q.split(256), strict=True):
                found.add(*some)
            columns[f"kl{end}"] = f"{found.to_dict()['kl']:.4e}"
            columns[f"top1{end}"] = f"{found.to_dict()['top1']:.4f}"
        return columns

    def exact_match(self) -> float:
        """Share of held-out prompts that the bench's model answers right as it is."""
        prompts, answers = zip(*self.task.test(HELD_OUT), strict=True)
        replies = generate(self.bench.model, self.bench.tokenizer, prompts)
        return sum(map(str.__eq__, replies, answers)) / HELD_OUT
