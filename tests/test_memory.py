# SPDX-License-Identifier: Apache-2.0
"""Deltas on disk, in host memory and on the device, while an engine serves them."""

import random
import shutil
import statistics
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from dqrelo_tools.convert import convert
from dqrelo_tools.export import export

vllm = pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4  # as in test_serving.py
COUNT = 7
DELAY = 3.0  # seconds, of the slow disk; a step of the tiny model takes milliseconds


@pytest.fixture(scope="module")
def many(family, save_model, tmp_path_factory):
    """Seven deltas of different sizes and, for each prompt, transformers' answers."""
    base = family("llama").base
    root = tmp_path_factory.mktemp("many")
    deltas = []
    for i in range(COUNT):
        model = save_model("llama", root / f"model-{i}", seed=20 + i)
        deltas.append(root / f"delta-{i}")
        ratio = (1 / 16, 1 / 8, 1 / 4)[i % 3]
        convert(str(base), str(model), deltas[i], ratio, method="dqrelo-paper")
        export(str(base), deltas[i], root / f"merged-{i}")
    return base, deltas, [root / f"merged-{i}" for i in range(COUNT)]


def deltas_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler.deltas


def request(name, number, folder, **options):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(folder), **options)


def memory(host, device):
    """Options for an arena and a host tier of so many bytes."""
    options = {"delta_memory_gib": device / 2**30, "host_memory_gib": host / 2**30}
    return {"dqrelo": options}


def test_random_arrivals_over_all_tiers(
    many, engine, load, sampling, answer_of, difference, prompts, manager_of, reference
):
    """Seven deltas; the device has room for about three, the host for one or two."""
    base, deltas, merged = many
    expected = [reference(folder, prompts) for folder in [base, *merged]]
    llm = engine(base, quantization="dqrelo", max_loras=2)
    requests = [None]
    requests += [load(llm, f"delta-{i}", folder) for i, folder in enumerate(deltas)]
    sizes = sorted(deltas_of(llm).sizes.values())
    assert len(sizes) == COUNT and sizes[0] < sizes[-1] / 2
    del llm
    options = memory(host=1.5 * sizes[-1], device=2 * sizes[-1] + 64)
    llm = engine(base, quantization="dqrelo", max_loras=2, additional_config=options)
    requests[1:] = [load(llm, f"delta-{i}", d) for i, d in enumerate(deltas)]
    manager, reads = manager_of(llm), []
    read = manager.loader._read
    manager.loader._read = lambda *given: reads.append(given) or read(*given)
    rng = random.Random(1)
    pending = [(i, rng.randrange(len(prompts)), rng.randrange(8)) for i in range(60)]
    finished, most_resident = {}, 0
    preempt = [20, 40]  # when so many have finished
    while pending or llm.llm_engine.has_unfinished_requests():
        for _ in range(min(len(pending), rng.choice([0, 0, 1, 3]))):
            i, p, m = pending.pop()
            llm.llm_engine.add_request(
                f"{i} {p} {m}",
                {"prompt_token_ids": prompts[p]},
                sampling(),
                lora_request=requests[m],
            )
        if preempt and len(finished) >= preempt[0]:
            preempt.pop(0)
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            scheduler.reset_prefix_cache(reset_running_requests=True)
        for output in llm.llm_engine.step():
            if output.finished:
                finished[output.request_id] = output
        most_resident = max(most_resident, len(manager.residency.resident))
        assert manager.host.size <= max(manager.host.limit, 3 * sizes[-1])
    assert len(finished) == 60
    for key, output in finished.items():
        _, p, m = map(int, key.split())
        got = answer_of(output)
        assert difference(got, expected[m][p]) <= TOLERANCE, key
    assert most_resident > 2  # more than --max-loras
    assert len(reads) > 5  # some were read again
    assert not preempt and not deltas_of(llm).users


class SlowDisk:
    """Opening a delta takes ``DELAY``, once ``slow`` was set."""

    def __init__(self, monkeypatch):
        from vllm_dqrelo.worker import manager

        self.slow, delta = False, manager.Delta

        def opened(*arguments):
            if self.slow:
                time.sleep(DELAY)
            return delta(*arguments)

        monkeypatch.setattr(manager, "Delta", opened)


@pytest.fixture
def slow_disk(monkeypatch):
    return SlowDisk(monkeypatch)


