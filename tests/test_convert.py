# SPDX-License-Identifier: Apache-2.0
"""The commands convert, inspect, verify and export, on good and on bad input."""

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import run
from transformers import AutoModelForCausalLM

from vllm_dqrelo.format.checkpoint import Checkpoint
from vllm_dqrelo.format.delta import Delta


def edit(folder, change) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["llama-tied", "llama", "qwen2", "qwen3"])
def test_export_is_base_plus_the_formula(family, kind, decode):
    made = family(kind)
    for model, delta, merged in zip(made.models, made.deltas, made.merged, strict=True):
        before = load_file(made.base / "model.safetensors")
        after = load_file(model / "model.safetensors")
        got = load_file(merged / "model.safetensors")
        stored = load_file(delta / "delta_model.safetensors")
        assert set(got) == set(before)
        for name, tensor in got.items():
            if tensor.ndim == 1:
                assert torch.equal(tensor, after[name])
                continue
            expected = before[name].double() + torch.tensor(decode(stored, name))
            assert (tensor - expected).abs().max() < 1e-6
        AutoModelForCausalLM.from_pretrained(merged)


def test_the_tied_embedding_is_stored_once(family):
    tied = Delta(family("llama-tied").deltas[0])
    untied = Delta(family("llama").deltas[0])
    assert "lm_head.weight" not in tied.matrices
    assert "lm_head.weight" in untied.matrices
    assert "model.embed_tokens.weight" in tied.matrices


def test_a_parameter_that_did_not_change_costs_nothing(models, tmp_path, capsys):
    base, model = models
    same = {"model.layers.0.mlp.up_proj.weight", "model.norm.weight"}
    source = load_file(base / "model.safetensors")
    edit(model, lambda t: t.update({name: source[name] for name in same}))
    assert (
        run("convert", "--base", base, "--model", model, "--output", tmp_path / "d")
        == 0
    )
    delta = Delta(tmp_path / "d")
    assert not same & {*delta.matrices, *delta.exact}
    assert "2 unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(("ratio", "index"), [(0.125, 0), (0.25, 1)])
def test_a_delta_takes_its_ratio_and_no_more(family, ratio, index):
    """All of it counts: signs, scales, shapes, factors; and nearly all is used."""
    made = family("llama")
    stored = load_file(made.deltas[index] / "delta_model.safetensors")
    size, header = (0, 0), 0
    path = made.deltas[index] / "delta_model.safetensors"
    for name, tensor in load_file(made.base / "model.safetensors").items():
        own = {k: v for k, v in stored.items() if k == name or k.startswith(name + "_")}
        taken = sum(v.nbytes for v in own.values())
        if tensor.ndim == 2:
            budget = ratio * 2 * tensor.numel()
            assert budget - sum(tensor.shape) - 8 < taken <= budget
        size = (size[0] + taken, size[1] + 1)
    header = int.from_bytes(path.read_bytes()[:8], "little") + 8
    assert path.stat().st_size == size[0] + header


def test_sharded_and_bfloat16_checkpoints(tmp_path, save_model):
    torch.manual_seed(0)
    base = save_model("qwen2", tmp_path / "base", 1, dtype=torch.bfloat16)
    model = save_model("qwen2", tmp_path / "model", 2, dtype=torch.bfloat16)
    for folder in (base, model):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        sharded = folder.with_name(folder.name + "-sharded")
        loaded.save_pretrained(sharded, max_shard_size="100KB")
        assert len(list(sharded.glob("*.safetensors"))) > 2
    one, other = tmp_path / "one", tmp_path / "other"
    assert run("convert", "--base", base, "--model", model, "--output", one) == 0
    assert not run(
        *("convert", "--base", f"{base}-sharded", "--model", f"{model}-sharded"),
        *("--output", other),
    )
    assert (one / "delta_model.safetensors").read_bytes() == (
        other / "delta_model.safetensors"
    ).read_bytes()
    merged = tmp_path / "merged"
    assert not run(
        "export", "--base", f"{base}-sharded", "--delta", other, "--output", merged
    )
    assert len(list(merged.glob("*.safetensors"))) > 2
    AutoModelForCausalLM.from_pretrained(merged)


def test_the_same_input_gives_the_same_bytes(models, tmp_path):
    base, model = models
    for output in ("one", "two"):
        run("convert", "--base", base, "--model", model, "--output", tmp_path / output)
    for name in ("delta_model.safetensors", "delta_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (
            tmp_path / "two" / name
        ).read_bytes()


