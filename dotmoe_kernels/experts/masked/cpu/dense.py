"""The masked path in PyTorch with dense products: the routed FFN, and the forward that alignment learns through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...._autograd import first_order, wants_gradient
from ...activations import find_activation


def expert_mask(indices: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    """R [T, E]: each token's weight for each expert; column E collects the empty slots and is dropped."""
    r = torch.zeros(indices.shape[0], num_experts + 1, dtype=dtype, device=indices.device)
    w = r.new_ones(()).expand(indices.shape) if weights is None else weights.to(dtype)
    return r.scatter_add_(1, indices.long(), w)[:, :num_experts]


def view_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there. A ``down_proj`` without ``has_dense_view`` is copied."""
    E, width, H = gate_up_proj.shape
    r = expert_mask(indices, weights, E, x.dtype)
    gate, up = functional.linear(x, gate_up_proj.reshape(-1, H)).view(-1, E, 2, width // 2).unbind(2)  # [T, E, s] each
    hidden = find_activation(activation).forward(gate)
    if wants_gradient(x, gate_up_proj, weights):
        hidden = hidden * up * r[:, :, None]
    else:
        hidden.mul_(up).mul_(r[:, :, None])
    hidden = hidden.reshape(-1, E * width // 2)  # [T, F]
    if down_proj.transpose(0, 1).is_contiguous():
        return functional.linear(hidden, down_proj.transpose(0, 1).reshape(H, -1))
    return hidden @ down_proj.transpose(1, 2).reshape(-1, H)


def _gates(r: Tensor, expert_of: Tensor) -> Tensor:
    """M R^T [F, T]"""
    return r.T.contiguous().index_select(0, expert_of)


class MaskedFFN(torch.autograd.Function):
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
        expert_of: Tensor,
        activation: str,
        anchor: Tensor | None,
    ) -> Tensor:
        """r [T, E] holds the hard weights; plan and probs only receive gradients. Neurons are rows: R's are then copied whole."""
        gate, up = gate_proj @ x.T, up_proj @ x.T  # [F, T]
        hidden = find_activation(activation).forward(gate).mul_(up)
        hidden *= _gates(r, expert_of)
        weight_grads = any(ctx.needs_input_grad[1:4])
        kept = x if weight_grads else None, gate_proj, up_proj, down_proj, r, expert_of, gate, up, anchor
        ctx.save_for_backward(*kept)
        ctx.activation = activation
        ctx.soft = (None if plan is None else plan.dtype, None if probs is None else probs.dtype)
        return hidden.T @ down_proj.T

    @staticmethod
    @first_order("masked_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_proj, up_proj, down_proj, r, expert_of, gate, up, _ = ctx.saved_tensors
        act = find_activation(ctx.activation)
        need_x, need_gate, need_up, need_down, need_r, need_plan, need_probs = ctx.needs_input_grad[:7]
        a = act.forward(gate)  # [F, T]
        du = down_proj.T @ dy.T  # [F, T], of the masked hidden
        dr = dplan = dprobs = dx = dgate_proj = dup_proj = ddown_proj = None
        space = torch.empty_like(du)  # twice: the pages of a new tensor would cost as much as a pass
        if need_r or need_plan or need_probs:
            dg = torch.mul(du, a, out=space).mul_(up)  # gradient of the gate M R^T
            if need_plan:
                dplan = (dg @ r).to(ctx.soft[0])
            if need_r or need_probs:
                experts = dg.new_zeros(r.shape[1], len(expert_of)).scatter_(0, expert_of.long()[None], 1.0)  # M^T
                segments = (experts @ dg).T  # [T, E]
                dprobs = segments.to(ctx.soft[1]) if need_probs else None
                dr = segments.to(r.dtype) if need_r else None
        if need_x or need_gate or need_up or need_down:
            mask = _gates(r, expert_of)
            if need_down:
                ddown_proj = ((a * up).mul_(mask) @ dy).T
            du *= mask
            del mask
            dgate = act.backward(torch.mul(du, up, out=space), gate)
            dup = du.mul_(a)
            if need_x:
                dx = (dgate.T @ gate_proj).addmm_(dup.T, up_proj)
            if need_gate:
                dgate_proj = dgate @ x
            if need_up:
                dup_proj = dup @ x
        return dx, dgate_proj, dup_proj, ddown_proj, dr, dplan, dprobs, None, None, None
