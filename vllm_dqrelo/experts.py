# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: each expert of the base, and the deltas of its rows behind it.

A row that chose k experts counts as k rows, each of which belongs to one expert and,
maybe, to one delta: what is a slot elsewhere is a pair of slot and expert here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEQuantConfig,
)
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import (
    FusedMoEMethodBase,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.utils import replace_parameter

from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.rows import BASE, RowGroups
from vllm_dqrelo.step import Step

ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
GATE_UP, DOWN = "gate_up", "down"


class DeltaExperts(FusedMoEMethodBase):
    """The experts of one layer, one after another, with the deltas of their rows.

    It is the method of the layer from the start, unlike DeltaMethod: a delta belongs
    between an expert's two matrices, where a fused kernel lets nobody in. Each matrix
    is what vLLM makes of that of a linear layer.

    Args:
        moe: configuration of the layer.
    """

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if moe.activation not in ACTIVATIONS or moe.has_bias:
            raise ValueError(
                "--quantization dqrelo has no mixtures of experts with biases or with "
                f"activation {moe.activation.value}, only "
                + ", ".join(known.value for known in ACTIVATIONS)
            )
        self.activation = ACTIVATIONS[moe.activation]
        self.matrices: dict[str, list[torch.nn.Module]] = {}  # of each expert
        self.step: Step  # by install, before the layer is called
        self.deltas: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if layer.apply_router_weight_on_input:
            raise ValueError(
                "--quantization dqrelo has no mixtures of experts that weight the "
                "experts' input"
            )
        UnquantizedFusedMoEMethod.create_weights(self, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Lay each matrix out for vLLM's kernels; the layer keeps only the shapes."""
        for part, name in ((GATE_UP, "w13_weight"), (DOWN, "w2_weight")):
            weights = layer.get_parameter(name).data
            self.matrices[part] = [_matrix(weight) for weight in weights]
            replace_parameter(layer, name, weights.to("meta"))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def install(
        self,
        part: str,
        arena: torch.Tensor,
        table: torch.Tensor,
        slices: torch.Tensor,
        step: Step,
    ) -> None:
        """Put the deltas behind one of the two matrices of all experts.

        Args:
            part: GATE_UP or DOWN.
            arena: uint8 [bytes], see dqrelo_kernels.ops.
            table: int64 [slots, experts * slices of one expert, Field].
            slices: int32 [slices of one expert + 1].
            step: which rows belong to which delta.
        """
        entries = table.view(-1, len(slices) - 1, table.shape[-1])
        self.deltas[part] = arena, entries, slices
        self.step = step

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """The weighted sum of what a row's experts make of it.

        Semantics: ``y[m] = sum_e weight_me * down_e(act(gate_e(x[m])) * up_e(x[m]))``.

        Args:
            x: [M, K] float.
            topk_weights: [M, experts of a row] float.
            topk_ids: int, of the same shape.
            shared_experts, shared_experts_input: vLLM calls them itself.
        """
        experts, order = topk_ids.flatten().sort(stable=True)
        rows = order // topk_ids.shape[1]
        count = len(self.matrices[DOWN])
        ends = experts.bincount(minlength=count).cumsum(0).tolist()
        groups = None if self.step.skips else self._groups(rows, experts, count)

        gate, up = self._multiply(GATE_UP, x[rows], ends, groups).chunk(2, dim=-1)
        hidden = self.activation(gate) * up
        out = self._multiply(DOWN, hidden, ends, groups)
        out = out[order.argsort()].view(*topk_ids.shape, -1)
        return (out.float() * topk_weights[..., None].float()).sum(1).to(x.dtype)

    def _groups(
        self, rows: torch.Tensor, experts: torch.Tensor, count: int
    ) -> RowGroups:
        """Which of the pairs belong to which delta and expert."""
        slots = self.step.tokens.by_row[rows]
        pairs = torch.where(slots == BASE, BASE, slots * count + experts)
        table = self.deltas[DOWN][1]  # [slots * experts, ...]
        groups = RowGroups(len(pairs), len(table), rows.device)
        groups.set(pairs.int().numpy())
        return groups

    def multiply(self, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` [M, K] by one expert's matrix, or its two: [M, N]."""
        matrix: Any = self.matrices[part][expert]
        return matrix.cpu_linear(x, matrix.weight, None)

    def _multiply(
        self, part: str, x: torch.Tensor, ends: list[int], groups: RowGroups | None
    ) -> torch.Tensor:
        """Rows ``ends[e - 1]`` to ``ends[e]`` of ``x`` by expert e; then the deltas."""
        spans = enumerate(zip([0, *ends], ends, strict=False))
        y = torch.cat([self.multiply(part, e, x[a:b]) for e, (a, b) in spans if b > a])
        if groups is None:
            return y
        arena, table, slices = self.deltas[part]
        torch.ops.dqrelo.delta_linear_(
            y,
            self.step.scratch,
            x,
            arena,
            table,
            slices,
            groups.rows,
            groups.slots,
            groups.starts,
            groups.num_active,
        )
        return y


def _matrix(weight: torch.Tensor) -> torch.nn.Module:
    """A layer [N, K] with the kernel that vLLM chooses for it on the CPU."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer
