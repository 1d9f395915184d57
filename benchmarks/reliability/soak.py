# SPDX-License-Identifier: Apache-2.0
"""A server used hard for minutes, and every answer compared with its reference.

    python -m benchmarks.reliability.soak --minutes 20

Twelve deltas of SmolLM2-135M on room for four, and in host memory for four more.
Clients ask all of them at once, streamed and not, hang up, run out of patience and are
killed; deltas are loaded and unloaded, and the folder of one is replaced again and
again. Each completed answer must have the tokens and logprobs of transformers with
base + delta in float32, which are taken beforehand; that of the delta whose folder is
replaced, those of one of the contents that it had while the request ran.
"""

import argparse
import asyncio
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from openai import APIError, APIStatusError, AsyncOpenAI
from tqdm import tqdm

from benchmarks.machine import machine
from benchmarks.models import smollm
from benchmarks.models.reference import TOKENS, TOLERANCE, Reference, references
from benchmarks.models.tasks import TASKS
from benchmarks.paths import DQRELO
from benchmarks.serving.server import metric, server
from vllm_dqrelo.format.delta import weight_files
from vllm_dqrelo.format.folder import file_bytes

PROMPTS = (3, 17, 40, 140)  # lengths; the last has a block for the prefix cache
CLIENTS = 12
STUCK_S = 180  # a request that takes longer is stuck
REPLACED = "replaced"  # the delta whose folder changes
# What may be said of it while that happens, and of a delta that is being unloaded.
EXPECTED = ("was replaced", "was changed after", "is not a delta folder")
UNLOADED = ("was unloaded", "does not exist")
# A client that reads one token of each of its answers and is killed.
VICTIM = """
import json, sys, threading, urllib.request
def ask(model):
    body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 100, "stream": True,
            "ignore_eos": True}
    request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        print(answer.readline(), flush=True)
        answer.read()
for model in sys.argv[2:]:
    threading.Thread(target=ask, args=[model]).start()
"""


