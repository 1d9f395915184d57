# SPDX-License-Identifier: Apache-2.0
"""What commands show while they work: bars on a terminal, nothing elsewhere."""

import io
import sys

import pytest
import transformers
from safetensors.torch import load_file
from support.command import run

from dqrelo_tools import convert, verify
from vllm_dqrelo.format.delta import Delta, weight_files
from vllm_dqrelo.format.folder import file_bytes


class Terminal(io.StringIO):
    """What stderr is in a shell."""

    def isatty(self):
        return True


@pytest.fixture
def commands(family, tmp_path):
    """name -> arguments of each command that may take long."""
    made = family("llama")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w1 w2 w3")
    base, model = ["--base", made.base], ["--model", made.models[0]]
    delta = ["--delta", made.deltas[0]]
    return {
        "advise": ["advise", *base, *model],
        "convert": ["convert", *base, *model, "--output", tmp_path / "delta"],
        "verify": ["verify", *base, *delta, *model, "--prompts", prompts],
        "export": ["export", *base, *delta, "--output", tmp_path / "merged"],
        "inspect": ["inspect", made.deltas[0]],
    }


@pytest.mark.parametrize("name", ["advise", "convert", "verify", "export", "inspect"])
def test_progress_is_for_terminals(commands, name, monkeypatch, tmp_path):
    for stderr in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stderr)
        transformers.logging.enable_progress_bar()
        arguments = [*commands[name]]
        if "--output" in arguments:
            arguments[-1] = f"{arguments[-1]}-{stderr.isatty()}"
        assert run(*arguments) == 0
        shown = stderr.getvalue()
        assert ("%|" in shown) == (stderr.isatty() and name != "inspect"), shown


def test_the_check_of_a_delta_counts_every_byte(family, monkeypatch):
    folder, seen = family("llama").deltas[0], []
    Delta(folder, watch=seen.append)
    (file,) = weight_files(folder)
    content = file_bytes([file]) - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    assert sum(seen) == 2 * content
    bars = []

    class Bar(verify.tqdm):
        def __init__(self, *arguments, **options):
            bars.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(verify, "tqdm", Bar)
    verify.checked(folder)
    assert [bar["total"] for bar in bars] == [2 * file_bytes([file])]


def test_the_last_step_of_a_conversion_counts_every_byte(family, tmp_path, monkeypatch):
    made, bars = family("llama"), []

    class Bar(convert.tqdm):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options | {"disable": False})
            bars.append(self)

    monkeypatch.setattr(convert, "tqdm", Bar)
    convert.convert(str(made.base), str(made.models[0]), tmp_path / "delta")
    (bar,) = [bar for bar in bars if bar.desc == "write"]
    (file,) = weight_files(tmp_path / "delta")
    # Each of the journal's files has a header, too.
    assert 0.7 * bar.total < bar.n < bar.total
    assert bar.n == 2 * sum(tensor.nbytes for tensor in load_file(file).values())
