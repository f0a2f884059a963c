"""The routed FFN where a gradient is needed, over the expert-sorted slots: one autograd step; ``cpu.py`` has the formulas.

In PyTorch what is kept for the backward pass is x [T, H], the routing, and z = (g, u) [S, 2s]. In Triton z, the routing in int32,
and x where gate_up_proj learns; sums of [S, H] rows, y and dx, are made some columns at a time in a workspace of bounded size. With
``recompute`` x and the routing alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._autograd import first_order
from ..._backend import use_kernels
from ...dispatch import sort_slots
from ...dispatch.operators import sort_slots_op
from . import cpu
from .operators import grouped_ffn_backward_op, grouped_ffn_training_op


class _InPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        weights: Tensor,
        source: Tensor,
        offsets: Tensor,
        activation: str,
        recompute: bool,
    ) -> Tensor:
        y, kept = cpu.forward(x, gate_up_proj, down_proj, weights, source, offsets, activation, not recompute)
        ctx.save_for_backward(x, gate_up_proj, down_proj, weights, source, offsets, kept)
        ctx.activation = activation
        return y

    @staticmethod
    @first_order("expert_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up_proj, down_proj, weights, source, offsets, kept = ctx.saved_tensors
        needs = cpu.Needs(*ctx.needs_input_grad[:4])
        found = cpu.backward(dy, x, gate_up_proj, down_proj, weights, source, offsets, kept, ctx.activation, needs)
        return *found, None, None, None, None


class _InTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        weights: Tensor | None,
        token: Tensor,
        source: Tensor,
        offsets: Tensor,
        slot_of: Tensor,
        activation: str,
        recompute: bool,
        workspace: int | None,
    ) -> Tensor:
        y, z = grouped_ffn_training_op(
            x, gate_up_proj, down_proj, weights, token, offsets, slot_of, activation, not recompute, workspace
        )
        again = x if recompute or ctx.needs_input_grad[1] else None
        kept = None if recompute else z
        ctx.save_for_backward(again, gate_up_proj, down_proj, weights, token, source, offsets, slot_of, kept)
        ctx.activation, ctx.workspace = activation, workspace
        return y

    @staticmethod
    @first_order("expert_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        found = grouped_ffn_backward_op(dy, *ctx.saved_tensors, ctx.activation, *needs, ctx.workspace)
        return *(g if n else None for n, g in zip(needs, found, strict=True)), *([None] * 7)


def training_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    recompute: bool = False,
    workspace: int | None = None,
) -> Tensor:
    """x [T, H] -> [T, H]; indices [T, K]; weights [T, K], None: 1; the arguments of ``expert_ffn``, checked there.

    workspace: bytes that rows [S, columns] may take before they are summed to y or dx, at least 128 columns; None: a default."""
    E = gate_up_proj.shape[0]
    if not use_kernels(x):
        slots = sort_slots(indices, E)
        if weights is None:
            weights = torch.ones(indices.shape, dtype=torch.float32, device=x.device)
        return _InPyTorch.apply(x, gate_up_proj, down_proj, weights, slots.source, slots.offsets, activation, recompute)
    token, source, offsets, slot_of = sort_slots_op(indices, E)
    sorted_slots = token.int(), source.int(), offsets, slot_of
    return _InTriton.apply(x, gate_up_proj, down_proj, weights, *sorted_slots, activation, recompute, workspace)
