# SPDX-License-Identifier: Apache-2.0
"""Malformed files beside a delta's tensors, given to a running server.

    python -m benchmarks.reliability.fuzz_server --cases 1200 [--output results.csv]

Each case takes a sound delta of a tiny model with a tokenizer, a chat template and a
generation config of its own, spoils these in one of the ways of side_mutations.py, and
asks the server for it. A request must be answered, or refused with a 4xx, in time; and
after each case the base answers as before, the models are listed and the server says
that it is well. Each case depends on ``--seed`` and its number alone: ``--only 123``
shows one again.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.documents.reliability_tables import fuzz_server_table
from benchmarks.paths import DQRELO
from benchmarks.reliability.cases import FAULT, Cases, parse
from benchmarks.reliability.fuzz import VOCABULARY, tiny
from benchmarks.reliability.side_mutations import SIDE_MUTATIONS, SideCase
from benchmarks.serving.server import server

TIME_LIMIT_S = 120  # of a request, on a busy machine
OUTCOMES = ("refused", "answered", "faults")
TEMPLATE = "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}w3"
SHORT = [{"role": "user", "content": "w7 w8 Hello"}]
LONG = [{"role": "system", "content": "w5"}, *SHORT]
LONG += [{"role": "assistant", "content": f"w9 {'a' * 32}!"}]
LONG += [{"role": "user", "content": f"Sing {'x' * 32}"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def tokenizers(folder: Path, kind: str) -> None:
    """Save a tokenizer of the tiny model: of words, or with a mark for spaces.

    That has tokens for a part of the model's, as one of a padded model has.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = kind == "words"
    vocabulary = {f"{'' if words else '▁'}w{i}": i for i in range(VOCABULARY)}
    if not words:
        vocabulary = dict(list(vocabulary.items())[: VOCABULARY // 2])
    first = next(iter(vocabulary))
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=first))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if not words:
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=first)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def sound_deltas(root: Path) -> tuple[Path, list[Path]]:
    """A base, and deltas with files of their own."""
    base, (delta, *_) = tiny(root)
    tokenizers(base, "words")
    deltas = []
    for kind in ("words", "spaces"):
        deltas.append(root / kind)
        shutil.copytree(delta, deltas[-1])
        tokenizers(deltas[-1], kind)
        settings = {"eos_token_id": [2, 3], "top_k": 20, "max_new_tokens": 8}
        (deltas[-1] / "generation_config.json").write_text(json.dumps(settings))
    tokenizers(deltas[0], "words")
    text = TEMPLATE.replace("w2", "w4")
    (deltas[0] / "chat_template.jinja").write_text(text)
    return base, deltas


class Client:
    """Asks one server.

    Args:
        address: of the server.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self.base = self.ask("/v1/chat/completions", model="base", messages=SHORT)

    def ask(self, path: str, **body: Any) -> tuple[int, str]:
        """Status and text of an answer; 0 and the reason where there is none."""
        greedy = (
            {"temperature": 0, "max_tokens": 3} if body.get("model") == "base" else {}
        )
        data = json.dumps(body | greedy).encode() if body else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=TIME_LIMIT_S) as answer:
                text = answer.read().decode()
            if path == "/v1/chat/completions" and "stream" not in body:
                text = json.loads(text)["choices"][0]["message"]["content"]
            return 200, text
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, f"{type(error).__name__} {error}"

    def case(self, name: str, rng: random.Random) -> str:
        """What became of a model: an outcome, a fault with its reason."""
        options: list[dict[str, Any]] = [{}, {"min_tokens": 2}, {"stream": True}]
        options += [{"logprobs": True, "top_logprobs": 20}, {"tools": [TOOL]}]
        options += [{"seed": 5, "temperature": 1.5}, {"n": 2, "min_tokens": 1}]
        asked = [
            ("/v1/chat/completions", {"messages": SHORT, **rng.choice(options)}),
            ("/v1/chat/completions", {"messages": LONG, **rng.choice(options)}),
            ("/v1/completions", {"prompt": "w7 aaa", "logprobs": 5, "echo": True}),
            ("/tokenize", {"messages": LONG}),
            ("/detokenize", {"tokens": [*range(VOCABULARY)]}),
        ]
        found = [self.ask(path, model=name, **body) for path, body in asked]
        for (path, body), (status, text) in zip(asked, found, strict=True):
            if not (status == 200 or 400 <= status < 500):
                return f"{FAULT} {path} {str(body)[:200]}: {status} {text[:300]}"
            if len(text) > 100_000 and status != 200:
                return f"{FAULT} {path}: an error that nobody reads"
        if (again := self.others()) is not None:
            return again
        return "answered" if found[0][0] == 200 else "refused"

    def others(self) -> str | None:
        """What is wrong with the rest of the server."""
        base = self.ask("/v1/chat/completions", model="base", messages=SHORT)
        if base != self.base:
            return f"{FAULT}: the base answers {base}, before it was {self.base}"
        for path in ("/v1/models", "/health"):
            if (got := self.ask(path))[0] != 200:
                return f"{FAULT} {path}: {got}"
        return None


def memory() -> float:
    """MiB of the processes that this process started."""
    used = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            used += process.memory_full_info().uss
    return used / 2**20


def run(arguments: argparse.Namespace, scratch: Path) -> Cases:
    """What became of each case.

    Args:
        arguments: of the command line.
        scratch: an empty folder.
    """
    base, deltas = sound_deltas(scratch)
    store = scratch / "store"
    store.mkdir()
    command = [*DQRELO, "serve", base, "--served-model-name=base", "--dtype=float32"]
    command += ["--delta-dir", store, "--enforce-eager", "--max-model-len=128"]
    command += ["--max-num-seqs=8", "--max-loras=2", "--delta-endpoints"]
    command += ["--additional-config", '{"dqrelo": {"delta_memory_gib": 0.001}}']
    cases = Cases(arguments.numbers, arguments.seed)
    with server(command, scratch / "log") as address:
        client = Client(address)
        for number, mutate, rng in cases.each(SIDE_MUTATIONS):
            name = f"case-{number}"
            shutil.copytree(rng.choice(deltas), scratch / name)
            mutate(SideCase(scratch / name, rng))
            (scratch / name).rename(store / name)
            found = client.case(name, rng)
            client.ask(f"/v1/dqrelo/deltas/{name}/unload", unload=name)
            shutil.rmtree(store / name)
            cases.add(number, mutate, found, memory)
            if cases.faults and client.others():
                print((scratch / "log").read_text()[-8000:], file=sys.stderr)
                break  # it is dead
    return cases


def main() -> int:
    """Run the cases and print a table; 1 if one was neither refused nor answered."""
    arguments = parse(__doc__, cases=1200)
    with tempfile.TemporaryDirectory() as scratch:
        cases = run(arguments, Path(scratch))
    cases.report(OUTCOMES, fuzz_server_table, arguments.output)
    return 1 if cases.faults else 0


if __name__ == "__main__":
    sys.exit(main())
