# SPDX-License-Identifier: Apache-2.0
"""How much of a fine-tune's behaviour its delta keeps, on a user's own text."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dqrelo_tools.prompts import Prompt
from dqrelo_tools.text_table import text_table
from vllm_dqrelo.format.checkpoint import HEAD, Checkpoint
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError, refuse
from vllm_dqrelo.format.tensors import ADDED

WINDOW = 128  # tokens whose logits are in memory at a time


@dataclass
class Distance:
    """From the fine-tune to another model, summed over tokens."""

    tokens: int = 0
    kl_sum: float = 0.0
    same: int = 0

    def add(self, log_p: torch.Tensor, log_q: torch.Tensor) -> None:
        """Count some tokens.

        Args:
            log_p: of the fine-tune, float32 [tokens, vocabulary].
            log_q: of the other model.
        """
        self.tokens += log_p.shape[0]
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        self.kl_sum += float(kl.sum(dtype=torch.float64))
        self.same += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())

    def to_dict(self) -> dict[str, float]:
        """Means over the tokens."""
        return {"kl": self.kl_sum / self.tokens, "top1": self.same / self.tokens}


@dataclass
class Fidelity:
    """The distance of base + delta, and of the base alone, on some prompts.

    Semantics: every token of a prompt predicts the next token, the last one too. For
    each, with p of the fine-tune and q of the other model over the whole vocabulary:
    kl = sum p (log p - log q) in nats, and top1 says whether the most probable token is
    the same. Both are means over all tokens of all prompts. Without the base where the
    fine-tune has tokens that it lacks; tokens that only the base has are left out.
    """

    prompts: int
    delta: Distance = field(default_factory=Distance)
    base: Distance = field(default_factory=Distance)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``--json``."""
        return {
            "prompts": self.prompts,
            "tokens": self.delta.tokens,
            "delta": self.delta.to_dict(),
            "base": self.base.to_dict() if self.base.tokens else None,
        }

    def to_text(self) -> str:
        """The text for people."""
        counts = f"{self.prompts:,} prompts, {self.delta.tokens:,} tokens"
        rows = [(counts, "KL per token", "top-1 agreement")]
        for name, distance in (("base + delta", self.delta), ("base", self.base)):
            if distance.tokens:
                means = distance.to_dict()
                rows.append((name, f"{means['kl']:.4g}", f"{means['top1']:.1%}"))
        return text_table(rows)


def measure(
    base: Path, delta: Delta, model: Path, prompts: Mapping[int, Prompt]
) -> Fidelity:
    """Run fine-tune, base + delta and base on each prompt.

    Three models are in memory, in float32: 12 bytes a weight.

    Args:
        base: the folder of the base.
        delta: made from it.
        model: the folder of the fine-tune; its tokenizer and chat template are used.
        prompts: as ``read_prompts`` gives them; cut to the positions that the model
            has, which is said on stderr.

    Raises:
        DqreloError: a prompt cannot be made into tokens, or transformers calls the
            parameters otherwise than the checkpoint does.
    """
    inputs = encode(model, prompts)
    models = [load(model), load(base, delta)]
    if not delta.added_tokens:  # which the base could not read
        models.append(load(base))
    config = models[0].config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if cut := sum(len(tokens) > (limit or len(tokens)) for tokens in inputs):
        print(
            f"dqrelo: {cut} of {len(inputs)} prompts are cut to {limit} tokens, "
            "the most that the model takes",
            file=sys.stderr,
        )
    found = Fidelity(len(inputs))
    for tokens in tqdm(inputs, desc="prompts", unit=" prompts", disable=None):
        for log_p, log_delta, *log_base in log_probabilities(models, tokens[:limit]):
            found.delta.add(log_p, log_delta)
            for log_q in log_base:
                found.base.add(log_p, log_q)
    return found


def encode(model: Path, prompts: Mapping[int, Prompt]) -> list[torch.Tensor]:
    """The tokens of each prompt, int64; a chat goes through the template first."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded, problems = [], []
    for line, prompt in prompts.items():
        try:
            text = prompt if isinstance(prompt, str) else chat(tokenizer, prompt)
        except Exception as error:  # a template is a program and raises what it likes
            problems.append(f"line {line}: {error}")
            continue
        tokens = tokenizer(text, add_special_tokens=text is prompt, verbose=False)
        if not tokens["input_ids"]:
            problems.append(f"line {line}: {text[:80]!r} gives no tokens")
        encoded.append(torch.tensor(tokens["input_ids"], dtype=torch.int64))
    refuse(f"prompts that the tokenizer of {model} cannot use:", problems)
    return encoded


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The text of a chat, and of the start of an answer where it lacks one."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=messages[-1]["role"] != "assistant",
    )


def load(folder: Path, delta: Delta | None = None) -> Any:
    """A model in float32, maybe with a delta; a quantised one as what it stands for.

    transformers knows which of its parameters a checkpoint calls by which names.
    """
    import transformers

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    checkpoint = Checkpoint(folder)
    architecture = checkpoint.model_config.architecture
    kind = getattr(transformers, str(architecture), None)
    if kind is None:
        raise DqreloError(
            f"{folder / 'config.json'}: architectures is {architecture}, expected a "
            "class of transformers, which runs the prompts"
        )
    if not checkpoint.quantization and delta is None:
        model, loaded = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        refuse(
            f"transformers does not find these parameters in {folder}, which has them "
            "under other names or not at all. Save the model with save_pretrained:",
            sorted(loaded["missing_keys"]),
        )
        return model.eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    if checkpoint.quantization:
        del config.quantization_config
    stored = [*delta.matrices, *delta.exact] if delta else []
    changed = {name.removesuffix(ADDED) for name in stored}
    if checkpoint.tied and HEAD in changed:
        checkpoint.untie()
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = (
            False
        )
    tensors = {name: checkpoint.get(name).float() for name in checkpoint}
    if delta is not None:
        config.get_text_config().vocab_size += delta.added_tokens
        for name in changed:
            tensors[name] = delta.merged(name, tensors[name])
    model, loaded = kind.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        output_loading_info=True,
    )
    unexpected = changed & set(loaded["unexpected_keys"])
    wrong = sorted(unexpected | set(loaded["missing_keys"]))
    refuse(f"parameters of {folder} that transformers has or lacks:", wrong)
    return model


@torch.no_grad()
def log_probabilities(
    models: list[Any], tokens: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Those of each next token by each model, float32 [WINDOW or less, vocabulary].

    The vocabulary is that of the first model, the fine-tune.
    """
    caches = [None for _ in models]
    for window in tokens[None].split(WINDOW, dim=1):
        outputs = [
            model(input_ids=window, past_key_values=cache, use_cache=True)
            for model, cache in zip(models, caches, strict=True)
        ]
        caches = [output.past_key_values for output in outputs]
        size = outputs[0].logits.shape[-1]
        logits = [output.logits[0, :, :size].float() for output in outputs]
        yield [values.log_softmax(-1) for values in logits]
