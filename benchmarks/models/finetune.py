# SPDX-License-Identifier: Apache-2.0
"""Full fine-tuning of a small chat model on one task, on whatever CPU there is.

Every weight moves: embeddings, norms and matrices. The loss sees the answer only.
"""

import argparse
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from tqdm import trange
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.models.tasks import MAX_ANSWER_TOKENS, TASKS, Example, Task
from vllm_dqrelo.format.folder import new_folder

EXAMPLES_PER_STEP = 16  # about a thousand tokens
LR = 2e-4  # of all weights


def finetune(
    base: Path,
    task: Task,
    output: Path,
    steps: int = 30,
    lr: float = LR,
    lora: int = 0,
) -> Path:
    """Return ``output``, a full fine-tune of ``base``; make it if it is absent.

    Master weights are fp32, the arithmetic is bf16, and nothing is random but the
    seeded start of adapters. It is stored in the dtype of the base.

    Args:
        lora: rank of adapters on all linear layers, which are trained in place of all
            weights and merged; 0 for none.
    """
    if output.exists():
        return output
    tokenizer = AutoTokenizer.from_pretrained(base)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    adapters = with_adapters(whole, lora) if lora else None
    model = adapters.model if adapters else whole
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0, fused=True)
    warmup = steps // 10 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps)
    )
    examples = task.train(steps * EXAMPLES_PER_STEP)
    for step in (progress := trange(steps, desc=f"fine-tune {task.name}")):
        batch = examples[step * EXAMPLES_PER_STEP :][:EXAMPLES_PER_STEP]
        loss = _loss(model, *encode(tokenizer, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}")

    if adapters:
        model = adapters.merge_and_unload()
    with new_folder(output) as folder:
        model.to(AutoConfig.from_pretrained(base).dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return output


def with_adapters(model: PreTrainedModel, rank: int) -> PeftModel:
    """LoRA adapters on all linear layers but the LM head."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def exact_match(folder: Path, task: Task, count: int) -> float:
    """Share of ``count`` held-out prompts that a checkpoint answers exactly.

    It answers in transformers, in one greedy batch; its folder remembers the score.
    """
    prompts, answers = zip(*task.test(count), strict=True)
    cache = folder / "exact_match.json"
    known = json.loads(cache.read_text()) if cache.exists() else {}
    key = f"{zlib.crc32(repr((prompts, answers)).encode()):08x}"
    if key not in known:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        replies = generate(model, tokenizer, prompts)
        known[key] = sum(map(str.__eq__, replies, answers)) / count
        cache.write_text(json.dumps(known))
    return known[key]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
) -> list[str]:
    """Greedy replies to all prompts; the tokenizer pads on the left."""
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
    replies = tokens[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(replies, skip_special_tokens=True)


def encode(
    tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return padded token ids and a mask of the tokens that are to be learnt."""
    ids, answers = [], []
    for prompt, answer in examples:
        question = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=False,
        )
        reply = tokenizer.encode(answer + tokenizer.eos_token)
        ids.append(torch.tensor(question + reply))
        answers.append(torch.arange(len(ids[-1])) >= len(question))
    return pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(answers, True)


def _loss(
    model: torch.nn.Module, ids: torch.Tensor, answers: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of the answer tokens; logits are computed for those alone.

    Padding stands on the right of a causal model, so it needs no attention mask.
    """
    learnt = answers[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids[:, :-1]).last_hidden_state
        logits = model.lm_head(hidden[learnt])
    return F.cross_entropy(logits.float(), ids[:, 1:][learnt])


def main() -> None:
    """Fine-tune one task from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    print(finetune(args.base, TASKS[args.task], args.output))


if __name__ == "__main__":
    main()
