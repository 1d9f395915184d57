# SPDX-License-Identifier: Apache-2.0
"""``dqrelo doctor``: whether this machine can serve deltas, and what a report needs."""

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from vllm_dqrelo import __version__
from vllm_dqrelo.format.errors import DqreloError
from vllm_dqrelo.frontend.serve import check_plugin, check_vllm
from vllm_dqrelo.messages.self_check import FOLDER, RESULT

PACKAGES = ("torch", "transformers", "safetensors", "triton")
# That kernels are chosen by.
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_tile")
GIB = 2**30


class Finding(NamedTuple):
    """One line of the screen.

    Attributes:
        subject: a part of the machine.
        text: the state of that part, or the reason why it cannot serve.
        serves: whether this machine can serve with it.
    """

    subject: str
    text: str
    serves: bool = True


def examine() -> Iterator[Finding]:
    """Look at each part of this machine; a part that raises cannot serve."""
    # vLLM's own lines would hide the screen.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    for subject, look in PARTS.items():
        try:
            yield Finding(subject, look())
        except DqreloError as error:
            yield Finding(subject, str(error), serves=False)
        except Exception as error:  # an import may fail in any way
            reason = str(error).strip().partition("\n")[0]
            yield Finding(subject, f"{type(error).__name__}: {reason}", serves=False)
        if subject == "vLLM" and not sys.modules.get("vllm"):
            return  # all further parts ask vLLM


def us() -> str:
    """This project and the interpreter."""
    return (
        f"{__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.release()} {platform.machine()}"
    )


def packages() -> str:
    """The versions of the packages that compute; a missing one is left out."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def vllm() -> str:
    """vLLM's version."""
    check_vllm()
    from vllm_dqrelo.compat import tested

    return f"{_vllm_version()} (tested: {tested()})"


def plugin() -> str:
    """Whether vLLM knows ``--quantization dqrelo``, after it was registered here."""
    check_plugin()
    from vllm_dqrelo.plugin import register

    register()
    return "active: vLLM knows --quantization dqrelo"


def device() -> str:
    """The device that vLLM serves on."""
    import torch
    from vllm.platforms import current_platform

    from vllm_dqrelo.supported import device_problem

    kind = current_platform.device_type
    if problem := device_problem(kind):
        raise DqreloError(f"{_device_name()}: --quantization dqrelo {problem}")
    if kind != "cpu":
        return f"{kind}: {_device_name()}"
    there = torch.cpu.get_capabilities()
    has = [name for name in INSTRUCTIONS if there.get(name)]
    return f"cpu: {os.cpu_count()} cores {platform.machine()}, {' '.join(has)}"


def model_runner() -> str:
    """vLLM's model runner, for an engine without options that need the other one."""
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    given = envs.VLLM_USE_V2_MODEL_RUNNER
    if given is None:
        return f"{'V2' if HAS_TRITON else 'V1'}, vLLM's default here"
    return f"{'V2' if given else 'V1'}, by VLLM_USE_V2_MODEL_RUNNER"


def operators() -> str:
    """The code that computes deltas."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return f"Triton {metadata.version('triton')}"
    from dqrelo_kernels.cpu.build import plan

    slow = "plain torch, many times slower"
    if os.environ.get("DQRELO_NATIVE", "1") == "0":
        return f"{slow}: DQRELO_NATIVE=0"
    try:
        command, built = plan()
    except (OSError, RuntimeError) as error:
        return f"{slow}: {error}"
    state = "built" if built.exists() else "to be built at the first start"
    return f"native code, by {command[0]}, {state}"


def memory() -> str:
    """Memory of the host and of a GPU."""
    import psutil
    from vllm.platforms import current_platform

    from vllm_dqrelo.host_memory import available

    total = psutil.virtual_memory().total
    text = f"{available() / GIB:.1f} of {total / GIB:.1f} GiB available"
    if current_platform.is_cuda_alike():
        import torch

        free, total = torch.cuda.mem_get_info()
        text += f"; GPU: {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return text


def self_check() -> str:
    """The newest self-check of a server on this machine."""
    from vllm import envs

    files = Path(envs.VLLM_CACHE_ROOT, FOLDER).glob("*.json")
    newest = max(files, key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return "not remembered: run a server once"
    try:
        return str(json.loads(newest.read_text())[RESULT])
    except (OSError, ValueError, KeyError) as error:
        return f"not readable: {error}"


def _vllm_version() -> str:
    import vllm

    return vllm.__version__


def _device_name() -> str:
    from vllm.platforms import current_platform

    return current_platform.get_device_name()


PARTS: dict[str, Callable[[], str]] = {
    "vllm-dqrelo": us,
    "packages": packages,
    "vLLM": vllm,
    "plugin": plugin,
    "device": device,
    "model runner": model_runner,
    "operators": operators,
    "memory": memory,
    "self-check": self_check,
}
