# SPDX-License-Identifier: Apache-2.0
"""What every part has: its options, its sizes, and a way to be skipped."""

import argparse
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

SKIPPED = 77  # the exit code of a test that was skipped, for GNU Automake
HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPE = torch.bfloat16 if HAS_GPU else torch.float32


@dataclass(frozen=True)
class Sizes:
    """How much is checked and measured.

    Attributes:
        config: of the base, a Llama.
        deltas: in one batch with the base.
        ratios: of deltas whose steps are timed; the first is that of the batch.
        prompts: tokens of a short and of a long prompt of that batch.
        answer: tokens.
        steps: numbers of deltas in a step that is timed.
        decode: steps that are timed, for a median.
        step_tokens: of a step of prompts, over all deltas.
    """

    config: dict[str, Any] = field(
        default_factory=lambda: {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 8,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 4096,
        }
    )
    deltas: int = 16
    ratios: tuple[float, ...] = (1 / 8, 1 / 16)
    prompts: tuple[int, int] = (24, 1000)
    answer: int = 8
    steps: tuple[int, ...] = (1, 4, 16, 32)
    decode: int = 50
    step_tokens: int = 2048


FULL = Sizes()
TINY = Sizes(
    config={
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
    },
    deltas=3,
    ratios=(1 / 8,),
    prompts=(8, 40),
    answer=4,
    steps=(1, 2),
    decode=5,
    step_tokens=32,
)


class Options(argparse.Namespace):
    """The command line of a part.

    Attributes:
        output: folder of the results.
        models: folder of the base and the deltas, see models.py.
        sizes: FULL or TINY.
    """

    output: Path
    models: Path
    sizes: Sizes


def options(*positional: str) -> Options:
    """Parse the command line.

    Args:
        positional: further arguments, by name.
    """
    parser = argparse.ArgumentParser()
    for name in positional:
        parser.add_argument(name)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    found = parser.parse_args(namespace=Options())
    found.sizes = TINY if found.tiny else FULL
    return found


def skip(reason: str) -> NoReturn:
    """End this part as skipped."""
    print(reason, file=sys.stderr, flush=True)
    sys.exit(SKIPPED)


def in_this_process() -> None:
    """Have vLLM's engine in this process: call this before the import of vLLM."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
