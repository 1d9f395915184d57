# SPDX-License-Identifier: Apache-2.0
"""One batch of the base and many deltas, against transformers with merged weights.

The engine answers in the dtype of the base; transformers scores the same tokens with
float32 weights, base + delta unrounded. What the base's own answers differ by is what
the dtype costs: a delta may differ by a few times as much. The models must differ from
one another by ten times the error, or the comparison would show nothing.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.func import functional_call
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from benchmarks.gpu.engine import engine, tokens
from benchmarks.gpu.models import WHOLE, base, deltas, merged
from benchmarks.gpu.part import DEVICE, DTYPE, Sizes, options
from benchmarks.table import Table
from vllm_dqrelo import load_delta
from vllm_dqrelo.format.delta import Delta

FACTOR = 3  # of the base's own error; besides, some of the dtype's roundings
COLUMNS = ("model", "prompt", "logprobs", "error", "largest_error", "from_base")
COLUMNS += ("allowed",)


class Answer(NamedTuple):
    """Prompt and answer, and the logprob of each token but the first.

    Attributes:
        prompt: how many tokens are the prompt's.
        ids: of all tokens.
        logprobs: float64 [len(ids) - 1].
    """

    prompt: int
    ids: list[int]
    logprobs: torch.Tensor


def answers(folder: Path, made: list[Path], sizes: Sizes) -> list[Answer]:
    """What the engine says in one batch: of the base, then of each delta.

    The base and the first delta also get a long prompt, in the end.
    """
    llm = engine(folder, sizes, quantization="dqrelo", max_loras=len(made))
    requests = [None, *(load_delta(llm, path.name, str(path)) for path in made)]
    short, long = sizes.prompts
    prompts = [tokens(short + i % 3, i, sizes) for i in range(len(requests))]
    prompts += [tokens(long, 100, sizes)] * 2
    sampling = SamplingParams(
        temperature=0,
        max_tokens=sizes.answer,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=0,
        detokenize=False,
    )
    asked = requests + requests[:2]
    found = []
    for output in llm.generate(prompts, sampling, lora_request=asked, use_tqdm=False):
        prompt = list(output.prompt_token_ids)
        answer = output.outputs[0]
        ids = [*prompt, *answer.token_ids]
        steps = [*output.prompt_logprobs[1:], *answer.logprobs]
        values = [at[i].logprob for at, i in zip(steps, ids[1:], strict=True)]
        found.append(Answer(len(prompt), ids, torch.tensor(values).double()))
    return found


class Oracle:
    """transformers with float32 weights.

    Args:
        folder: of the base.
    """

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.to(DEVICE).eval()
        self.weights = dict(self.model.named_parameters())

    @torch.inference_mode()
    def logprobs(self, ids: list[int], delta: Path | None) -> torch.Tensor:
        """The logprob of each token but the first, by base + delta: float64."""
        changed = {} if delta is None else dict(merged(Delta(delta), self.weights))
        given = torch.tensor([ids], device=DEVICE)
        logits = functional_call(self.model, changed, (given[:, :-1],)).logits[0]
        values = logits.double().log_softmax(-1).gather(1, given[0, 1:, None])
        return values[:, 0].cpu()


def rms(values: torch.Tensor) -> float:
    """The root of the mean square."""
    return float(values.square().mean().sqrt())


def main() -> None:
    """Ask, score, write a row for each model, and judge."""
    found = options()
    folder = base(found.models, found.sizes)
    made = deltas(found.models, found.sizes.deltas, found.sizes.ratios[0], WHOLE)
    torch.backends.cuda.matmul.allow_tf32 = False
    said = answers(folder, made, found.sizes)
    oracle, models = Oracle(folder), [None, *made]
    table = Table(found.output / "mixed.csv", ("model", "prompt"), COLUMNS)
    allowed, wrong = 0.0, []
    for delta, answer in zip(models + models[:2], said, strict=True):
        right = oracle.logprobs(answer.ids, delta)
        error = answer.logprobs - right
        row = {"model": delta.name if delta else "base", "prompt": answer.prompt}
        row |= {"logprobs": len(right), "error": f"{rms(error):.3g}"}
        row |= {"largest_error": f"{error.abs().max():.3g}"}
        if delta is None:
            allowed = max(allowed, FACTOR * rms(error) + 4 * torch.finfo(DTYPE).eps)
            right_size = True
        else:
            change = rms(right - oracle.logprobs(answer.ids, None))
            row |= {"from_base": f"{change:.3g}", "allowed": f"{allowed:.3g}"}
            right_size = rms(error) <= allowed and 10 * rms(error) <= change
        table.add(row)
        if not right_size:
            wrong.append(f"{row}")
    if wrong:
        raise SystemExit("not what merged weights say: " + ", ".join(wrong))


if __name__ == "__main__":
    main()
