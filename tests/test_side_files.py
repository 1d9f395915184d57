# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the generation config that a fine-tune's delta carries."""

import json
import shutil

import pytest
from support.command import run
from transformers import AutoTokenizer


def test_a_tokenizer_of_its_own_travels_whole(models, tmp_path):
    """The base's template file must not reappear beside a fine-tune's that has none."""
    base, model = models
    (base / "chat_template.jinja").rename(model / "chat_template.jinja")
    (base / "chat_template.jinja").write_text("the base's")
    text = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").unlink()
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": text}))
    delta, merged = tmp_path / "d", tmp_path / "m"
    run("convert", "--base", base, "--model", model, "--output", delta)
    run("export", "--base", base, "--delta", delta, "--output", merged)
    for folder in (delta, merged):
        assert not (folder / "chat_template.jinja").exists()
        assert AutoTokenizer.from_pretrained(folder).chat_template == text
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (model / name).read_bytes()


def test_the_base_s_tokenizer_does_not_travel(family):
    names = {path.name for path in family("llama").deltas[0].iterdir()}
    kept = {"delta_config.json", "delta_model.safetensors", "README.md", "report.json"}
    assert names == kept


@pytest.mark.parametrize("has_file", [True, False])
def test_generation_config_travels_also_when_only_config_json_says_it(
    models, tmp_path, has_file
):
    base, model = models
    (model / "generation_config.json").unlink()
    expected = {"bos_token_id": 1, "eos_token_id": [9, 11]}
    if has_file:
        expected["temperature"] = 0.5
        (model / "generation_config.json").write_text(json.dumps(expected))
    else:
        config = json.loads((model / "config.json").read_text())
        text = json.dumps(config | {"eos_token_id": [9, 11]})
        (model / "config.json").write_text(text)
    run("convert", "--base", base, "--model", model, "--output", tmp_path / "d")
    stored = json.loads((tmp_path / "d" / "generation_config.json").read_text())
    assert stored == expected


FILES = {
    "eos_token_id is '2'": ("generation_config.json", {"eos_token_id": "2"}),
    "eos_token_id is 3.0": ("generation_config.json", {"eos_token_id": 3.0}),
    "eos_token_id is [2, 999999]": (
        "generation_config.json",
        {"eos_token_id": [2, 999_999]},
    ),
    "temperature is nan": ("generation_config.json", '{"temperature": NaN}'),
    "max_new_tokens is -1": ("generation_config.json", {"max_new_tokens": -1}),
    "generation_config.json is not valid JSON": ("generation_config.json", "{"),
    "generation_config.json is not a JSON object": ("generation_config.json", "[]"),
    "tokenizer.json is not valid JSON": ("tokenizer.json", "{"),
    "tokenizer_config.json is not a JSON object": ("tokenizer_config.json", "[]"),
    "a tokenizer that cannot be used": ("tokenizer.json", {"model": {"type": "BPE"}}),
    "chat_template.jinja cannot be used": ("chat_template.jinja", "{% for %}"),
    "it takes more time than is allowed": (
        "chat_template.jinja",
        "{% for i in range(99999) %}" * 2 + "{% endfor %}" * 2,
    ),
    "has 500,000 characters": (
        "chat_template.jinja",
        "{{ 'w' }}" * 50_000 + "w" * 50_000,
    ),
    "bytes of memory": ("chat_template.jinja", "{{ 'a' * 10 ** 11 }}"),
}


@pytest.mark.parametrize("message", FILES)
def test_what_no_server_takes_is_refused_before_anything_is_computed(
    models, tmp_path, capsys, monkeypatch, message
):
    base, model = models
    name, content = FILES[message]
    text = content if isinstance(content, str) else json.dumps(content)
    (model / name).write_text(text)
    monkeypatch.setattr("dqrelo_tools.convert.convert_all", None)
    output = tmp_path / "out" / "delta"
    assert run("convert", "--base", base, "--model", model, "--output", output) == 1
    said = capsys.readouterr().err
    assert said.startswith("dqrelo: error: ") and message in said and name in said
    assert len(said) < 1000 and not (tmp_path / "out").exists()


def test_what_config_json_says_of_tokens_is_checked_as_well(models, tmp_path, capsys):
    base, model = models
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"eos_token_id": 320}))
    arguments = ("--base", base, "--model", model, "--output", tmp_path / "d")
    assert run("convert", *arguments) == 1
    assert (
        "config.json cannot be used:\n  eos_token_id is 320" in capsys.readouterr().err
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    models, tmp_path, capsys
):
    base, model = models
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(model)
    arguments = ("--base", base, "--model", model, "--output", tmp_path / "d")
    assert run("convert", *arguments) == 1
    assert (
        "tokens up to 320, but the model has them up to 319" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ missing.attribute }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}",
    ],
)
def test_a_template_may_refuse_a_conversation(models, tmp_path, template):
    base, model = models
    (model / "chat_template.jinja").write_text(template)
    delta = tmp_path / "d"
    assert not run("convert", "--base", base, "--model", model, "--output", delta)
    assert (delta / "chat_template.jinja").read_text() == template


def test_named_templates_travel(models, tmp_path):
    base, model = models
    (model / "chat_template.jinja").unlink()
    path = model / "tokenizer_config.json"
    named = [{"name": n, "template": f"{{# {n} #}}"} for n in ("default", "tool_use")]
    config = json.loads(path.read_text()) | {"chat_template": named}
    path.write_text(json.dumps(config))
    delta = tmp_path / "d"
    assert not run("convert", "--base", base, "--model", model, "--output", delta)
    assert {*AutoTokenizer.from_pretrained(delta).chat_template} == {
        "default",
        "tool_use",
    }
    named[1]["template"] = "{% if %}"
    path.write_text(json.dumps(config))
    output = tmp_path / "e"
    assert run("convert", "--base", base, "--model", model, "--output", output) == 1


def test_a_template_without_its_tokenizer(models, tmp_path, capsys):
    base, model = models
    for path in model.glob("tokenizer*"):
        path.unlink()
    options = ["--base", base, "--model", model, "--output", tmp_path / "d"]
    assert run("convert", *options) == 1
    error = capsys.readouterr().err
    assert "has chat_template.jinja, but not the tokenizer" in error
    assert not (tmp_path / "d").exists()


def test_images_are_prepared_as_for_the_base(models, tmp_path, caplog):
    """What a delta does not keep of an image processor is said, and nothing else is."""
    base, model = models
    own = {"size": {"height": 32}, "do_resize": True, "image_processor_type": "A"}
    old = {"image_processor": own | {"image_processor_type": "B", "resample": 2}}
    (base / "preprocessor_config.json").write_text(json.dumps(own))
    (base / "chat_template.json").write_text(json.dumps({"chat_template": "a"}))
    path = model / "processor_config.json"
    path.write_text(json.dumps(old))
    shutil.copy(base / "chat_template.json", model)
    options = ["convert", "--base", base, "--model", model, "--output"]
    run(*options, tmp_path / "same")
    assert "images" not in caplog.text and "template" not in caplog.text
    path.write_text(json.dumps({"image_processor": own | {"size": {"height": 64}}}))
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "b"}))
    run(*options, tmp_path / "other")
    assert "(size {'height': 64}, not {'height': 32})" in caplog.text
    assert f"{model / 'chat_template.json'} is left out" in caplog.text
