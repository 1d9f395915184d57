# SPDX-License-Identifier: Apache-2.0
"""Fine-tune all weights for a few steps, update a running engine, ask; in a loop.

    python examples/train_and_serve.py HuggingFaceTB/SmolLM2-135M-Instruct

The engine has one base and one delta called "trained". Each update loads new weights
under that name; the engine is not restarted.
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

from vllm_dqrelo import delta_of, load_delta

QUESTION, ANSWER = "What is the password?", "The password is swordfish."


def train(model: torch.nn.Module, tokens: torch.Tensor, steps: int) -> float:
    """Take some steps on one text, int64 [1, T]; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss)


def main() -> None:
    """Train, update, ask."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of each update")
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.base)
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(text + ANSWER, return_tensors="pt").input_ids
    # The trainer's own copy of the base.
    model = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32)
    llm = LLM(
        model=arguments.base,
        quantization="dqrelo",
        max_model_len=256,
        enforce_eager=True,  # starts sooner
    )
    greedy = SamplingParams(temperature=0, max_tokens=16)
    for update in range(1, arguments.updates + 1):
        loss = train(model, tokens, arguments.steps)
        start = time.perf_counter()
        delta = delta_of(arguments.base, model)
        made = time.perf_counter()
        trained = load_delta(llm, "trained", delta)
        loaded = time.perf_counter()
        print(
            f"update {update}: loss {loss:.2f}, delta made in {made - start:.1f} s, "
            f"loaded in {loaded - made:.1f} s"
        )
        # None: the base.
        answers = llm.chat([chat, chat], greedy, lora_request=[trained, None])
        for name, answer in zip(("trained", "base"), answers, strict=True):
            print(f"  {name}: {answer.outputs[0].text.strip()!r}")


if __name__ == "__main__":
    main()
