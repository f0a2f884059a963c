"""The training pass of the grouped path as torch operators, for Triton's kernels, which are imported when one is first called.

dotmoe_kernels::grouped_ffn_training   x [T, H] -> y [T, H], z [S, 2s]: gate and up before the activation
dotmoe_kernels::grouped_ffn_backward   dy [T, H] -> dx, dgate_up_proj, ddown_proj, dweights
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("dotmoe_kernels::grouped_ffn_training", mutates_args=())
def grouped_ffn_training_op(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    token: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    keep: bool,
    workspace: int | None,
) -> tuple[Tensor, Tensor]:
    """z is empty unless ``keep``; its rows from offsets[E] on hold nothing. workspace: bytes for rows [S, columns] to be summed."""
    from .gpu import forward

    return forward(x, gate_up_proj, down_proj, weights, token, offsets, slot_of, activation, keep, workspace)


@grouped_ffn_training_op.register_fake
def _(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    token: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    keep: bool,
    workspace: int | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((token.shape[0], gate_up_proj.shape[1]) if keep else 0)


@torch.library.custom_op("dotmoe_kernels::grouped_ffn_backward", mutates_args=())
def grouped_ffn_backward_op(
    dy: Tensor,
    x: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    z: Tensor | None,
    activation: str,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
    needs_weights: bool,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each output empty unless needed. z None: computed again from x; else x is read for dgate_up_proj alone, and may be None."""
    from .gpu import backward

    needs = needs_x, needs_gate_up, needs_down, needs_weights
    slots = token, source, offsets, slot_of
    dx, dgate_up, ddown, dw = backward(dy, x, gate_up_proj, down_proj, weights, *slots, z, activation, needs, workspace)
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if dgate_up is None else dgate_up,
        dy.new_empty(0) if ddown is None else ddown,
        dy.new_empty(0) if dw is None else dw,
    )


@grouped_ffn_backward_op.register_fake
def _(
    dy: Tensor,
    x: Tensor | None,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    z: Tensor | None,
    activation: str,
    needs_x: bool,
    needs_gate_up: bool,
    needs_down: bool,
    needs_weights: bool,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        dy.new_empty(dy.shape if needs_x else 0),
        torch.empty_like(gate_up_proj) if needs_gate_up else dy.new_empty(0),
        torch.empty_like(down_proj) if needs_down else dy.new_empty(0),
        weights.new_empty(weights.shape) if needs_weights and weights is not None else dy.new_empty(0),
    )
