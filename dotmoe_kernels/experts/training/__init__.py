"""The routed FFN in Triton where a gradient is needed: the formulas of ``training.py`` as one autograd step on two operators.

Kept for the backward pass: z = (g, u) [S, 2s], the routing in int32, and x [T, H] where gate_up_proj learns; with ``recompute`` x
and the routing alone. Sums of [S, H] rows, y and dx, are made some columns at a time in a workspace of bounded size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._autograd import first_order
from ...dispatch.operators import sort_slots_op
from .operators import grouped_ffn_backward_op, grouped_ffn_training_op


class _TrainingFFN(torch.autograd.Function):
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
    token, source, offsets, slot_of = sort_slots_op(indices, gate_up_proj.shape[0])
    slots = token.int(), source.int(), offsets, slot_of
    return _TrainingFFN.apply(x, gate_up_proj, down_proj, weights, *slots, activation, recompute, workspace)
