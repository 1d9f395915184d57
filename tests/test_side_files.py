# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the generation config that a fine-tune's delta carries."""

import json

import pytest
from transformers import AutoTokenizer

from dqrelo_tools import cli


def run(*arguments) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def models(tmp_path, save_model):
    """A base and its fine-tune, to be changed."""
    base = save_model("llama-tied", tmp_path / "base", seed=1)
    return base, save_model("llama-tied", tmp_path / "model", seed=2)


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
