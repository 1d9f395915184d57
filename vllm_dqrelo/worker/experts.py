# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: each expert of the base, followed by the deltas of its rows.

A row that chose k experts counts as k rows. Each of them belongs to one expert and to
one delta or the base: a pair of slot and expert replaces the slot of other layers. The
device sorts these rows by expert, and one launch computes all deltas of all experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from dqrelo_kernels import ops as _  # noqa: F401  registers torch.ops.dqrelo
from dqrelo_kernels.rows import ExpertGroups
from dqrelo_kernels.table import SiteDeltas
from vllm_dqrelo.worker import compat
from vllm_dqrelo.worker.step import Step

ACTIVATIONS: dict[MoEActivation, Callable[[torch.Tensor], torch.Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
GATE_UP, DOWN = "gate_up", "down"
WEIGHTS = {GATE_UP: "w13_weight", DOWN: "w2_weight"}  # [experts, N, K]


class DeltaExperts(QuantizeMethodBase):
    """The experts of one layer, with the deltas of their rows.

    A delta adds to the result of each of an expert's two matrices. vLLM's fused kernels
    do not give the result between the two. So the two are multiplied one by one here.

    Args:
        inner: vLLM's method of the layer.
        step: gives the slot of each row.
    """

    def __init__(self, inner: QuantizeMethodBase, step: Step) -> None:
        self.inner = inner
        self.step = step
        self.deltas: dict[str, SiteDeltas] = {}
        self.add: dict[str, Callable[..., None]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("deltas are installed after a model has its weights")

    def install(self, part: str, deltas: SiteDeltas, add: Callable[..., None]) -> None:
        """Add the deltas to one of the two matrices of all experts.

        Args:
            part: GATE_UP or DOWN.
            deltas: table [slots, experts * slices of one expert, Field], slices
                [slices of one expert + 1].
            add: dqrelo::delta_linear_, or an op with the same arguments.
        """
        slices = len(deltas.slices) - 1
        entries = deltas.table.view(-1, slices, deltas.table.shape[-1])
        self.deltas[part] = deltas._replace(table=entries)
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
        """The weighted sum of the outputs of a row's experts.

        Semantics: ``y[m] = sum_e weight_me * down_e(act(gate_e(x[m])) * up_e(x[m]))``.

        Args:
            x: [M, K] float.
            topk_weights: [M, experts of a row] float.
            topk_ids: int, of the same shape.
            shared_experts, shared_experts_input: vLLM calls them itself.
        """
        experts, order = topk_ids.flatten().sort(stable=True)
        rows = order // topk_ids.shape[1]
        count = len(layer.w2_weight)
        numbers = torch.arange(count, device=x.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        slots = len(self.deltas[DOWN].table) // count
        by_row = self.step.tokens.by_row[rows]
        groups = ExpertGroups.of(by_row, experts, slots, count)

        gate, up = self._multiply(GATE_UP, layer, x[rows], ends, groups).chunk(2, -1)
        hidden = ACTIVATIONS[layer.activation](gate) * up
        out = self._multiply(DOWN, layer, hidden, ends, groups)
        out = out[order.argsort()].view(*topk_ids.shape, -1)
        return (out.float() * topk_weights[..., None].float()).sum(1).to(x.dtype)

    def _multiply(
        self,
        part: str,
        layer: Any,
        x: torch.Tensor,
        ends: torch.Tensor,
        groups: ExpertGroups,
    ) -> torch.Tensor:
        """``multiply``, then add the deltas."""
        y = multiply(part, layer, x, ends)
        self.add[part](
            y,
            x.new_empty(len(x), self.step.scratch.shape[1], dtype=torch.float32),
            x,
            *self.deltas[part],
            *groups,
            self.step.tokens.num_active,
        )
        return y


def multiply(
    part: str, layer: Any, x: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """The product of rows and one matrix of the base's experts, or gate and up.

    Semantics: ``y[m] = W_e x[m]`` for ``ends[e - 1] <= m < ends[e]``.

    Args:
        part: GATE_UP or DOWN.
        layer: a RoutedExperts, with weights as vLLM packed them.
        x: [M, K] float.
        ends: int32 [experts].

    Returns:
        [M, N] of the dtype of ``x``.
    """
    weight = getattr(layer, WEIGHTS[part])
    packing = compat.packing_of_experts(layer)
    if packing is None:
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    # vLLM padded each of the three matrices to a multiple of 32.
    width = layer.moe_config.intermediate_size_per_partition
    y = x.new_empty(len(x), weight.shape[1])
    x = F.pad(x, (0, weight.shape[2] - x.shape[1])).contiguous()
    torch.ops.dqrelo.expert_linear_(y, x, weight, ends, packing == "amx")
    if part == DOWN or y.shape[1] == 2 * width:
        return y
    return torch.cat([both[:, :width] for both in y.chunk(2, dim=1)], dim=1)


def refuse(layer: Any) -> None:
    """Refuse experts whose deltas this module does not compute."""
    problem = None
    if layer.moe_config.has_bias:
        problem = "with biases"
    elif layer.apply_router_weight_on_input:
        problem = "that weight the experts' input"
    elif layer.moe_config.activation not in ACTIVATIONS:
        known = ", ".join(activation.value for activation in ACTIVATIONS)
        activation = layer.moe_config.activation.value
        problem = f"with activation {activation}, only {known}"
    if problem:
        raise ValueError(
            f"--quantization dqrelo does not serve mixtures of experts {problem}"
        )
