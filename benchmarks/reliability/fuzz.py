# SPDX-License-Identifier: Apache-2.0
"""Malformed delta folders, read as a server reads them.

    python -m benchmarks.reliability.fuzz --cases 12000 [--output results.csv]

Each case takes a sound delta of a tiny model and spoils it in one of the ways of
mutations.py. The worker's own reader, ``DeltaManager.read`` and with it
``packed.pack``, must refuse it with an error of this project's, or load exactly what
the sound delta is: then the mutation had no meaning. One whose digest was made to fit
may be another sound delta: then all of its bytes must have been loaded, and it is put
on the device. Each case depends on ``--seed`` and its number alone: ``--only 123``
shows one again.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from vllm import LLM
from vllm.lora.request import LoRARequest

from benchmarks.documents.reliability_tables import fuzz_table
from benchmarks.reliability.cases import FAULT, Cases, parse
from benchmarks.reliability.mutations import MUTATIONS, Case, index_text, load_all
from dqrelo_kernels.layout import side_by_side
from dqrelo_tools.convert import convert
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import weight_files, write_delta
from vllm_dqrelo.format.errors import DqreloError

ADDED = 2  # tokens of one of the fine-tunes
VOCABULARY = 320
OUTCOMES = ("refused", "same", "another", "faults")


def tiny(root: Path) -> tuple[Path, list[Path]]:
    """A base and five deltas of it: both methods, two planes, added tokens, shards."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=200,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )

    def model(name: str, seed: int, tokens: int = VOCABULARY) -> Path:
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
        made.resize_token_embeddings(tokens, mean_resizing=False)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        made.save_pretrained(root / name)
        return root / name

    base, fine_tune = model("base", 1), model("fine-tune", 2)
    added = model("added", 3, VOCABULARY + ADDED)
    kinds = [(fine_tune, 0.125, "dqrelo"), (fine_tune, 0.25, "dqrelo-paper")]
    kinds += [(fine_tune, 0.3, "dqrelo"), (added, 0.125, "dqrelo")]
    deltas = []
    for i, (folder, ratio, method) in enumerate(kinds):
        deltas.append(root / f"delta-{i}")
        convert(str(base), str(folder), deltas[-1], ratio, method=method)
    sharded = root / "sharded"
    sharded.mkdir()
    size = weight_files(deltas[0])[0].stat().st_size
    write_delta(sharded, DeltaConfig.read(deltas[0]), load_all(deltas[0]), size // 3)
    return base, [*deltas, sharded]


class Reader:
    """The worker's delta manager, in this process, and what it made of sound deltas."""

    def __init__(self, base: Path) -> None:
        llm = LLM(
            str(base),
            quantization="dqrelo",
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            max_model_len=64,
            additional_config={
                "dqrelo": {"delta_memory_gib": 0.001, "added_tokens": 4}
            },
        )
        self.llm = llm  # or else it ends
        core = llm.llm_engine.engine_core.engine_core
        worker = core.model_executor.driver_worker.worker
        self.manager = worker.model_runner.lora_manager

    def read(self, folder: Path) -> Any:
        """What the worker makes of a folder."""
        return self.manager.read(LoRARequest("x", 1, str(folder)), {})

    def use(self, packed: Any) -> None:
        """Put a delta on the device and forget it again."""
        self.manager.host.put(packed)
        self.manager.residency.use([packed.digest])
        self.manager.forget(packed.digest)


def same(one: Any, other: Any) -> bool:
    """Whether two packed deltas are the same bytes."""
    return (
        torch.equal(one.extent, other.extent)
        and torch.equal(one.entries, other.entries)
        and one.added.keys() == other.added.keys()
        and all(torch.equal(one.added[k], other.added[k]) for k in one.added)
    )


def is_whole(packed: Any, folder: Path) -> bool:
    """Whether all bytes of a folder's tensors were loaded, found without the table."""
    extent = packed.extent.numpy().tobytes()
    rows, tensors = list(packed.added.values()), load_all(folder)
    for name, tensor in tensors.items():
        if name.endswith("_shape"):
            continue
        if name.endswith("_added"):
            found = any(torch.equal(tensor, other) for other in rows)
        else:
            if name.endswith("_scale") and tensor.ndim == 2:
                n = int(tensors[name.removesuffix("_scale") + "_shape"][0])
                tensor = tensor.expand(-1, n)  # of a plane, for each row
            elif tensor.ndim == 1:
                tensor = tensor.float()  # as vectors are
            else:
                matrices = tensor if tensor.ndim == 3 else [tensor]
                tensor = torch.cat([side_by_side(matrix) for matrix in matrices])
            found = tensor.contiguous().view(torch.uint8).numpy().tobytes() in extent
        if not found:
            return False
    return True


def outcome(mutate: Any, folder: Path, sound: Any, reader: Reader) -> str:
    """What became of a spoiled folder: one of ``OUTCOMES``, a fault with its reason."""
    try:
        packed = reader.read(folder)
    except (DqreloError, FileNotFoundError) as error:
        if len(str(error).encode()) > 100_000:
            return f"{FAULT}: an error that nobody reads"
        return "refused"
    except Exception as error:
        return f"{FAULT} {type(error).__name__}: {str(error)[:200]}"
    if same(packed, sound):
        return "same"
    stored = load_all(folder).values()
    finite = all(tensor.double().isfinite().all() for tensor in stored)
    sound_digest = mutate.__doc__.startswith("sound digest")
    if sound_digest and finite and is_whole(packed, folder):
        reader.use(packed)
        return "another"
    return f"{FAULT}: loaded, and is not what the sound delta is"


def run(arguments: argparse.Namespace, scratch: Path) -> Cases:
    """What became of each case; one that is asked for alone raises its error.

    Args:
        arguments: of the command line.
        scratch: an empty folder.
    """
    base, deltas = tiny(scratch)
    reader = Reader(base)
    sound = [reader.read(delta) for delta in deltas]
    cases, folder = Cases(arguments.numbers, arguments.seed), scratch / "spoiled"
    for number, mutate, rng in cases.each(MUTATIONS):
        which = -1 if mutate is index_text else rng.randrange(len(deltas))
        shutil.copytree(deltas[which], folder)
        mutate(Case(folder, rng))
        if arguments.only is not None:
            reader.read(folder)
        cases.add(number, mutate, outcome(mutate, folder, sound[which], reader), memory)
        shutil.rmtree(folder)
    return cases


def memory() -> float:
    """MiB of this process, without what nothing refers to."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def main() -> int:
    """Run the cases and print a table; 1 if any was not refused as it should be."""
    arguments = parse(__doc__, cases=12_000)
    with tempfile.TemporaryDirectory() as scratch:
        cases = run(arguments, Path(scratch))
    cases.report(OUTCOMES, fuzz_table, arguments.output)
    growth = cases.memory[-1] - cases.memory[len(cases.memory) // 2]
    return 1 if cases.faults or growth > 4 else 0


if __name__ == "__main__":
    sys.exit(main())
