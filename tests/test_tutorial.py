# SPDX-License-Identifier: Apache-2.0
"""docs/tutorial.md: every command of it, on tiny models."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from support.field import LLAMA_3_1, publish
from support.shapes import GROUPED, UNTIED
from transformers import LlamaConfig

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TUTORIAL = Path(__file__).parent.parent / "docs" / "tutorial.md"
LIMIT_S = 1800


def test_every_command(save_model, tmp_path):
    """The base's config.json is as Llama 3.1 was published, the others' as of today."""
    rope = {"rope_theta": LLAMA_3_1["rope_theta"], **LLAMA_3_1["rope_scaling"]}
    config = LlamaConfig(**GROUPED, **UNTIED, rope_parameters=rope)
    for seed, name in enumerate(("base", "math", "code", "math-2"), start=1):
        save_model(config, tmp_path / "models" / name, seed=seed)
    publish(tmp_path / "models" / "base", **LLAMA_3_1)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    blocks = re.findall(r"^```bash\n(.*?)^```", TUTORIAL.read_text(), re.M | re.S)
    script = "\n".join(blocks).replace("8000", str(port))
    # 8000 is the default of that command.
    url = rf"\1 --url http://localhost:{port}"
    script = re.sub(r"^(dqrelo deltas .*)$", url, script, flags=re.M)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        | {"VLLM_LOGGING_LEVEL": "INFO"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    finally:
        with suppress(ProcessLookupError):  # a server that it left behind
            os.killpg(process.pid, signal.SIGKILL)
    log = tmp_path / "server.log"
    assert process.returncode == 0, (err, log.exists() and log.read_text()[-4000:])

    answers = [
        json.loads(line)["choices"][0]["message"]["content"]
        for line in out.splitlines()
        if '"chat.completion"' in line
    ]
    math, base, code, updated, back = answers
    assert len({math, base, code, updated}) == 4
    assert back == math
    assert "dqrelo: base" in out and "dqrelo:requests_total" in out
    listed = out[out.index("NAME") :].splitlines()[1:3]
    assert {line.split()[0] for line in listed} == {"math", "code"}
