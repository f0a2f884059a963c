"""Grouped experts as torch operators, one a pass, for Triton's kernels, which are imported when one is first called.

dotmoe_kernels::grouped_ffn           x [T, H] -> y [T, H] over the expert-sorted slots, without a gradient
dotmoe_kernels::grouped_mm            a [S, Kdim], b [E, Kdim, N] -> [S, N]
dotmoe_kernels::grouped_mm_backward   -> da [S, Kdim], db [E, Kdim, N]
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..._backend import use_kernels
from .cpu.products import multiply, multiply_backward


@torch.library.custom_op("dotmoe_kernels::grouped_ffn", mutates_args=())
def grouped_ffn_op(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    reduction: str = "",
    workspace: int | None = None,
) -> Tensor:
    """indices [T, K]; weights [T, K], None: 1. ``reduction``: "rows", "chunks", "dense" or "atomics"; empty: that of ``_tiles``.

    workspace: bytes for the rows [S, columns] of "rows"."""
    from .gpu.forward import grouped_ffn

    return grouped_ffn(x, gate_up_proj, down_proj, indices, weights, activation, reduction, workspace)


@grouped_ffn_op.register_fake
def _(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    reduction: str = "",
    workspace: int | None = None,
) -> Tensor:
    return x.new_empty(x.shape)


def _within(offsets: Tensor, rows: int) -> Tensor:
    """Offsets that never decrease nor leave [0, rows], whatever was given: they are not checked on a GPU, and the kernels write
    where they say."""
    return offsets.clamp(0, rows).cummax(0).values


@torch.library.custom_op("dotmoe_kernels::grouped_mm", mutates_args=())
def grouped_mm_op(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    if not use_kernels(a):  # in a graph
        return multiply(a, b, offsets)
    from .gpu.down import grouped_product

    return grouped_product(a, b, _within(offsets, a.shape[0]))


@grouped_mm_op.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("dotmoe_kernels::grouped_mm_backward", mutates_args=())
def grouped_mm_backward_op(
    grad: Tensor, a: Tensor | None, b: Tensor, offsets: Tensor, needs_a: bool, needs_b: bool
) -> tuple[Tensor, Tensor]:
    """grad [S, N]; each output empty unless needed. ``a`` is None where db is not."""
    if not use_kernels(grad):
        found = multiply_backward(grad, a, b, offsets, needs_a, needs_b)
        return tuple(grad.new_empty(0) if g is None else g for g in found)  # type: ignore[return-value]
    from .gpu.down import grouped_product, weight_gradient

    offsets = _within(offsets, grad.shape[0])
    da = grouped_product(grad, b.transpose(1, 2), offsets) if needs_a else grad.new_empty(0)
    db = weight_gradient(a, grad, offsets, b) if needs_b and a is not None else b.new_empty(0)
    return da, db


@grouped_mm_backward_op.register_fake
def _(grad: Tensor, a: Tensor | None, b: Tensor, offsets: Tensor, needs_a: bool, needs_b: bool) -> tuple[Tensor, Tensor]:
    da = grad.new_empty((grad.shape[0], b.shape[1]) if needs_a else 0)
    return da, torch.empty_like(b) if needs_b and a is not None else b.new_empty(0)