class Soak:
    """The clients of one server.

    Args:
        address: of the server.
        expected: model -> references of each prompt; of the delta that is replaced
            the lists of both of its contents, one behind the other.
        prompts: tokens.
        store: the server's folder of deltas.
        contents: the two folders that ``REPLACED`` is in turn.
    """

    def __init__(
        self,
        address: str,
        expected: dict[str, list[Reference]],
        prompts: list[list[int]],
        store: Path,
        contents: list[Path],
    ) -> None:
        self.address, self.expected, self.prompts = address, expected, prompts
        self.store, self.contents = store, contents
        self.client = AsyncOpenAI(
            base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=STUCK_S
        )
        self.rng = random.Random(0)
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.worst = 0.0
        self.current = {0}  # contents that REPLACED may have now
        self.open: list[set[int]] = []  # those it had while each request is open
        self.memory: list[float] = []  # bytes
        self.unloaded: dict[str, float] = {}  # when that ended

    async def run(self, seconds: float) -> None:
        """Everything at once, for so long."""
        jobs = [self.ask] * CLIENTS
        jobs += [self.control, self.replace, self.kill, self.watch]
        start = time.monotonic()
        end = start + seconds
        with tqdm(total=round(seconds), desc="soak", unit="s", disable=None) as bar:
            tasks = [asyncio.create_task(self.until(end, job)) for job in jobs]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(1)
                bar.update(round(time.monotonic() - start) - bar.n)
                bar.set_postfix(done=self.counts["completed"], bad=len(self.problems))
        await self.settle()

    async def until(self, end: float, job: Callable[[], Awaitable[None]]) -> None:
        """Do a job again and again."""
        while time.monotonic() < end:
            try:
                await job()
            except Exception as error:  # a problem of the server, to be reported
                self.complain(f"{job.__name__}: {error!r}")
                await asyncio.sleep(1)

    def complain(self, problem: str) -> None:
        """Note what is wrong, and say it at once."""
        self.problems.append(problem)
        tqdm.write(problem, file=sys.stderr)

    async def ask(self) -> None:
        """One request, of one of four kinds."""
        model = self.rng.choice(list(self.expected))
        prompt = self.rng.randrange(len(self.prompts))
        kind = self.rng.choices(
            ("whole", "streamed", "cancelled", "timed out"), (6, 3, 1, 1)
        )[0]
        body = {
            "model": model,
            "prompt": self.prompts[prompt],
            "max_tokens": self.rng.randint(1, TOKENS),
            "temperature": 0,
            "logprobs": 1,
            "extra_body": {"ignore_eos": True, "return_token_ids": True},
        }
        allowed, start = set(self.current), time.monotonic()
        self.open.append(allowed)
        try:
            tokens, logprobs = await self.answer(kind, body)
        except APIError as error:  # in a stream it has no status
            expected = UNLOADED if self.unloaded.get(model, 0) > start else ()
            if model == REPLACED and len(allowed) > 1:
                expected = EXPECTED
            if not any(text in str(error) for text in expected):
                raise
            self.counts["refused while unloaded or replaced"] += 1
            return
        except TimeoutError:
            self.counts[kind] += 1
            return
        finally:
            self.open = [contents for contents in self.open if contents is not allowed]
            if time.monotonic() - start > STUCK_S:
                self.complain(f"a request to {model} was stuck")
        self.counts["whole" if kind == "timed out" else kind] += 1  # it was in time
        if kind == "cancelled":
            return
        self.check(model, prompt, allowed, tokens, logprobs, body)

    async def answer(
        self, kind: str, body: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        """Tokens and logprobs of one request."""
        if kind == "timed out":
            patience = self.rng.uniform(0.01, 0.5)
            return await asyncio.wait_for(self.answer("whole", body), patience)
        if kind == "whole":
            choice = (await self.client.completions.create(**body)).choices[0]
            return choice.token_ids, choice.logprobs.token_logprobs
        stream = await self.client.completions.create(**body, stream=True)
        tokens, logprobs = [], []
        async with stream:
            async for part in stream:
                for choice in part.choices:
                    tokens += choice.token_ids or []
                    logprobs += (
                        choice.logprobs.token_logprobs if choice.logprobs else []
                    )
                if kind == "cancelled" and tokens:
                    break
        return tokens, logprobs

    def check(
        self,
        model: str,
        prompt: int,
        allowed: set[int],
        tokens: list[int],
        logprobs: list[float],
        body: dict[str, Any],
    ) -> None:
        """Compare a completed answer with what it may be."""
        contents = allowed if model == REPLACED else {0}
        size = len(self.prompts)
        difference = min(
            self.expected[model][size * content + prompt].difference(tokens, logprobs)
            for content in contents
        )
        self.counts["completed"] += 1
        self.counts["tokens compared"] += len(tokens)
        if len(tokens) != body["max_tokens"] or difference > TOLERANCE:
            self.complain(
                f"{model} answered prompt {prompt} with {tokens} {logprobs}: "
                f"{difference:g} from contents {contents}"
            )
        else:
            self.worst = max(self.worst, difference)

    async def control(self) -> None:
        """Load and unload over HTTP."""
        await asyncio.sleep(self.rng.uniform(0.5, 3))
        model = self.rng.choice(
            [m for m in self.expected if m not in ("base", REPLACED)]
        )
        action = self.rng.choice(("load", "unload"))
        if action == "unload":
            self.unloaded[model] = float("inf")
        try:
            await self.client.post(
                f"/dqrelo/deltas/{model}/{action}", body={}, cast_to=object
            )
            self.counts[f"{action}s"] += 1
        except APIStatusError as error:
            if action == "load" or error.status_code != 404:  # it was not loaded
                raise
        finally:
            if action == "unload":
                self.unloaded[model] = time.monotonic()

    async def replace(self) -> None:
        """Give a folder another content, and load it again."""
        await asyncio.sleep(self.rng.uniform(2, 8))
        (before,) = self.current
        self.becomes({before, 1 - before})
        for file in [*weight_files(self.contents[1 - before]), "delta_config.json"]:
            name = Path(file).name
            shutil.copy(self.contents[1 - before] / name, self.store / f".{name}")
            (self.store / f".{name}").replace(self.store / REPLACED / name)
        body = {"lora_name": REPLACED, "lora_path": str(self.store / REPLACED)}
        body |= {"load_inplace": True}
        await self.client.post("/load_lora_adapter", body=body, cast_to=str)
        self.becomes({1 - before})
        self.counts["folders replaced"] += 1

    def becomes(self, contents: set[int]) -> None:
        """Note what ``REPLACED`` may be from now on, for open requests as well."""
        self.current = contents
        for allowed in self.open:
            allowed |= contents

    async def kill(self) -> None:
        """End a client without a word, while it reads its answers."""
        await asyncio.sleep(self.rng.uniform(5, 15))
        models = self.rng.sample(list(self.expected), 4)
        command = [sys.executable, "-c", VICTIM, f"{self.address}/v1/completions"]
        victim = await asyncio.create_subprocess_exec(
            *command, *models, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        with suppress(TimeoutError):
            await asyncio.wait_for(victim.stdout.readline(), 60)
        with suppress(ProcessLookupError):  # its answers have ended, and so has it
            victim.kill()
        await victim.wait()
        self.counts["clients killed"] += 1

    async def watch(self) -> None:
        """Note the memory of the server's processes."""
        used = 0.0
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if VICTIM not in process.cmdline():
                    used += process.memory_full_info().uss
        self.memory.append(used)
        await asyncio.sleep(5)

    async def settle(self) -> None:
        """Nothing may be left of all that when everyone has gone."""
        for _ in range(60):
            await asyncio.sleep(1)
            left = metric(self.address, "vllm:num_requests_running")
            left += metric(self.address, "vllm:num_requests_waiting")
            if not left:
                break
        listed = await self.client.get("/dqrelo/deltas", cast_to=dict[str, Any])
        left += sum(one["running"] for one in listed["data"])
        if left:
            self.complain(f"{left:g} requests are left in the server")

    def count(self, name: str, **labels: str) -> float:
        """One of our counters."""
        return metric(self.address, f"dqrelo:{name}_total", **labels)

    def results(self) -> dict[str, object]:
        """What happened, for the table."""
        quarter = max(len(self.memory) // 4, 1)
        early = self.memory[quarter : 2 * quarter] or self.memory
        late = self.memory[-quarter:]
        return {
            **dict(sorted(self.counts.items())),
            "largest difference of a logprob": self.worst,
            "deltas read": self.count("delta_loads", outcome="ok"),
            "evicted from the device": self.count("delta_evictions", tier="device"),
            "dropped from memory": self.count("delta_evictions", tier="host"),
            "memory_second_quarter_mib": mebibytes(early),
            "memory_last_quarter_mib": mebibytes(late),
            "problems": len(self.problems),
        }


def mebibytes(sizes: list[float]) -> int:
    """Their median."""
    return round(statistics.median(sizes) / 2**20)


def store_of(folders: list[Path], parent: Path) -> tuple[Path, dict[str, list[Path]]]:
    """A folder of deltas, and the contents of each name; the last has two."""
    store = parent / "store"
    names = {f"delta-{i}": [folder] for i, folder in enumerate(folders[:-2])}
    names[REPLACED] = folders[-2:]
    for name, contents in names.items():
        shutil.copytree(contents[0], store / name)
    return store, names


def fleet(count: int) -> tuple[Path, list[Path]]:
    """SmolLM2-135M and deltas of it, no two of which answer the same."""
    folders = []
    for i in range(count):
        times, task = divmod(i, len(TASKS))
        strength = 1 - times / 5
        folder, whole = smollm.MORE / f"soak-{i}", smollm.delta(task)
        folders.append(smollm.weaker(whole, strength, folder) if times else whole)
    return smollm.base(), folders


def main() -> int:
    """Run it, print the table; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--base", type=Path, help="instead of SmolLM2-135M")
    parser.add_argument(
        "--deltas", type=Path, nargs="+", help="of --base, four or more"
    )
    parser.add_argument("--resident", type=int, default=4, help="deltas on the device")
    parser.add_argument("--output", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    base, folders = arguments.base, arguments.deltas
    if base is None:
        base, folders = fleet(13)
    torch.manual_seed(0)
    model = json.loads((base / "config.json").read_text())
    prompts = [torch.randint(model["vocab_size"], (n,)).tolist() for n in PROMPTS]
    with tempfile.TemporaryDirectory() as scratch:
        store, names = store_of(folders, Path(scratch))
        contents = [None, *(c for group in names.values() for c in group)]
        cache = (Path(scratch) if arguments.base else smollm.MORE) / "soak.json"
        found = references(base, contents, prompts, cache)
        expected = {"base": found[0]}
        for name, one in zip(names, found[1:], strict=False):
            expected[name] = one
        expected[REPLACED] = found[-2] + found[-1]
        room = max(file_bytes(weight_files(d)) for d in folders)
        tier = arguments.resident * room * 1.02 / 2**30
        options = {"delta_memory_gib": tier, "host_memory_gib": tier}
        command = [*DQRELO, "serve", base, "--delta-dir", store, "--delta-endpoints"]
        command += ["--served-model-name=base", "--dtype=float32", "--enforce-eager"]
        command += ["--max-model-len=192", f"--max-num-seqs={2 * CLIENTS}"]
        # Few blocks, so that all of them have been written to before long.
        command += ["--num-gpu-blocks-override=64"]
        command += [f"--max-loras={arguments.resident}", "--additional-config"]
        command += [json.dumps({"dqrelo": options})]
        log = Path(tempfile.gettempdir()) / "dqrelo-soak.log"
        environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with server(command, log, **environment) as address:
            soak = Soak(address, expected, prompts, store, names[REPLACED])
            asyncio.run(soak.run(60 * arguments.minutes))
            results = {"minutes": arguments.minutes, **soak.results(), **machine()}
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    for key, value in results.items():
        print(f"| {key} | {value} |")
    return 1 if soak.problems else 0


if __name__ == "__main__":
    sys.exit(main())
