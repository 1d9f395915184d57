# SPDX-License-Identifier: Apache-2.0
"""``--quantization dqrelo``: a 16-bit base under deltas."""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
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
    def from_config(cls, config: dict[str, Any]) -> "DqreloConfig":
        raise ValueError(
            "--quantization dqrelo needs a base in 16 or 32 bits; this one is "
            f"quantised already ({config.get('quant_method', 'unknown method')})"
        )

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Any, user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        return "dqrelo" if user_quant == "dqrelo" else None

    def get_quant_method(
        self, layer: torch.nn.Module, prefix: str
    ) -> QuantizeMethodBase | None:
        """The base's own method. A worker asks for it while it builds the model."""
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        from vllm_dqrelo.experts import DeltaExperts
        from vllm_dqrelo.options import Options
        from vllm_dqrelo.plugin import patch_worker
        from vllm_dqrelo.vocabulary import EnlargedEmbedding

        patch_worker()
        if isinstance(layer, VocabParallelEmbedding):
            options = Options.from_config(get_current_vllm_config())
            return EnlargedEmbedding(options.added_tokens)
        if isinstance(layer, RoutedExperts):
            return DeltaExperts(layer.moe_config)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
