# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: each expert of the base, and the deltas of its rows behind it.

A row that chose k experts counts as k rows, each of which belongs to one expert and,
maybe, to one delta: what is a slot elsewhere is a pair of slot and expert here. They
are sorted by expert on the device, and one launch has all deltas of all experts.
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
from vllm.platforms import current_platform

from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.rows import ExpertGroups
from vllm_dqrelo.step import Step

ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
GATE_UP, DOWN = "gate_up", "down"


class DeltaExperts(FusedMoEMethodBase):
    """The experts of one layer, with the deltas of their rows.

    It is the method of the layer from the start, unlike DeltaMethod: a delta belongs
    between an expert's two matrices, where a fused kernel lets nobody in. On the CPU
    each matrix is what vLLM makes of that of a linear layer, and the experts come one
    after another; elsewhere the layer keeps its weights, and torch multiplies all.

    Args:
        moe: configuration of the layer.

    Attributes:
        on_cpu: whether vLLM's kernels for the CPU have the matrices.
    """

    on_cpu = current_platform.is_cpu()

    def __init__(self, moe: FusedMoEConfig) -> None:
        super().__init__(moe)
        if moe.activation not in ACTIVATIONS or moe.has_bias:
            raise ValueError(
                "--quantization dqrelo has no mixtures of experts with biases or with "
                f"activation {moe.activation.value}, only "
                + ", ".join(known.value for known in ACTIVATIONS)
            )
        self.activation = ACTIVATIONS[moe.activation]
        self.experts = moe.num_local_experts
        self.weights: dict[str, torch.Tensor] = {}  # [experts, N, K]
        self.matrices: dict[str, list[torch.nn.Module]] = {}  # of each expert
        self.step: Step  # by install, before the layer is called
        self.deltas: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self.add: dict[str, Callable[..., None]] = {}

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if layer.apply_router_weight_on_input:
            raise ValueError(
                "--quantization dqrelo has no mixtures of experts that weight the "
                "experts' input"
            )
        UnquantizedFusedMoEMethod.create_weights(self, layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """On the CPU the layer keeps only the shapes of its weights."""
        for part, name in ((GATE_UP, "w13_weight"), (DOWN, "w2_weight")):
            weights = layer.get_parameter(name).data
            if self.on_cpu:
                self.matrices[part] = [_matrix(weight) for weight in weights]
                replace_parameter(layer, name, weights.to("meta"))
            else:
                self.weights[part] = weights

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def install(
        self,
        part: str,
        arena: torch.Tensor,
        table: torch.Tensor,
        slices: torch.Tensor,
        step: Step,
        add: Callable[..., None],
    ) -> None:
        """Put the deltas behind one of the two matrices of all experts.

        Args:
            part: GATE_UP or DOWN.
            arena: uint8 [bytes], see dqrelo_kernels.ops.
            table: int64 [slots, experts * slices of one expert, Field].
            slices: int32 [slices of one expert + 1].
            step: which rows belong to which delta.
            add: the op, dqrelo::delta_linear_ or one with its arguments.
        """
        entries = table.view(-1, len(slices) - 1, table.shape[-1])
        self.deltas[part] = arena, entries, slices
        self.step = step
        self.add[part] = add

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
        numbers = torch.arange(self.experts, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        groups = None
        if not self.step.skips:
            slots = self.deltas[DOWN][1].shape[0] // self.experts
            by_row = self.step.tokens.by_row[rows]
            groups = ExpertGroups.of(by_row, experts, slots, self.experts)

        gate, up = self._multiply(GATE_UP, x[rows], ends, groups).chunk(2, dim=-1)
        hidden = self.activation(gate) * up
        out = self._multiply(DOWN, hidden, ends, groups)
        out = out[order.argsort()].view(*topk_ids.shape, -1)
        return (out.float() * topk_weights[..., None].float()).sum(1).to(x.dtype)

    def _multiply(
        self,
        part: str,
        x: torch.Tensor,
        ends: torch.Tensor,
        groups: ExpertGroups | None,
    ) -> torch.Tensor:
        """Rows ``ends[e - 1]`` to ``ends[e]`` of ``x`` by expert e; then the deltas."""
        y = self._base(part, x, ends)
        if groups is None:
            return y
        arena, table, slices = self.deltas[part]
        self.add[part](
            y,
            x.new_empty(len(x), self.step.scratch.shape[1], dtype=torch.float32),
            x,
            arena,
            table,
            slices,
            groups.rows,
            groups.slots,
            groups.starts,
            self.step.tokens.num_active,
        )
        return y

    def _base(self, part: str, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        if not self.on_cpu:
            return F.grouped_mm(x, self.weights[part].transpose(1, 2), offs=ends)
        last = ends.tolist()
        spans = enumerate(zip([0, *last], last, strict=False))
        return torch.cat(
            [self.multiply(part, e, x[a:b]) for e, (a, b) in spans if b > a]
        )

    def multiply(self, part: str, expert: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` [M, K] by one expert's matrix, or its two: [M, N]."""
        if not self.on_cpu:
            return F.linear(x, self.weights[part][expert])
        matrix: Any = self.matrices[part][expert]
        return matrix.cpu_linear(x, matrix.weight, None)


def _matrix(weight: torch.Tensor) -> torch.nn.Module:
    """A layer [N, K] with the kernel that vLLM chooses for it on the CPU."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer
