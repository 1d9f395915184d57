# SPDX-License-Identifier: Apache-2.0
"""What a server must have to serve a delta, from the headers of the delta's files."""

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqrelo_kernels.table import aligned
from vllm_dqrelo.format.checkpoint import BESIDE, SafetensorsFiles, locate
from vllm_dqrelo.format.config import DeltaConfig
from vllm_dqrelo.format.delta import MODEL
from vllm_dqrelo.format.tensor_file import nbytes
from vllm_dqrelo.format.tensors import ADDED, LORA_A, PACKED, SCALE, SHAPE, SUFFIXES

DEFAULT_MAX_DELTAS = 8  # that one step of a server can mix
# Matrices that vLLM multiplies as one, by the ends of their names.
FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
    **dict.fromkeys(("w1", "w3"), "w13"),
}


def layer_of(parameter: str) -> str:
    """The layer of vLLM that a matrix is in: q, k and v are in one layer."""
    module, _, end = parameter.removesuffix(".weight").rpartition(".")
    return f"{module}.{FUSED.get(end, end)}"


@dataclass(frozen=True)
class Need:
    """What one delta takes of a server.

    Attributes:
        config: the delta's delta_config.json.
        ranks: matrix -> the rank of its low-rank part.
        size: bytes in the arena of a server with one worker, as packed.py lays the
            delta out: signs and factors as in the file, a scale for each row, float32
            for what is stored exactly, the start of each tensor aligned.
        added_tokens: that the fine-tune has beyond the base's vocabulary.
        encodes: whether it changes what encodes images, as its names say; that takes
            none of the arena.
    """

    config: DeltaConfig
    ranks: Mapping[str, int]
    size: int
    added_tokens: int
    encodes: bool

    @classmethod
    def of(cls, folder: Path) -> "Need":
        """Read the headers of a delta folder.

        Raises:
            DqreloError: it is damaged. FileNotFoundError: it is not there.
        """
        config = DeltaConfig.read(folder)
        files = SafetensorsFiles(locate(folder, MODEL))
        ranks: dict[str, int] = {}
        size, added, encodes = 0, 0, False
        for name in files:
            dtype, shape = files.spec(name)
            suffix = next((s for s in SUFFIXES if name.endswith(s)), None)
            if BESIDE.search(name):
                encodes = True
                continue
            if suffix == SHAPE:
                continue
            if name.endswith(ADDED):  # rows that have a place already
                added = max(added, *shape[:1])
                continue
            if suffix == LORA_A:
                ranks[name.removesuffix(LORA_A)] = max([0, *shape[:1]])
            planes = name.removesuffix(SCALE) + PACKED
            if suffix == SCALE and planes in files:
                shape = files.spec(planes)[1][:2]
            size += aligned(nbytes(dtype if suffix else "F32", shape))
        return cls(config, ranks, size, added, encodes)

    def rank(self, layer: Callable[[str], Hashable | None] = layer_of) -> int:
        """The largest sum of ranks in one layer.

        Args:
            layer: of a matrix; None for a layer that does not count.
        """
        sums: Counter[Hashable] = Counter()
        for name, rank in self.ranks.items():
            if (key := layer(name)) is not None:
                sums[key] += rank
        return max(sums.values(), default=0)


def gib(size: int) -> float:
    """Bytes as a number of GiB, rounded up to a whole MiB."""
    return math.ceil(size / 2**20) / 1024


def option(options: Mapping[str, Any]) -> str:
    """How ``vllm serve`` is given dqrelo's options."""
    return f"--additional-config '{json.dumps({'dqrelo': options})}'"
