"""The masked hidden layer as torch operators, for Triton's kernels, which are imported when one is first called.

    dotmoe_kernels::expert_mask              indices, weights [T, K] -> R [T, E]; gradient to weights
    dotmoe_kernels::masked_view_hidden       product [T, 2F] of the stored order, R -> hidden [T, F]; no gradient
    dotmoe_kernels::masked_view_up           x, gate_up_proj, R -> hidden [T, F], the product included; no gradient
    dotmoe_kernels::masked_hidden            gate, up [T, F], R, expert_of -> hidden [T, F]; straight-through to plan and probs
    dotmoe_kernels::masked_hidden_backward   dhidden -> dgate, dup, dR, dP

The products around them are PyTorch's, which saves and differentiates only what needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..._autograd import wants_gradient
from ..._tiles import leaves_zeros_out, masked_up_in_triton
from .gpu.autograd import masked_by_slots


@torch.library.custom_op("dotmoe_kernels::expert_mask", mutates_args=())
def expert_mask_op(indices: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    from .gpu.hidden import expert_mask

    return expert_mask(indices, weights, num_experts, dtype)


@expert_mask_op.register_fake
def _(indices: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((indices.shape[0], num_experts), dtype=dtype, device=indices.device)


def _save_mask(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    indices, weights, ctx.num_experts, _ = inputs
    ctx.save_for_backward(indices)
    ctx.dtype = None if weights is None else weights.dtype


def _mask_backward(ctx: Any, dr: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    if ctx.dtype is None:
        return None, None, None, None
    padded = functional.pad(dr, (0, 1))  # column E: the empty slots
    return None, padded.gather(1, indices.long()).to(ctx.dtype), None, None


expert_mask_op.register_autograd(_mask_backward, setup_context=_save_mask)


@torch.library.custom_op("dotmoe_kernels::masked_view_hidden", mutates_args=())
def masked_view_hidden_op(product: Tensor, r: Tensor, activation: str) -> Tensor:
    from .gpu.hidden import masked_hidden

    return masked_hidden(product, product, r, None, activation)


@masked_view_hidden_op.register_fake
def _(product: Tensor, r: Tensor, activation: str) -> Tensor:
    return torch.empty((product.shape[0], product.shape[1] // 2), dtype=product.dtype, device=product.device)


@torch.library.custom_op("dotmoe_kernels::masked_view_up", mutates_args=())
def masked_view_up_op(x: Tensor, gate_up_proj: Tensor, r: Tensor, activation: str) -> Tensor:
    from .gpu.hidden import masked_up

    return masked_up(x, gate_up_proj, r, activation)


@masked_view_up_op.register_fake
def _(x: Tensor, gate_up_proj: Tensor, r: Tensor, activation: str) -> Tensor:
    E, width = gate_up_proj.shape[:2]
    return torch.empty((x.shape[0], E * (width // 2)), dtype=x.dtype, device=x.device)


@torch.library.custom_op("dotmoe_kernels::masked_hidden", mutates_args=())
def masked_hidden_op(
    gate: Tensor, up: Tensor, r: Tensor, expert_of: Tensor, plan: Tensor | None, probs: Tensor | None, activation: str
) -> Tensor:
    """plan [F, E] and probs [T, E] only receive gradients."""
    from .gpu.hidden import masked_hidden

    return masked_hidden(gate, up, r, expert_of, activation)


@masked_hidden_op.register_fake
def _(gate: Tensor, up: Tensor, r: Tensor, expert_of: Tensor, plan: Tensor | None, probs: Tensor | None, activation: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("dotmoe_kernels::masked_hidden_backward", mutates_args=())
def masked_hidden_backward_op(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    r: Tensor,
    expert_of: Tensor,
    activation: str,
    needs_gate: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .gpu.gradients import masked_hidden_backward

    return masked_hidden_backward(grad, gate, up, r, expert_of, activation, needs_gate, needs_r, needs_plan)


@masked_hidden_backward_op.register_fake
def _(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    r: Tensor,
    expert_of: Tensor,
    activation: str,
    needs_gate: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (T, F), E = gate.shape, r.shape[1]
    new = gate.new_empty
    dr, dplan = (new(shape, dtype=torch.float32) for shape in ((T, E) if needs_r else 0, (F, E) if needs_plan else 0))
    return new((T, F) if needs_gate else 0), new((T, F) if needs_gate else 0), dr, dplan


def _save_hidden(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, r, expert_of, plan, probs, ctx.activation = inputs
    ctx.save_for_backward(gate, up, r, expert_of)
    ctx.dtypes = [None if t is None else t.dtype for t in (r, plan, probs)]


def _hidden_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_gate, need_up, need_r, _, need_plan, need_probs, _ = ctx.needs_input_grad
    dgate, dup, dr, dplan = masked_hidden_backward_op(
        grad, *ctx.saved_tensors, ctx.activation, need_gate or need_up, need_r or need_probs, need_plan
    )
    r_dtype, plan_dtype, probs_dtype = ctx.dtypes
    return (
        dgate if need_gate else None,
        dup if need_up else None,
        dr.to(r_dtype) if need_r else None,
        None,
        dplan.to(plan_dtype) if need_plan else None,
        dr.to(probs_dtype, copy=bool(need_r)) if need_probs else None,
        None,
    )


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("masked_ffn has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


masked_hidden_op.register_autograd(_hidden_backward, setup_context=_save_hidden)
masked_hidden_backward_op.register_autograd(_refuse)


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
