# SPDX-License-Identifier: Apache-2.0
"""``--quantization dqrelo``: a base under deltas, in 16 bits or quantised."""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)


class DqreloConfig(QuantizationConfig):
    """Leaves the base's layers as they are; deltas are put on top once it is loaded."""

    @classmethod
    def get_name(cls) -> str:
        return "dqrelo"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """The own configuration of a quantised base, with our layers in it."""
        own = get_quantization_config(config["quant_method"])
        return _class_of(own).from_config(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return "dqrelo" if user_quant == "dqrelo" else None

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The base's own method. A worker asks for it while it builds the model."""
        own = UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return _under_deltas(layer, own)


class UnderDeltas:
    """Mixed into the class of a quantised base's configuration, before it."""

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        own: Any = super()
        return _under_deltas(layer, own.get_quant_method(layer, prefix))

    def __reduce__(self) -> tuple[Any, ...]:
        """The class is made anew in another process."""
        own = type(self).__bases__[1]
        return _new, (own,), self.__dict__


def _class_of(own: type[QuantizationConfig]) -> Any:
    return type(f"{own.__name__}UnderDeltas", (UnderDeltas, own), {})


def _new(own: type[QuantizationConfig]) -> QuantizationConfig:
    made = _class_of(own)
    return made.__new__(made)


def _under_deltas(
    layer: torch.nn.Module, own: QuantizeMethodBase | None
) -> QuantizeMethodBase | None:
    """See ``base_methods.under_deltas``, which only a worker imports."""
    from vllm_dqrelo.worker.base_methods import under_deltas

    return under_deltas(layer, own)
