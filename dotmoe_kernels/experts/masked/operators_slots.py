"""``masked_ffn`` without its mask's zeros as torch operators, for Triton's kernels, which are imported when one is first called.

dotmoe_kernels::masked_slots            x [T, H] -> y [T, H], product [T, 2F]: gate and up in the stored order
dotmoe_kernels::masked_slots_backward   dy [T, H] -> dx, dR, dP
"""

from __future__ import annotations

import torch
from torch import Tensor


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
