# SPDX-License-Identifier: Apache-2.0
"""``--quantization dqrelo``: a base under deltas, in 16 bits or quantised."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


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
        """Of a base that is quantised: its own configuration, with our layers in it."""
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
        return under_deltas(layer, own)


class UnderDeltas:
    """Mixed into the class of a quantised base's configuration, before it."""

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        own: Any = super()
        return under_deltas(layer, own.get_quant_method(layer, prefix))

    def __reduce__(self) -> tuple[Any, ...]:
        """The class is made anew in another process."""
        own = type(self).__bases__[1]
        return _new, (own,), self.__dict__


def _class_of(own: type[QuantizationConfig]) -> Any:
    return type(f"{own.__name__}UnderDeltas", (UnderDeltas, own), {})


def _new(own: type[QuantizationConfig]) -> QuantizationConfig:
    made = _class_of(own)
    return made.__new__(made)


def refuse_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Refuse a base whose kernels on the CPU do not take activations of ``dtype``.

    They would fail in the first step, or end the process (float16 by integers of 8
    bits, on a CPU with AMX). vLLM itself refuses what is wrong with other formats.

    Args:
        config: quantization_config of the checkpoint.
    """
    amx = torch.cpu.get_capabilities().get("amx_tile", False)
    known = {torch.bfloat16, torch.float16, torch.float32}
    for group in config.get("config_groups", {}).values():
        inputs = group.get("input_activations")
        if group["weights"]["type"] != "int":
            continue
        if inputs is None:
            known -= {torch.float32}
        elif (inputs["type"], inputs["symmetric"], amx) == ("int", True, True):
            known = {torch.bfloat16}
    if dtype not in known:
        names = sorted(str(one).removeprefix("torch.") for one in known)
        raise ValueError(
            f"vLLM's CPU kernels for {config['quant_method']} bases of format "
            f"{config.get('format')} do not compute in {dtype}: give --dtype "
            + " or ".join(names)
        )


def under_deltas(
    layer: torch.nn.Module, own: QuantizeMethodBase | None
) -> QuantizeMethodBase | None:
    """The method of a layer that deltas will be put on; ``own`` is what it would have.

    Raises:
        ValueError: deltas could not be put on it.
    """
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
    )

    from vllm_dqrelo.options import Options
    from vllm_dqrelo.plugin import patch_worker
    from vllm_dqrelo.worker import compat, experts
    from vllm_dqrelo.worker.vocabulary import EnlargedEmbedding

    patch_worker()
    if isinstance(layer, RoutedExperts):
        if own is not None and not isinstance(own, UnquantizedFusedMoEMethod):
            raise ValueError(
                "--quantization dqrelo has no quantised mixtures of experts"
            )
        experts.refuse(layer)
        return compat.method_of_experts(layer.moe_config)
    if not isinstance(layer, VocabParallelEmbedding):
        return own
    unquantized = UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    if own is not None and type(own) not in unquantized:
        raise ValueError(
            "--quantization dqrelo has no quantised embeddings or LM heads"
        )
    options = Options.of(get_current_vllm_config().additional_config)
    return EnlargedEmbedding(options.added_tokens)