@pytest.mark.timing
@pytest.mark.parametrize("way", ["request", "registration"])
def test_decoding_goes_on_while_a_delta_is_read(
    way,
    family,
    alone,
    engine,
    load,
    sampling,
    slow_disk,
    prompts,
    answer_of,
    difference,
):
    """Latency between tokens within 1.2 of what it was, in the median."""
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo", max_model_len=256)
    first = load(llm, "first", made.deltas[0])
    slow_disk.slow = True
    core, running = llm.llm_engine, set()

    def ask(key, lora_request, tokens=8):
        prompt = {"prompt_token_ids": prompts[0]}
        core.add_request(key, prompt, sampling(tokens), lora_request=lora_request)

    def decode(until):
        """Seconds between tokens of one request, another following at its end."""
        seconds, others = [], {}
        last = time.perf_counter()
        while not until(seconds, others):
            if not any(key.startswith("long") for key in running):
                running.add(f"long {last}")
                ask(f"long {last}", first, 200)
            for output in core.step():
                key = output.request_id
                if key.startswith("long"):
                    now = time.perf_counter()
                    seconds.append(now - last)
                    last = now
                if output.finished:
                    running.discard(key)
                    others[key] = output
        return seconds, others

    def goes_on(number):
        """Whether tokens come as before and after while another delta is read."""
        other = request("other", number, made.deltas[1])
        before, _ = decode(lambda seconds, _: len(seconds) >= 300)
        start = time.perf_counter()
        if way == "request":
            ask("other", other)
            during, others = decode(lambda seconds, others: "other" in others)
            assert difference(answer_of(others["other"]), expected[2][0]) <= TOLERANCE
        else:
            future = deltas_of(llm).add_lora(other)
            during, others = decode(lambda *_: future.done())
            assert future.result() is True
        assert time.perf_counter() - start > DELAY
        after, _ = decode(lambda seconds, _: len(seconds) >= 300)
        core.remove_lora(number)
        usual = max(statistics.median(before), statistics.median(after))
        without_gap = max(during) < DELAY / 2 < usual * len(during)
        return without_gap and statistics.median(during) < 1.2 * usual

    # More than once: others who use the machine make it slow for seconds at a time.
    assert any(map(goes_on, range(2, 7)))


THREADS = """
import os, time, torch
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.worker.loader import Loader

def read(request, others):
    torch.zeros(2**22).add_(1)
    raise DqreloError(f"{len(os.listdir('/proc/self/task')) - before} more")

torch.set_num_threads(3)
torch.zeros(2**22).add_(1)
before = len(os.listdir("/proc/self/task"))
loader = Loader(read)
loader.start(None, {})
while not loader.done:
    time.sleep(0.01)
print(loader.take()[0].error, torch.get_num_threads())
"""


