"""The masked hidden layer as torch operators, for Triton's kernels, which are imported when one is first called.

    dotmoe_kernels::expert_mask              indices, weights [T, K] -> R [T, E]; gradient to weights
    dotmoe_kernels::masked_view_hidden       product [T, 2F] of the stored order, R -> hidden [T, F]; no gradient
    dotmoe_kernels::masked_view_up           x, gate_up_proj, R -> hidden [T, F], the product included; no gradient
    dotmoe_kernels::masked_hidden            gate, up [T, F], R, expert_of -> hidden [T, F]; straight-through to plan and probs
    dotmoe_kernels::masked_hidden_backward   dhidden -> dgate, dup, dR, dP
    dotmoe_kernels::masked_slots             x [T, H] -> y [T, H], product [T, 2F]: without the products with the mask's zeros
    dotmoe_kernels::masked_slots_backward    dy [T, H] -> dx, dR, dP

The products around them are PyTorch's, which saves and differentiates only what needs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


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


@torch.library.custom_op("dotmoe_kernels::masked_slots", mutates_args=())
def masked_slots_op(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    from .gpu.slots import forward

    routed = order, starts, indices, token, source, offsets, slot_of
    return forward(x, gate_proj, up_proj, down_proj, weights, *routed, activation)


@masked_slots_op.register_fake
def _(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 2 * gate_proj.shape[0])


@torch.library.custom_op("dotmoe_kernels::masked_slots_backward", mutates_args=())
def masked_slots_backward_op(
    dy: Tensor,
    x: Tensor | None,
    product: Tensor | None,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    r: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    needs_x: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Each output empty unless needed; x or the product may be None."""
    from .gpu.slots import backward

    tensors = dy, x, product, gate_proj, up_proj, down_proj, r, weights, order, starts, indices, token, source, offsets, slot_of
    return backward(*tensors, activation, needs_x, needs_r, needs_plan)


@masked_slots_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    product: Tensor | None,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    r: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    needs_x: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    def new(needed: bool, *shape: int) -> Tensor:
        return dy.new_empty(shape if needed else 0, dtype=torch.float32)

    (T, E), F = r.shape, gate_proj.shape[0]
    return dy.new_empty(dy.shape if needs_x else 0), new(needs_r, T, E), new(needs_plan, F, E)