def test_inspect_and_verify_as_json(family, capsys):
    made = family("llama")
    assert run("inspect", made.deltas[0], "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["ratio"] == 0.125 and shown["format_version"] == 1
    assert shown["matrices"]["lm_head.weight"]["shape"] == [320, 96]
    command = ["verify", "--base", made.base, "--delta", made.deltas[0], "--json"]
    assert run(*command, "--model", made.models[0]) == 0
    report = json.loads(capsys.readouterr().out)
    for entry in report["parameters"]:
        change = load_file(made.models[0] / "model.safetensors")[entry["name"]]
        change = change - load_file(made.base / "model.safetensors")[entry["name"]]
        if entry["kind"] == "matrix":
            dense = Delta(made.deltas[0]).matrix(entry["name"]).dense()
            missed = (change - dense).double().square().sum().item()
            assert entry["missed"] == pytest.approx(missed, rel=1e-5)
        else:
            assert entry["missed"] == 0
    assert 0.4 < report["relative_error"]["q_proj"] < 0.65


def test_card_and_report(models, tmp_path):
    """The licence is inherited or left open; a local base is not named as a Hub's."""
    import yaml

    base, model = models
    command = ["convert", "--base", base, "--model", model, "--output"]
    assert run(*command, tmp_path / "open") == 0
    (model / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    assert run(*command, tmp_path / "mit") == 0
    cards = []
    for name in ("open", "mit"):
        card = (tmp_path / name / "README.md").read_text()
        cards.append(yaml.safe_load(card.split("---")[1]))
        assert Delta(tmp_path / name).config.to_json() in card
    assert "license" not in cards[0] and cards[1]["license"] == "mit"
    assert "base_model" not in cards[0] and cards[0]["library_name"] == "vllm-dqrelo"
    report = json.loads((tmp_path / "mit" / "report.json").read_text())
    size = (tmp_path / "mit" / "delta_model.safetensors").stat().st_size
    assert report["delta_bytes"] == size
    run(
        "export",
        "--base",
        base,
        "--delta",
        tmp_path / "mit",
        "--output",
        tmp_path / "m",
    )
    assert not (tmp_path / "m" / "report.json").exists()


# Bad input. Each: exit code 1, one message that names the cause, nothing written.


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


NORM, Q = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            drop(NORM),
            "1 of 20 parameters of the base is not in the fine-tune",
        ),
        (
            lambda t: t.update(extra=t[NORM].clone()),
            "1 of 21 parameters of the fine-tune is not in the base",
        ),
        (replace(Q, lambda t: t[:64].clone()), f"{Q} is [64, 96], the base has [96"),
        (replace(Q, lambda t: t.double()), f"{Q} is F64, expected BF16, F16 or F32"),
        (replace(Q, lambda t: t * torch.nan), f"{Q} of the fine-tune has a NaN"),
        (replace(NORM, lambda t: t / 0), f"{NORM} of the fine-tune has a NaN or an"),
    ],
)
def test_wrong_tensors(models, tmp_path, capsys, damage, message):
    base, model = models
    edit(model, damage)
    refused(tmp_path, capsys, message, base, model)


def test_a_convolution_must_be_the_bases(models, tmp_path, capsys):
    base, model = models
    for folder in models:
        edit(folder, lambda tensors: tensors.update(conv=torch.ones(4, 3, 2)))
    made = tmp_path / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", made) == 0
    assert "conv" not in Delta(made).exact
    edit(model, replace("conv", lambda t: t * 2))
    message = "conv is [4, 3, 2] and was changed: a delta has only vectors and"
    refused(tmp_path, capsys, message, base, model)


def test_all_wrong_tensors_in_one_message(models, tmp_path, capsys):
    base, model = models
    edit(model, drop(NORM))
    edit(model, replace(Q, lambda t: t[:64].clone()))
    refused(tmp_path, capsys, f"not in the fine-tune, for instance {NORM}", base, model)
    assert f"{Q} is [64, 96]" in refused.last


def test_truncated_safetensors(models, tmp_path, capsys):
    base, model = models
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(tmp_path, capsys, "not a readable safetensors file", base, model)


def test_pickle_checkpoint(models, tmp_path, capsys):
    base, model = models
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(tmp_path, capsys, "pickle files (pytorch_model.bin)", base, model)


def test_missing_model_and_missing_shard(models, tmp_path, capsys):
    base, model = models
    refused(tmp_path, capsys, "neither a folder nor a model", base, tmp_path / "none")
    (model / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, capsys, "names missing files", base, model)


@pytest.mark.parametrize("key", ["rope_theta", "hidden_act", "quantization_config"])
def test_another_configuration(models, tmp_path, capsys, key):
    base, model = models
    config = json.loads((model / "config.json").read_text())
    value = {"quant_method": "fp8"} if "quant" in key else "other"
    (model / "config.json").write_text(json.dumps(config | {key: value}))
    message = "is quantised" if "quant" in key else f"config.json: {key} is 'other'"
    refused(tmp_path, capsys, message, base, model)


def test_nothing_changed(models, tmp_path, capsys):
    base, _ = models
    refused(tmp_path, capsys, "has the weights of", base, base)


@pytest.mark.parametrize("ratio", ["0", "1.01", "nan", "-1", "0/8", "9/8", "1/-8"])
def test_ratio_out_of_range(models, tmp_path, capsys, ratio):
    refused(tmp_path, capsys, "out of range", *models, "--ratio", ratio)


