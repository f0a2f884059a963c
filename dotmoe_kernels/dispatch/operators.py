"""Dispatch as torch operators, one a launch or a few: Triton's kernels where they run, plain PyTorch elsewhere.

    dotmoe_kernels::sort_slots            indices [T, K] -> token [S], source [S], offsets [E + 1], slot_of [T, K] int32
    dotmoe_kernels::inverse_slots         source [S] -> slot_of [S] int32, its inverse: routed pair -> slot
    dotmoe_kernels::scatter_rows          xs[slot_of[t, j]] = x[t]
    dotmoe_kernels::gather_rows           y[t] = sum_j weights[t, j] ys[slot_of[t, j]]

and the backward passes of the last two. A slot of at least offsets[E] is empty: read as zeros, written as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._backend import use_triton
from . import cpu


@torch.library.custom_op("dotmoe_kernels::sort_slots", mutates_args=())
def sort_slots_op(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> token [S] int64, source [S] int64, offsets [E + 1] int32, slot_of [T, K] int32."""
    if use_triton(indices):
        from .gpu import sort

        if num_experts <= sort.MOST_EXPERTS:
            return sort.sort_slots(indices, num_experts)
    token, source, offsets = cpu.sort_slots(indices, num_experts)
    return token, source, offsets, cpu.inverse(source).view(indices.shape)


@sort_slots_op.register_fake
def _(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = indices.numel()
    new = indices.new_empty
    return (
        new(S, dtype=torch.int64),
        new(S, dtype=torch.int64),
        new(num_experts + 1, dtype=torch.int32),
        new(indices.shape, dtype=torch.int32),
    )


@torch.library.custom_op("dotmoe_kernels::inverse_slots", mutates_args=())
def inverse_op(source: Tensor) -> Tensor:
    if not use_triton(source):
        return cpu.inverse(source)
    from .gpu import sort

    return sort.inverse(source)


@inverse_op.register_fake
def _(source: Tensor) -> Tensor:
    return source.new_empty(source.shape, dtype=torch.int32)


@torch.library.custom_op("dotmoe_kernels::scatter_rows", mutates_args=())
def scatter_op(x: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    """x [T, H], slot_of [T, K] -> xs [S, H]"""
    if not use_triton(x):
        return cpu.scatter_rows(x, slot_of, offsets)
    from .gpu import rows

    return rows.scatter_rows(x, slot_of, offsets)


@scatter_op.register_fake
def _(x: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(slot_of.numel(), x.shape[1])


@torch.library.custom_op("dotmoe_kernels::scatter_rows_backward", mutates_args=())
def scatter_backward_op(grad: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    """dxs [S, H] -> dx [T, H]: the sum of a token's K rows, in float32, in the order of j."""
    if not use_triton(grad):
        return cpu.gather_rows(grad, None, slot_of, offsets)
    from .gpu import rows

    return rows.gather_rows(grad, None, slot_of, offsets)


@scatter_backward_op.register_fake
def _(grad: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    return grad.new_empty(slot_of.shape[0], grad.shape[1])


@torch.library.custom_op("dotmoe_kernels::gather_rows", mutates_args=())
def gather_op(ys: Tensor, weights: Tensor | None, slot_of: Tensor, offsets: Tensor) -> Tensor:
    """ys [S, H], weights [T, K] -> y [T, H], summed in float32 in the order of j."""
    if not use_triton(ys):
        return cpu.gather_rows(ys, weights, slot_of, offsets)
    from .gpu import rows

    return rows.gather_rows(ys, weights, slot_of, offsets)


@gather_op.register_fake
def _(ys: Tensor, weights: Tensor | None, slot_of: Tensor, offsets: Tensor) -> Tensor:
    return ys.new_empty(slot_of.shape[0], ys.shape[1])


@torch.library.custom_op("dotmoe_kernels::gather_rows_backward", mutates_args=())
def gather_backward_op(
    grad: Tensor, ys: Tensor | None, weights: Tensor | None, slot_of: Tensor, offsets: Tensor, needs_ys: bool
) -> tuple[Tensor, Tensor]:
    """dy [T, H] -> dys [S, H], dweights [T, K]; the first empty unless needed, the second where ys or weights is None."""
    if not use_triton(grad):
        return cpu.gather_rows_backward(grad, ys, weights, slot_of, offsets, needs_ys)
    from .gpu import rows

    return rows.gather_rows_backward(grad, ys, weights, slot_of, offsets, needs_ys)


@gather_backward_op.register_fake
def _(
    grad: Tensor, ys: Tensor | None, weights: Tensor | None, slot_of: Tensor, offsets: Tensor, needs_ys: bool
) -> tuple[Tensor, Tensor]:
    dys = grad.new_empty((slot_of.numel(), grad.shape[1]) if needs_ys else 0)
    if ys is None or weights is None:
        return dys, grad.new_empty(0)
    return dys, weights.new_empty(weights.shape)


# --- gradients ----------------------------------------------------------------------------------------------------------


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return scatter_backward_op(grad, *ctx.saved_tensors), None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ys, weights, slot_of, offsets = inputs
    keep = weights is not None and ctx.needs_input_grad[1]  # otherwise the rows need not live on
    ctx.save_for_backward(ys if keep else None, weights, slot_of, offsets)


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    ys, weights, slot_of, offsets = ctx.saved_tensors
    needs_ys = bool(ctx.needs_input_grad[0])
    dys, dweights = gather_backward_op(grad, ys, weights, slot_of, offsets, needs_ys)
    return dys if needs_ys else None, dweights if ys is not None else None, None, None


def _refuse(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{name} has no second derivative; differentiate it once, or use dotmoe_kernels.reference")

    return backward


scatter_op.register_autograd(_scatter_backward, setup_context=_save_scatter)
scatter_backward_op.register_autograd(_refuse("scatter_tokens"))
gather_op.register_autograd(_gather_backward, setup_context=_save_gather)
gather_backward_op.register_autograd(_refuse("gather_tokens"))
