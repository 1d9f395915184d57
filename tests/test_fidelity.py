# SPDX-License-Identifier: Apache-2.0
"""verify --prompts against a plain loop over tokens, verify --plot against numpy."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dqrelo_tools import cli, fidelity, plot
from dqrelo_tools.card import read_report

CHAT = [{"role": "user", "content": "w7 w8 w9"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "w20 w21"}]


def verify(made, *options) -> int:
    command = ["verify", "--base", made.base, "--delta", made.deltas[0], *options]
    return cli.main([str(part) for part in command])


def distances(made, prompts: list[list[int]]) -> dict[str, dict[str, float]]:
    """KL and top-1 agreement of the merged checkpoint and of the base, in float64."""
    folders = {"p": made.models[0], "delta": made.merged[0], "base": made.base}
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder)
        for name, folder in folders.items()
    }
    for model in models.values():
        if model.config.model_type != "mixtral":  # whose router is always float32
            model.double()
    kls, same = {"delta": [], "base": []}, {"delta": [], "base": []}
    for tokens in prompts:
        with torch.no_grad():
            rows = {
                name: model(torch.tensor([tokens]))
                .logits[0]
                .double()
                .softmax(-1)
                .tolist()
                for name, model in models.items()
            }
        for i, p in enumerate(rows["p"]):
            for name in kls:
                q = rows[name][i]
                pairs = zip(p, q, strict=True)
                kls[name].append(sum(a * math.log(a / b) for a, b in pairs))
                same[name].append(p.index(max(p)) == q.index(max(q)))
    return {
        name: {
            "kl": sum(kls[name]) / len(kls[name]),
            "top1": sum(same[name]) / len(same[name]),
        }
        for name in kls
    }


@pytest.mark.parametrize("kind", ["llama-tied", "llama", "qwen3", "mixtral"])
def test_kl_and_agreement(family, kind, tmp_path, capsys, monkeypatch):
    """Prompts of different lengths, over several windows: the mean is over tokens."""
    monkeypatch.setattr(fidelity, "WINDOW", 5)
    made = family(kind)
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(320, (length,), generator=generator).tolist()
        for length in (1, 5, 23)
    ]
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(" ".join(f"w{t}" for t in p) for p in prompts))
    options = ["--model", made.models[0], "--prompts", file]
    assert verify(made, *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)["fidelity"]
    assert (found["prompts"], found["tokens"]) == (3, 29)
    for name, expected in distances(made, prompts).items():
        assert found[name]["kl"] == pytest.approx(expected["kl"], rel=1e-4)
        assert found[name]["top1"] == pytest.approx(expected["top1"])
    assert 0 < found["delta"]["kl"] < found["base"]["kl"]
    assert verify(made, *options) == 0
    *_, counts, delta, base = capsys.readouterr().out.splitlines()
    assert "3 prompts, 29 tokens" in counts
    for line, name in ((delta, "delta"), (base, "base")):
        kl, top1 = line.split()[-2:]
        assert float(kl) == pytest.approx(found[name]["kl"], rel=1e-3)
        assert float(top1[:-1]) == pytest.approx(100 * found[name]["top1"], abs=0.05)


@pytest.mark.parametrize(
    ("line", "tokens"),
    [
        ({"prompt": "w4 w5"}, [4, 5]),
        ({"text": "w4 w5 w6", "label": 1}, [4, 5, 6]),
        ({"messages": ANSWERED}, [2, 7, 8, 9, 2, 20, 21, 3]),
        ({"messages": CHAT}, [2, 7, 8, 9, 3, 11]),  # w11: an answer begins
        ({"prompt": CHAT}, [2, 7, 8, 9, 3, 11]),
    ],
)
def test_json_lines(family, tmp_path, capsys, line, tokens):
    made = family("llama")
    template = made.models[0] / "chat_template.jinja"
    original = template.read_text()
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps(line)}\n")
    template.write_text(original + "{% if add_generation_prompt %} w11{% endif %}")
    try:
        assert not verify(made, "--model", made.models[0], "--prompts", file, "--json")
    finally:
        template.write_text(original)
    found = json.loads(capsys.readouterr().out)["fidelity"]
    assert found["tokens"] == len(tokens)
    expected = distances(made, [tokens])["delta"]["kl"]
    assert found["delta"]["kl"] == pytest.approx(expected, rel=1e-4)


def test_a_long_prompt_is_cut_and_that_is_said_once(family, tmp_path, capsys):
    made = family("llama")
    file = tmp_path / "prompts.txt"
    file.write_text("w5 " * 300 + "\n" + "w6 " * 257 + "\n" + "w7 " * 256 + "\n")
    assert verify(made, "--model", made.models[0], "--prompts", file, "--json") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["fidelity"]["tokens"] == 3 * 256
    assert shown.err.count("2 of 3 prompts are cut to 256 tokens") == 1


def fails(made, capsys, message, *options) -> None:
    """One clear message, before any error is measured."""
    assert verify(made, *options) == 1
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert not shown.out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b" \n\n", "has no prompts"),
        ("p.jsonl", b"", "has no prompts"),
        ("p.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("p.jsonl", b'{"text": "w1"}\n{"text"', "line 2: Expecting ':'"),
        ("p.jsonl", b'\n["w1"]', "line 2: expected a JSON object with one of messages"),
        ("p.jsonl", b'{"label": 1}', "line 1: expected a JSON object with one of"),
        ("p.jsonl", b'{"text": ""}', 'line 1: text is "", expected text or a list'),
        ("p.jsonl", b'{"text": 3}', "line 1: text is 3, expected text or a list"),
        ("p.jsonl", b'{"messages": "w1"}', 'messages is "w1", expected a list of'),
        ("p.jsonl", b'{"messages": [{"role": "user"}]}', 'expected a list of {"role"'),
    ],
)
def test_prompts_that_cannot_be_used(family, tmp_path, capsys, name, content, message):
    made, file = family("llama"), tmp_path / name
    file.write_bytes(content)
    fails(made, capsys, message, "--model", made.models[0], "--prompts", file)


def test_a_template_that_refuses_a_chat(family, tmp_path, capsys):
    made, file = family("llama"), tmp_path / "p.jsonl"
    lines = [{"text": "w1"}, {"messages": CHAT}]
    file.write_text("\n".join(map(json.dumps, lines)))
    template = made.models[0] / "chat_template.jinja"
    original = template.read_text()
    template.write_text("{{ raise_exception('roles must alternate') }}")
    message = "line 2: roles must alternate"
    try:
        fails(made, capsys, message, "--model", made.models[0], "--prompts", file)
    finally:
        template.write_text(original)


def test_options_that_lack_something(family, tmp_path, capsys, monkeypatch):
    made, file = family("llama"), tmp_path / "p.txt"
    file.write_text("w1")
    fails(made, capsys, "--prompts needs --model", "--prompts", file)
    fails(made, capsys, "expected a name in .png", "--plot", tmp_path / "p.gif")
    fails(made, capsys, "is not a folder", "--plot", tmp_path / "no" / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["--plot", tmp_path / "p.png"]
    fails(made, capsys, "needs matplotlib, which is not installed", *options)


def test_plot_from_the_report_alone(family):
    """Each line against the Frobenius norms of the checkpoints themselves."""
    made = family("llama")
    before, after, merged = (
        load_file(folder / "model.safetensors")
        for folder in (made.base, made.models[0], made.merged[0])
    )
    (axes,) = plot.figure(read_report(made.deltas[0])).axes
    drawn = {line.get_label(): line for line in axes.get_lines()}
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        line = drawn[module.split(".")[1]]
        assert list(line.get_xdata()) == [0, 1]
        for layer, error in enumerate(line.get_ydata()):
            name = f"model.layers.{layer}.{module}.weight"
            missed = (after[name] - merged[name]).norm()
            expected = missed / (after[name] - before[name]).norm()
            assert error == pytest.approx(float(expected), rel=1e-3)
    assert len([label for label in drawn if label.endswith("_proj")]) == 7
    points = {text.get_text().strip(): text.xy for text in axes.texts}
    assert set(points) == {"embed_tokens", "lm_head"}
    assert all(x > 1 for x, _ in points.values())


@pytest.mark.parametrize("measured", [True, False])
def test_plot_is_saved(family, tmp_path, capsys, measured):
    made, file = family("llama"), tmp_path / "errors.png"
    options = ["--model", made.models[0]] if measured else []
    assert verify(made, *options, "--plot", file) == 0
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_report_of_another_version(family, tmp_path):
    (tmp_path / "report.json").write_text('{"parameters": [{"colour": 1}]}')
    with pytest.raises(ValueError, match="is not a report of this version"):
        read_report(tmp_path)
