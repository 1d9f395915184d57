# SPDX-License-Identifier: Apache-2.0
"""The plugin's options, and whether an engine has deltas at all."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_dqrelo.format.need import DEFAULT_MAX_DELTAS

SELF_CHECKS = ("always", "once", "never")


def is_dqrelo(config: Any) -> bool:
    """Whether an engine has deltas.

    Args:
        config: vLLM's ModelConfig or EngineArgs, the arguments of ``vllm serve``, or
            None.
    """
    return getattr(config, "quantization", None) == "dqrelo"


def max_deltas(max_loras: int) -> int:
    """The deltas that one step can mix.

    vLLM's default for ``--max-loras`` is 1, which would serve the deltas one by one.
    ``EngineArgs`` does not tell a default from a given 1: both are the default here.
    """
    return DEFAULT_MAX_DELTAS if max_loras == 1 else max_loras


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"dqrelo": {...}}'``.

    Attributes:
        delta_memory_gib: device memory for resident deltas; by default what
            ``--max-loras`` deltas of ratio 1/8 take.
        added_tokens: the most tokens that a delta may add to the base's vocabulary.
        max_rank: the largest sum of a delta's ranks in one layer; q, k and v are one
            layer, and so are gate and up (of one expert). By default what 4-bit
            factors of two bits a weight have. A worker takes 4 bytes for each rank and
            token of a step.
        host_memory_gib: host memory for deltas that are not read from disk again;
            by default a quarter of what is free once the base is loaded. This and the
            memory above are of each worker, which has its part of a delta.
        self_check: whether a worker checks itself at start: "always", "never", or
            "once" for each kind of device, model and versions.
        version: of the plugin, which sets it.
    """

    delta_memory_gib: float | None = None
    added_tokens: int = 0
    max_rank: int | None = None
    host_memory_gib: float | None = None
    self_check: str = "once"
    version: str = ""

    @classmethod
    def of(cls, additional_config: Mapping[str, Any]) -> "Options":
        """Read and check the options of an engine."""
        given = additional_config.get("dqrelo", {})
        if not isinstance(given, Mapping):
            raise ValueError(
                f"additional_config's dqrelo is {given!r}, expected a JSON object"
            )
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(
                f"additional_config has unknown dqrelo options {unknown}; known: "
                f"{sorted(known - {'version'})}"
            )
        for name in ("delta_memory_gib", "host_memory_gib"):
            value = given.get(name, 0)
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(
                    f"dqrelo option {name} is {value!r}, expected a number of GiB"
                )
        for name, least in (("added_tokens", 0), ("max_rank", 1)):
            value = given.get(name, least)
            if type(value) is not int or value < least:
                raise ValueError(
                    f"dqrelo option {name} is {value!r}, expected a whole number of "
                    f"{least} or more"
                )
        if (value := given.get("self_check", "once")) not in SELF_CHECKS:
            raise ValueError(
                f"dqrelo option self_check is {value!r}, expected "
                f"{', '.join(SELF_CHECKS[:-1])} or {SELF_CHECKS[-1]}"
            )
        return cls(**given)

    @property
    def given(self) -> dict[str, Any]:
        """Those that are not the defaults, without the version."""
        return {
            field.name: value
            for field in fields(self)
            if (value := getattr(self, field.name)) != field.default
            and field.name != "version"
        }
