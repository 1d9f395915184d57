# SPDX-License-Identifier: Apache-2.0
"""A budget for a whole conversion, and the advice."""

import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.command import run
from support.killed import killed
from support.shapes import GROUPED, UNTIED
from transformers import LlamaConfig

from dqrelo_kernels.table import ALIGNMENT
from dqrelo_tools import convert
from dqrelo_tools.advise import Advice, figure, survey
from dqrelo_tools.cost import TYPICAL_KL
from dqrelo_tools.method import Method
from dqrelo_tools.spectrum import EPS, RHO
from vllm_dqrelo.format.delta import Delta
from vllm_dqrelo.format.errors import DqreloError

MB = 10**6


def noisy(n: int, k: int, seed: int) -> torch.Tensor:
    """Noise and something of low rank."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n, k, generator=generator)
    left = torch.randn(n, 4, generator=generator)
    return 1e-3 * (matrix + left @ torch.randn(4, k, generator=generator))


def pair(root, shapes, seed=0, vectors=1):
    """A base of zeros and a fine-tune with matrices of ``shapes``, and vectors."""
    after = {f"layers.{i}.w.weight": noisy(*s, i) for i, s in enumerate(shapes)}
    after |= {f"norm.{i}": torch.full((24,), seed + 1.0) for i in range(vectors)}
    for side in ("base", "model"):
        folder = root / side
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        held = {n: t * (side == "model") for n, t in after.items()}
        save_file(held, folder / "model.safetensors")
    return root / "base", root / "model"


def file_bytes(delta) -> int:
    return sum(path.stat().st_size for path in delta.glob("*.safetensors"))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4
    ),
    vectors=st.integers(0, 3),
    more=st.floats(0, 1.5),
    shard=st.sampled_from([300, 5000, MB]),
)
def test_the_budget_is_never_exceeded(tmp_path_factory, shapes, vectors, more, shard):
    root = tmp_path_factory.mktemp("budget")
    base, model = pair(root, shapes, vectors=vectors)
    conversion = partial(
        convert.convert, str(base), str(model), root / "delta", max_shard_size=shard
    )
    with pytest.raises(DqreloError, match="takes at least") as caught:
        conversion(budget=1)
    assert not (root / "delta").exists() and not (root / ".delta.parts").exists()
    said = re.search(r"at least ([\d,]+),", str(caught.value))[1]
    least = int(said.replace(",", ""))
    with pytest.raises(DqreloError, match="takes at least"):
        conversion(budget=least - 1)
    budget = int(least * (1 + more))
    report = conversion(budget=budget)
    assert file_bytes(root / "delta") == report.delta_bytes <= budget
    weights = sum(n * k for n, k in shapes) + 24 * vectors
    assert Delta(root / "delta").config.ratio == budget / (2 * weights)
    ranks = [entry.rank for entry in report.entries if entry.kind == "matrix"]
    assert len(ranks) == len(shapes) and min(ranks) >= 1
    shutil.rmtree(root)


def test_most_of_the_budget_is_used(tmp_path):
    base, model = pair(tmp_path, [(96, 128)] * 12)
    budget = 60_000
    delta = tmp_path / "delta"
    convert.convert(str(base), str(model), delta, budget=budget)
    assert 0.95 * budget < file_bytes(delta) <= budget


def test_what_did_not_change_takes_nothing(tmp_path):
    base, model = pair(tmp_path, [(40, 30), (30, 40)])
    tensors = load_file(model / "model.safetensors")
    tensors["layers.0.w.weight"] *= 0
    tensors["norm.0"] *= 0
    save_file(tensors, model / "model.safetensors")
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]
    assert run(*command, "--budget", "1.5KB") == 0
    delta = Delta(tmp_path / "d")
    assert delta.matrices == ["layers.1.w.weight"] and not delta.exact
    assert file_bytes(tmp_path / "d") <= 1500


def test_an_untied_head_counts_even_if_it_did_not_change(models, tmp_path, capsys):
    base, model = models
    shutil.copytree(base, tmp_path / "untied")
    path = tmp_path / "untied" / "config.json"
    config = json.loads(path.read_text()) | {"tie_word_embeddings": False}
    path.write_text(json.dumps(config))
    path = tmp_path / "untied" / "model.safetensors"
    tensors = load_file(model / "model.safetensors")
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    pair = ("--base", base, "--model", tmp_path / "untied", "--budget", "60KB")
    assert run("advise", *pair, "--json", "--plot", tmp_path / "p.png") == 0
    advice = json.loads(capsys.readouterr().out)
    assert advice["matrices"]["lm_head.weight"]["largest_singular_value"] == 0
    assert run("convert", *pair, "--output", tmp_path / "d") == 0
    assert file_bytes(tmp_path / "d") <= advice["recommended"]["report"]["delta_bytes"]
    assert Delta(tmp_path / "d").matrix("lm_head.weight").rank == 1


def test_killed_in_the_middle_it_keeps_to_its_plan(tmp_path, monkeypatch):
    base, model = pair(tmp_path, [(96, 300)] * 20)
    options = ["--base", str(base), "--model", str(model), "--budget", "60KB"]
    whole, output = tmp_path / "whole", tmp_path / "delta"
    assert run("convert", *options, "--output", whole) == 0
    parts = tmp_path / ".delta.parts"
    killed(5, [*options, "--output", str(output)])
    plan = json.loads((parts / "plan.json").read_text())
    assert len(plan) == 20 and not output.exists()

    def again(*args):
        raise AssertionError("planned twice")

    with monkeypatch.context() as patched:
        patched.setattr(convert, "allocate", again)
        assert run("convert", *options, "--output", output) == 0
    for name in ("delta_model.safetensors", "delta_config.json", "report.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()
    assert not parts.exists()


def test_another_budget_is_another_conversion(tmp_path, monkeypatch):
    base, model = pair(tmp_path, [(32, 48)] * 4)
    command = ["convert", "--base", base, "--model", model, "--output", tmp_path / "d"]

    def stop(*args):
        raise KeyboardInterrupt

    marks = set()
    for budget, shard in (("6KB", "1MB"), ("7KB", "1MB"), ("7KB", "2KB")):
        with monkeypatch.context() as patched:
            patched.setattr(convert, "compress", stop)
            sizes = ("--budget", budget, "--max-shard-size", shard)
            assert run(*command, *sizes) == 130
        marks.add((tmp_path / ".d.parts" / "identity").read_text())
    assert len(marks) == 3


# Bad input.


@pytest.mark.parametrize("text", ["12", "many GB", "nanGB", "infGB", "0KB", "-1MB"])
@pytest.mark.parametrize("command", ["advise", "convert"])
def test_no_size(tmp_path, capsys, command, text):
    options = ["--base", "b", "--model", "m", f"--budget={text}"]
    options += ["--output", tmp_path / "d"] if command == "convert" else []
    with pytest.raises(SystemExit) as stopped:
        run(command, *options)
    assert stopped.value.code == 2 and "--budget" in capsys.readouterr().err


def test_a_ratio_or_a_budget(tmp_path, capsys):
    options = ["--base", "b", "--model", "m", "--output", tmp_path / "d"]
    with pytest.raises(SystemExit):
        run("convert", *options, "--ratio", "0.125", "--budget", "1GB")
    assert "not allowed with" in capsys.readouterr().err
    paper = ["--method", "dqrelo-paper", "--budget", "1GB"]
    assert run("convert", *options, *paper) == 1
    assert "--budget needs --method dqrelo" in capsys.readouterr().err


def test_an_adapter_has_its_own_rank(tmp_path, capsys):
    base, _ = pair(tmp_path, [(8, 8)])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    options = ["--base", base, "--model", tmp_path / "adapter"]
    assert run("advise", *options) == 1
    assert "at its own rank" in capsys.readouterr().err
    options += ["--budget", "1GB", "--output", tmp_path / "d"]
    assert run("convert", *options) == 1
    assert "leave --budget out" in capsys.readouterr().err


def test_nothing_to_advise(tmp_path, capsys):
    base, _ = pair(tmp_path, [(8, 8)])
    assert run("advise", "--base", base, "--model", base) == 1
    assert "nothing to store" in capsys.readouterr().err


# The advice.


def test_advice_as_json_is_what_numpy_says(models, capsys):
    base, model = models
    assert run("advise", "--base", base, "--model", model, "--json") == 0
    advice = json.loads(capsys.readouterr().out)
    before, after = (load_file(m / "model.safetensors") for m in models)
    seen, missed, total, work, more = {}, 0.0, 0.0, 0, 0
    for name, tensor in after.items():
        if tensor.ndim < 2:
            continue
        delta = (tensor - before[name]).numpy()
        singular = np.linalg.svd(delta.astype(np.float64), compute_uv=False)
        energy = np.cumsum(singular**2) / (singular**2).sum()
        peak = np.abs(delta).max()
        counts, _ = np.histogram(delta, bins=256, range=(-peak, peak))
        share = counts[counts > 0] / delta.size
        seen[name] = {
            "mean_change": np.abs(delta.astype(np.float64)).mean(),
            "largest_singular_value": singular[0],
            "mean_singular_value": singular.mean(),
            "rank_90": 1 + int((energy < 0.9).sum()),
            "entropy": -(share * np.log2(share)).sum(),
        }
        size = Method().size(*delta.shape, 1 / 8, torch.bfloat16)
        tail, head = (singular[size.rank :] ** 2).sum(), (singular[: size.rank] ** 2)
        missed += RHO[size.planes] * (tail + EPS * head.sum())
        total += (singular**2).sum()
        if "embed" not in name:
            n, k = delta.shape
            work, more = work + n * k, more + size.planes * n * k + size.rank * (n + k)
    assert advice["matrices"].keys() == seen.keys()
    for name, numbers in advice["matrices"].items():
        # A value on the edge of two bins may be in either of them.
        assert numbers == pytest.approx(seen[name], rel=2e-4), name
    layers = {"layers 0-0": ".0.", "layers 1-1": ".1.", "q_proj": "q_proj"}
    for group, part in (layers | {"embed_tokens": "embed"}).items():
        for column, value in advice["groups"][group].items():
            values = [numbers[column] for name, numbers in seen.items() if part in name]
            assert value == pytest.approx(np.mean(values), rel=2e-4)
    eighth = next(p for p in advice["predictions"] if p["ratio"] == 1 / 8)
    error = eighth["relative_error"]
    assert error == pytest.approx((missed / total) ** 0.5)
    assert eighth["kl"] == TYPICAL_KL[1 / 8]
    size, whole = eighth["delta_bytes"], 2 * sum(t.numel() for t in after.values())
    assert eighth["decode"] == {"1": 1 + size / whole, "8": 1 + 8 * size / whole}
    assert eighth["prompt"] == pytest.approx(1 + more / work)
    rounded = -(-size // ALIGNMENT) * ALIGNMENT
    for card, count in eighth["models"].items():
        # 92 % of the card, a quarter of which is for the KV cache, and the base.
        assert count == (int(card) * 10**9 * 0.67 - whole) // rounded
    errors = [p["relative_error"] for p in advice["predictions"]]
    assert errors == sorted(errors, reverse=True) and len(errors) == 6
    assert advice["recommended"]["ratio"] == 1 / 4 and errors[-1] < 0.3 < errors[-2]


def test_what_is_advised_is_what_convert_does(models, tmp_path, capsys):
    """The same planes and ranks, no more bytes than said, and about that error."""
    base, model = models
    pair = ("--base", base, "--model", model)
    for i, option in enumerate([(), ("--budget", "60KB")]):
        assert run("advise", *pair, *option, "--json") == 0
        advice = json.loads(capsys.readouterr().out)["recommended"]
        command = advice["command"].split()
        assert command[:2] == ["dqrelo", "convert"]
        delta = tmp_path / f"delta-{i}"
        command[command.index("DELTA")] = str(delta)
        assert run(*command[1:]) == 0
        capsys.readouterr()
        report = json.loads((delta / "report.json").read_text())
        predicted = {e["name"]: e for e in advice["report"]["parameters"]}
        for entry in report["parameters"]:
            for key in ("kind", "weights", "model_bytes", "planes", "rank"):
                assert entry[key] == predicted[entry["name"]][key]
        said = advice["report"]["delta_bytes"]
        assert 0.9 * said < file_bytes(delta) <= said
        missed, change = (
            sum(e[key] for e in report["parameters"]) for key in ("missed", "change")
        )
        ratio = advice["relative_error"] / (missed / change) ** 0.5
        assert 0.97 < ratio < 1.25


@pytest.mark.parametrize("added_tokens", [0, 3])
def test_both_divide_where_tokens_are_most(save_model, tmp_path, added_tokens):
    """Planes and ranks by name, and the bytes, of a small model with its vocabulary."""
    shape = GROUPED | {"intermediate_size": 32, "num_hidden_layers": 1}
    base = save_model(LlamaConfig(**shape, **UNTIED), tmp_path / "base", 1)
    config = LlamaConfig(**shape, **UNTIED)
    model = save_model(config, tmp_path / "model", 2, added_tokens=added_tokens)
    made = convert.convert(str(base), str(model), tmp_path / "delta", 1 / 8)
    predicted = survey(str(base), str(model)).uniform(1 / 8)
    sizes = [
        {e.name: (e.kind, e.planes, e.rank) for e in report.entries}
        for report in (made, predicted)
    ]
    assert sizes[0] == sizes[1]
    planes = {name: size[1] for name, size in sizes[0].items() if size[0] == "matrix"}
    assert planes.pop("lm_head.weight") == planes.pop("model.embed_tokens.weight") == 0
    assert 2 in planes.values()  # narrow matrices have ranks alone
    assert file_bytes(tmp_path / "delta") <= predicted.delta_bytes


def test_the_text_names_what_stands_out(tmp_path, capsys):
    """Layer 0 changes more than the others and in more directions."""
    base, model = pair(tmp_path, [(64, 64)] * 8)
    tensors = load_file(model / "model.safetensors")
    for i in range(8):
        noise = 1e-3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(i))
        low = torch.outer(noise[0], noise[1]) * 1e3
        tensors[f"layers.{i}.w.weight"] = noise if i < 2 else low + 0.02 * noise
    save_file(tensors | {"norm.0": torch.ones(24)}, model / "model.safetensors")
    made = Advice(survey(str(base), str(model)))
    text = made.to_text()
    quarters = [f"layers {i}-{i + 1}" for i in (0, 2, 4, 6)]
    assert list(made.survey.groups()) == ["w", *quarters]
    said = [line for line in text.splitlines() if line.startswith("layers 0-1: ")]
    assert len(said) == 1 and "the predicted relative error" in said[0]
    assert f"dqrelo convert --base {base} --model {model} --ratio" in text
    heads = [line.split() for line in text.splitlines() if line.startswith("ratio ")]
    assert len(heads) == 1 and "KL" in heads[0] and "GB" in heads[0]
    assert re.search(r"^1/16 +[\d,]+ +0\.\d+ +[\d.]+% +1\.\d\dx", text, re.MULTILINE)
    assert not made.remarks() or all("layers 0-1" in line for line in made.remarks())


def test_only_vectors_changed(tmp_path, capsys):
    base, model = pair(tmp_path, [(8, 8)])
    tensors = load_file(model / "model.safetensors")
    tensors["layers.0.w.weight"] *= 0
    save_file(tensors, model / "model.safetensors")
    command = ["advise", "--base", base, "--model", model]
    assert run(*command, "--plot", tmp_path / "p.png") == 0
    text = capsys.readouterr().out
    assert "0 matrices compressed, 1 parameters exact, 1 unchanged" in text


def test_quarters_of_an_odd_number_of_layers(tmp_path):
    base, model = pair(tmp_path, [(8, 8)] * 6)
    groups = survey(str(base), str(model)).groups()
    layers = {name: looks for name, looks in groups.items() if "layers" in name}
    assert list(layers) == ["layers 0-1", "layers 2-2", "layers 3-4", "layers 5-5"]
    for name, looks in layers.items():
        first, last = map(int, name.split()[1].split("-"))
        got = [int(look.entry.name.split(".")[1]) for look in looks]
        assert got == list(range(first, last + 1))


@pytest.mark.parametrize("budget", [(), ("--budget", "60KB")])
def test_the_picture(models, tmp_path, capsys, budget):
    base, model = models
    path = tmp_path / "picture.svg"
    pair = ("--base", base, "--model", model, "--plot", path)
    assert run("advise", *pair, *budget) == 0
    assert path.read_bytes().startswith(b"<?xml")
    drawn = figure(Advice(survey(str(base), str(model))))
    left, right = drawn.axes
    bytes_, errors = left.lines[0].get_data()
    assert len(bytes_) == 6 and list(errors) == sorted(errors, reverse=True)
    assert {line.get_label() for line in right.lines} > {"q_proj", "embed_tokens"}
    assert all(line.get_ydata()[0] == 1 for line in right.lines)
    assert run("advise", "--base", base, "--model", model, "--plot", "x.txt") == 1
    assert "--plot x.txt" in capsys.readouterr().err
