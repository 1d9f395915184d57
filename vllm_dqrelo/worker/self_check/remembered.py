# SPDX-License-Identifier: Apache-2.0
"""Self-checks that passed: a file for each kind of worker, in vLLM's cache folder."""

import hashlib
import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import vllm
from vllm import envs
from vllm.distributed import get_world_group
from vllm.logger import init_logger

import dqrelo_kernels
import vllm_dqrelo
from vllm_dqrelo.messages.self_check import FOLDER, RESULT

if TYPE_CHECKING:
    from vllm_dqrelo.worker.manager import DeltaManager

logger = init_logger(f"vllm.{__name__}")

DRIVER = Path("/proc/driver/nvidia/version")
SOURCES = ("*.py", "*.cpp", "*.h")


@dataclass(frozen=True)
class Remembered:
    """The file of workers like this one.

    Attributes:
        path: of the file; its name is a digest of ``about``.
        about: all that the outcome of a self-check depends on.
    """

    path: Path
    about: dict[str, Any]

    @classmethod
    def of(cls, worker: Any, manager: "DeltaManager") -> "Remembered":
        """The file of a worker."""
        runner, config = worker.model_runner, worker.vllm_config
        sites = manager.sites.by_name.values()
        about = {
            "device": device_name(manager.device),
            "cpu": {k: str(v) for k, v in torch.cpu.get_capabilities().items()},
            "driver": DRIVER.read_text() if DRIVER.exists() else platform.version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "vllm": vllm.__version__,
            "plugin": [manager.options.version, _sources()],
            "native": os.environ.get("DQRELO_NATIVE"),
            "runner": type(runner).__module__,
            "architectures": config.model_config.architectures,
            "dtype": str(config.model_config.dtype),
            "quantization": manager.base.quantization,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "compilation": str(config.compilation_config.mode),
            "parallel": [
                get_world_group().rank_in_group,
                config.parallel_config.tensor_parallel_size,
                config.parallel_config.pipeline_parallel_size,
                config.lora_config.fully_sharded_loras,
            ],
            "room": [
                manager.max_tokens,
                manager.max_loras,
                manager.memory.slots,
                manager.memory.rank,
                manager.memory.arena,
                manager.options.added_tokens,
            ],
            "shapes": sorted(
                {(*site.sizes, site.columns, site.experts) for site in sites}
            ),
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return cls(Path(envs.VLLM_CACHE_ROOT, FOLDER, f"{digest[:32]}.json"), about)

    @property
    def passed(self) -> bool:
        """Whether a self-check of such a worker passed."""
        return self.path.is_file()

    def write(self, line: str) -> None:
        """Remember that a self-check passed; a folder that cannot be written is noted.

        Args:
            line: what was found.
        """
        part = self.path.with_suffix(f".{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps({RESULT: line, **self.about}, indent=1))
            part.replace(self.path)
        except OSError as error:
            logger.warning("dqrelo: the self-check is not remembered: %s", error)


def device_name(device: torch.device) -> str:
    """What users call the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the {platform.machine()} CPU"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """A digest of the code that computes with deltas."""
    hasher = hashlib.sha256()
    for package in (vllm_dqrelo, dqrelo_kernels):
        (folder,) = map(Path, package.__path__)
        for path in sorted(p for kind in SOURCES for p in folder.rglob(kind)):
            hasher.update(path.read_bytes())
    return hasher.hexdigest()
