# SPDX-License-Identifier: Apache-2.0
"""The methods of the base's layers, below the deltas, while a worker builds the model.

The first such method patches its worker, which gets a delta manager.
"""

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_dqrelo.options import Options, is_dqrelo
from vllm_dqrelo.worker import compat, experts
from vllm_dqrelo.worker.calls import CALLS
from vllm_dqrelo.worker.drafter import give_base_layers
from vllm_dqrelo.worker.manager import DeltaManager
from vllm_dqrelo.worker.vocabulary import EnlargedEmbedding


def under_deltas(
    layer: torch.nn.Module, own: QuantizeMethodBase | None
) -> QuantizeMethodBase | None:
    """The method of a layer that deltas will be put on; ``own`` is the layer's own.

    Raises:
        ValueError: deltas could not be put on it.
    """
    patch_worker()
    if isinstance(layer, RoutedExperts):
        if own is not None and not isinstance(own, UnquantizedFusedMoEMethod):
            raise ValueError(
                "--quantization dqrelo does not serve quantised mixtures of experts"
            )
        experts.refuse(layer)
        return compat.method_of_experts(layer.moe_config)
    if not isinstance(layer, VocabParallelEmbedding):
        return own
    unquantized = UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    if own is not None and type(own) not in unquantized:
        raise ValueError(
            "--quantization dqrelo does not serve quantised embeddings or LM heads"
        )
    options = Options.of(get_current_vllm_config().additional_config)
    return EnlargedEmbedding(options.added_tokens)


def patch_worker() -> None:
    """Put the delta manager in the place of LoRA's. Safe to call again."""

    def wanted(vllm_config: VllmConfig) -> bool:
        return is_dqrelo(vllm_config.model_config)

    compat.choose_lora_manager(lambda config: DeltaManager if wanted(config) else None)
    compat.after_drafter_load(
        wanted, lambda manager, model: give_base_layers(model, manager.step)
    )
    for call in CALLS:
        compat.add_worker_call(call)