def test_ratio_as_a_fraction(models, tmp_path):
    command = ["convert", "--base", models[0], "--model", models[1]]
    written = []
    for name, ratio in (("text", "1/16"), ("number", "0.0625")):
        assert run(*command, "--output", tmp_path / name, "--ratio", ratio) == 0
        written.append((tmp_path / name / "delta_config.json").read_text())
    assert written[0] == written[1]  # the digest is in it


def test_ratio_too_small_for_signs(models, tmp_path, capsys):
    paper = ["--ratio", "0.06", "--method", "dqrelo-paper"]
    refused(tmp_path, capsys, "the signs alone take 0.0625", *models, *paper)


def test_output_not_empty(models, tmp_path, capsys):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "precious").write_text("data")
    command = ["convert", "--base", models[0], "--model", models[1]]
    assert run(*command, "--output", tmp_path / "d") == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["precious"]


def test_disk_too_small_is_noticed_before_the_work(
    models, tmp_path, capsys, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(tmp_path, capsys, "has 1,000 left", *models)


def test_disk_full_in_the_middle(models, tmp_path, capsys, monkeypatch):
    """The delta is not written; what was converted is kept, and the disk's to free."""

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    command = ["convert", "--base", models[0], "--model", models[1]]
    command += ["--output", tmp_path / "d"]
    with monkeypatch.context() as patched:
        patched.setattr("vllm_dqrelo.format.delta.save_file", full)
        assert run(*command) == 1
    said = capsys.readouterr().err
    assert "is full; nothing was written" in said
    assert f"are kept in {tmp_path / '.d.parts'}: the same command" in said
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.partial"))
    assert run(*command) == 0 and not list(tmp_path.glob(".d*"))


def test_verify_and_export_refuse_another_base(family, tmp_path, capsys):
    made = family("llama")
    for command in (["verify"], ["export", "--output", tmp_path / "merged"]):
        status = run(*command, "--base", made.models[1], "--delta", made.deltas[0])
        assert status == 1
        assert "belongs to another base" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_verify_notices_another_fine_tune(family, capsys):
    made = family("llama")
    command = ["verify", "--base", made.base, "--delta", made.deltas[0]]
    assert run(*command, "--model", made.models[1]) == 1
    assert "is not the delta of" in capsys.readouterr().err


def test_fingerprint_sees_every_parameter(models):
    _, model = models
    whole = Checkpoint(model).fingerprint()
    for name in (NORM, Q, "model.embed_tokens.weight"):
        original = load_file(model / "model.safetensors")[name]
        edit(model, replace(name, lambda t: t + 0.001))
        assert Checkpoint(model).fingerprint() != whole, name
        edit(model, lambda t, n=name, o=original: t.update({n: o}))
    assert Checkpoint(model).fingerprint() == whole


def refused(tmp_path, capsys, message, base, model, *options):
    """convert must fail with ``message`` and leave nothing behind."""
    before = sorted(path.name for path in tmp_path.iterdir())
    status = run(
        *("convert", "--base", base, "--model", model),
        *("--output", tmp_path / "new" / "d", *options),
    )
    refused.last = capsys.readouterr().err
    assert status == 1
    assert message in refused.last
    assert "Traceback" not in refused.last
    after = [path for path in tmp_path.iterdir() if any(path.iterdir())]
    assert sorted(path.name for path in after) == before


KINDS = ("llama-tied", "llama")


@pytest.mark.parametrize(("base_kind", "kind"), [KINDS, KINDS[::-1]])
def test_a_fine_tune_with_another_lm_head(tmp_path, save_model, base_kind, kind):
    """Untied by the fine-tune, or tied by it: the merged checkpoint has both."""
    base = save_model(base_kind, tmp_path / "base", seed=1)
    model = save_model(kind, tmp_path / "model", seed=2)
    delta, out = tmp_path / "delta", tmp_path / "merged"
    pair = ["--base", base, "--model", model]
    assert run("convert", *pair, "--output", delta, "--ratio", 0.5) == 0
    assert run("verify", *pair, "--delta", delta) == 0
    assert run("export", "--base", base, "--delta", delta, "--output", out) == 0
    got, want, before = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (out, model, base)
    )
    for part in ("get_input_embeddings", "get_output_embeddings"):
        mine, theirs, old = (getattr(m, part)().weight for m in (got, want, before))
        assert (mine - theirs).norm() < 0.05 * (old - theirs).norm(), part
    assert not got.config.tie_word_embeddings


def test_an_untied_head_that_did_not_change_is_stored(tmp_path, save_model):
    base = save_model("llama-tied", tmp_path / "base", seed=1)
    model = AutoModelForCausalLM.from_pretrained(base)
    head = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(head)
    model.save_pretrained(tmp_path / "model")
    delta, pair = tmp_path / "delta", ["--base", base, "--model", tmp_path / "model"]
    assert run("convert", *pair, "--output", delta) == 0
    opened = Delta(delta)
    assert "lm_head.weight" in opened.matrices
    assert not opened.matrix("lm_head.weight").dense().any()