def test_reading_a_delta_starts_no_thread_beside_its_own():
    # OpenMP would start two, and slow every step down that comes after (loader.py).
    command = [sys.executable, "-c", THREADS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "1 more 3\n", done.stderr


def test_requests_that_wait_for_a_delta_can_be_aborted(
    family, alone, engine, load, sampling, slow_disk, prompts, answers, difference
):
    made, expected = family("llama"), alone("llama")
    llm = engine(made.base, quantization="dqrelo")
    slow_disk.slow = True
    other = request("other", 2, made.deltas[1])
    prompt = {"prompt_token_ids": prompts[0]}
    llm.llm_engine.add_request("a", prompt, sampling(), lora_request=other)
    for _ in range(5):
        assert not llm.llm_engine.step()
    core = llm.llm_engine.engine_core.engine_core
    assert core.scheduler.has_requests() and deltas_of(llm).users
    llm.llm_engine.abort_request(["a"])
    assert not deltas_of(llm).users
    slow_disk.slow = False
    got = answers(llm, prompts[:1], [other])  # what was begun is finished first
    assert difference(got[0], expected[2][0]) <= TOLERANCE


def test_a_delta_that_cannot_be_read_again_fails_alone(
    family, alone, engine, load, sampling, tmp_path, prompts, answers, difference
):
    """Gone, replaced or damaged after it was registered and dropped from memory."""
    made, expected = family("llama"), alone("llama")
    options = {"dqrelo": {"delta_memory_gib": 0.001, "host_memory_gib": 0}}
    llm = engine(made.base, quantization="dqrelo", additional_config=options)
    good = load(llm, "good", made.deltas[0])
    folders = {}
    for name in ("gone", "replaced", "damaged"):
        folders[name] = tmp_path / name
        shutil.copytree(made.deltas[1], folders[name])
    bad = {n: request(n, 2 + i, f) for i, (n, f) in enumerate(folders.items())}
    bad |= {"never": request("never", 9, made.base.parent / "model-0")}
    messages = {
        "gone": "is not a delta folder",
        "replaced": "was replaced: it holds sha256:",
        "damaged": "was changed after it was written",
    }
    for name, message in messages.items():
        llm.llm_engine.add_lora(bad[name])
        digest = deltas_of(llm).registered[bad[name].lora_int_id].bound.lora_name
        assert digest not in deltas_of(llm).ready
        shutil.rmtree(folders[name])
        if name == "replaced":
            shutil.copytree(made.deltas[2], folders[name])
        if name == "damaged":
            shutil.copytree(made.deltas[1], folders[name])
            path = folders[name] / "delta_model.safetensors"
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        for attempt in range(2):
            outputs = llm.generate(
                [{"prompt_token_ids": prompts[0]}] * 3,
                sampling(),
                lora_request=[good, bad[name], None],
                use_tqdm=False,
            )
            reasons = [output.outputs[0].finish_reason for output in outputs]
            assert reasons == ["length", "error", "length"], (name, attempt)
            assert message in outputs[1].outputs[0].stop_reason
        # Registered again it is served again, with what is there.
        shutil.rmtree(folders[name], ignore_errors=True)
        shutil.copytree(made.deltas[2], folders[name])
        again = request(name, bad[name].lora_int_id, folders[name], load_inplace=True)
        llm.llm_engine.add_lora(again)
        got = answers(llm, prompts[:1], [again])
        assert difference(got[0], expected[3][0]) <= TOLERANCE
        llm.llm_engine.remove_lora(again.lora_int_id)
    with pytest.raises(FileNotFoundError, match="is not a delta folder"):
        answers(llm, prompts[:1], [bad["never"]])


def test_a_pinned_delta_is_not_read_again(
    family, alone, engine, load, tmp_path, prompts, answers, difference
):
    made, expected = family("llama"), alone("llama")
    options = {"dqrelo": {"delta_memory_gib": 0.001, "host_memory_gib": 0}}
    llm = engine(made.base, quantization="dqrelo", additional_config=options)
    shutil.copytree(made.deltas[0], tmp_path / "pinned")
    pinned = load(llm, "pinned", tmp_path / "pinned")
    other = load(llm, "other", made.deltas[1])
    assert llm.llm_engine.pin_lora(pinned.lora_int_id)
    with pytest.raises(ValueError, match="cannot pin 999: not the id of a delta"):
        llm.llm_engine.pin_lora(999)
    answers(llm, prompts[:1], [pinned])
    shutil.rmtree(tmp_path / "pinned")
    for one, m in ((other, 2), (pinned, 1), (other, 2), (pinned, 1)):
        got = answers(llm, prompts[:1], [one])
        assert difference(got[0], expected[m][0]) <= TOLERANCE
    assert llm.llm_engine.list_loras() == {pinned.lora_int_id, other.lora_int_id}


def test_what_one_step_needs_must_fit_the_arena(
    family, engine, load, manager_of, monkeypatch
):
    """Whatever the number of slots: the --max-loras largest, together."""
    from vllm_dqrelo.engine import scheduler

    made, logged = family("llama"), []
    monkeypatch.setattr(scheduler.logger, "info", lambda *args: logged.append(args))
    llm = engine(made.base, quantization="dqrelo", max_loras=2)
    manager = manager_of(llm)
    line = logged[0][0] % logged[0][1:]
    assert "KV cache 1.00 GiB, arena 0.00 GiB: " in line
    assert f"at most {manager.memory.slots} of any size, 2 in one step" in line
    assert manager.memory.slots > 2
    weights = load_file(made.base / "model.safetensors").values()
    assert manager.memory.base == sum(weight.nbytes for weight in weights)
    sizes = []
    for i, folder in enumerate(made.deltas):
        digest = llm_digest(load(llm, f"delta-{i}", folder))
        sizes.append(manager.host.get(digest).size)
    del llm, manager
    options = memory(host=2**30, device=sum(sorted(sizes)[-2:]) - 1)
    llm = engine(
        made.base, quantization="dqrelo", max_loras=2, additional_config=options
    )
    order = sorted(range(3), key=sizes.__getitem__)
    for i in order[:2]:
        load(llm, f"delta-{i}", made.deltas[i])
    with pytest.raises(Exception, match=r"2 largest deltas take .*delta_memory_gib"):
        load(llm, "largest", made.deltas[order[2]])
    assert len(deltas_of(llm).ready) == len(manager_of(llm).host.packed) == 2


def llm_digest(request):
    return request.lora_path.partition("#")[2]
