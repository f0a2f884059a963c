"""``masked_ffn`` on a GPU with frozen weights and experts of equal width: one autograd step on two operators, without products
with the mask's zeros. Kept for the backward pass: the product [T, 2F] or, to compute it again, x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...._autograd import anchor, first_order
from ....dispatch.operators import sort_slots_op
from ..operators_slots import masked_slots_backward_op, masked_slots_op


class _SlotsMaskedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        r: Tensor,
        plan: Tensor | None,
        probs: Tensor | None,
        weights: Tensor | None,
        order: Tensor,
        starts: Tensor,
        indices: Tensor,
        token: Tensor,
        source: Tensor,
        offsets: Tensor,
        slot_of: Tensor,
        activation: str,
        recompute: bool,
        anchor: Tensor | None,
    ) -> Tensor:
        """r [T, E] receives the gradient of the weights [T, K]; plan and probs only receive gradients."""
        routed = weights, order, starts, indices, token, source, offsets, slot_of
        y, product = masked_slots_op(x, gate_proj, up_proj, down_proj, *routed, activation)
        kept = (x, None) if recompute else (None, product)
        ctx.save_for_backward(*kept, gate_proj, up_proj, down_proj, r, *routed, anchor)
        ctx.activation = activation
        ctx.dtypes = [None if t is None else t.dtype for t in (r, plan, probs)]
        return y

    @staticmethod
    @first_order("masked_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, _, _, _, need_r, need_plan, need_probs = ctx.needs_input_grad[:7]
        needs = need_x, need_r or need_probs, need_plan
        dx, dr, dplan = masked_slots_backward_op(dy, *ctx.saved_tensors[:-1], ctx.activation, *needs)
        r_dtype, plan_dtype, probs_dtype = ctx.dtypes
        soft = dr.to(r_dtype) if need_r else None, dplan.to(plan_dtype) if need_plan else None
        return dx if need_x else None, None, None, None, *soft, dr.to(probs_dtype) if need_probs else None, *([None] * 11)


def masked_by_slots(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    expert_of: Tensor,
    indices: Tensor,
    plan: Tensor | None,
    probs: Tensor | None,
    weights: Tensor | None,
    r: Tensor,
    activation: str,
    recompute: bool = False,
) -> Tensor:
    """``masked_ffn``, its arguments checked there; r [T, E] the mask of the weights, with their gradient."""
    E = r.shape[1]
    order, _, starts, _ = sort_slots_op(expert_of[:, None], E)  # neurons as tokens of one slot
    token, source, offsets, slot_of = sort_slots_op(indices, E)
    slots = indices, token.int(), source.int(), offsets, slot_of
    weights = None if weights is None else weights.detach()
    soft, options = (r, plan, probs, weights), (activation, recompute, anchor(x))
    return _SlotsMaskedFFN.apply(x, gate_proj, up_proj, down_proj, *soft, order.int(), starts, *slots, *options)
