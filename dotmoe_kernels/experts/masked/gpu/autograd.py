"""The masked path around its kernels: dense products, and what autograd keeps. Triton is imported by the operators, when called.

With frozen weights and experts of equal width ``masked_ffn`` is one autograd step on two operators, without products with the
mask's zeros. Kept for the backward pass: the product [T, 2F] or, to compute it again, x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...._autograd import anchor, first_order, wants_gradient
from ...._tiles import leaves_zeros_out, masked_up_in_triton
from ....dispatch.operators import sort_slots_op
from ..operators import (
    expert_mask_op,
    masked_hidden_op,
    masked_slots_backward_op,
    masked_slots_op,
    masked_view_hidden_op,
    masked_view_up_op,
)


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


def masked_view(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """The routed FFN without a gradient: dense products around one masking pass."""
    E, width, H = gate_up_proj.shape
    r = expert_mask_op(indices, weights, E, torch.float32)
    if masked_up_in_triton(len(x), E) and x.element_size() == 2:
        hidden = masked_view_up_op(x, gate_up_proj, r, activation)
    else:
        hidden = masked_view_hidden_op(functional.linear(x, gate_up_proj.reshape(-1, H)), r, activation)
    if down_proj.transpose(0, 1).is_contiguous():
        return functional.linear(hidden, down_proj.transpose(0, 1).reshape(H, -1))
    return hidden @ down_proj.transpose(1, 2).reshape(-1, H)


def masked(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    expert_of: Tensor,
    indices: Tensor,
    plan: Tensor | None,
    probs: Tensor | None,
    weights: Tensor | None,
    num_experts: int,
    activation: str,
    recompute: bool = False,
    balanced: bool = False,
) -> Tensor:
    """``masked_ffn``, its arguments checked there."""
    r = expert_mask_op(indices, weights, num_experts, x.dtype)
    (T, H), F, K = x.shape, gate_proj.shape[0], indices.shape[1]
    by_slots = balanced and leaves_zeros_out(T, num_experts, F // num_experts, K, H)
    if by_slots and not wants_gradient(gate_proj, up_proj, down_proj):
        routed = expert_of, indices, plan, probs, weights, r
        return masked_by_slots(x, gate_proj, up_proj, down_proj, *routed, activation, recompute and torch.is_grad_enabled())

    def hidden_of(x: Tensor, r: Tensor) -> Tensor:
        gate, up = functional.linear(x, gate_proj), functional.linear(x, up_proj)  # [T, F]
        return masked_hidden_op(gate, up, r, expert_of, plan, probs, activation)

    if recompute and torch.is_grad_enabled():
        hidden = checkpoint(hidden_of, x, r, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden = hidden_of(x, r)
    return functional.linear(hidden, down_proj)
