"""Dispatch: routed pairs -> slots sorted by expert; token rows out to the slots and back.

Slot p serves the routed pair source[p] = t K + j of token[p] = t; expert e owns the slots [offsets[e], offsets[e + 1]). Pairs with
index E are empty slots: they come last, and their rows are zero in outputs and in gradients. The sort is stable, so everything
is deterministic. Cost: a sort of T K small integers and one read and write of the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .._autograd import first_order
from .._checks import (
    compute_dtype,
    require,
    require_float,
    require_indices,
    require_offsets,
    require_range,
    require_same,
    require_shape,
)
from ..reference import Slots

__all__ = ["Slots", "dispatch_tokens", "gather_tokens", "scatter_tokens"]


def dispatch_tokens(indices: Tensor, num_experts: int) -> Slots:
    """Stable counting sort of the routed pairs by expert, with no host synchronisation.

    Args:
        indices: [T, K] int64 or int32 in [0, E]; E marks an empty slot.
        num_experts: E >= 1.

    Returns:
        Slots(token [S] int64, source [S] int64, offsets [E + 1] int32), S = T K.

    Raises:
        ValueError: a wrong rank or dtype, num_experts < 1, indices outside [0, E] (CPU tensors).
    """
    require_indices(indices, "indices", 2, "[T, K]")
    require(isinstance(num_experts, int) and num_experts >= 1, "num_experts", num_experts, "an integer of at least 1")
    require_range(indices, "indices", 0, num_experts)
    return sort_slots(indices, num_experts)


def sort_slots(indices: Tensor, num_experts: int) -> Slots:
    """``dispatch_tokens`` of arguments that were checked."""
    K = indices.shape[1]
    flat = indices.reshape(-1)
    values, source = torch.sort(flat, stable=True)
    bounds = torch.arange(num_experts, dtype=values.dtype, device=values.device)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = torch.searchsorted(values, bounds, right=True, out_int32=True)
    return Slots(torch.div(source, max(K, 1), rounding_mode="floor"), source, offsets)


def _used(slots: Slots) -> Tensor:
    """[S, 1]: false for the slots beyond offsets[E]."""
    return (torch.arange(slots.token.numel(), device=slots.token.device) < slots.offsets[-1])[:, None]


def _check_slots(slots: Slots) -> None:
    require(isinstance(slots, tuple) and len(slots) == 3, "slots", f"a {type(slots).__name__}", "Slots(token, source, offsets)")
    require_indices(slots.token, "slots.token", 1, "[S]")
    require_indices(slots.source, "slots.source", 1, "[S]")
    require_shape(slots.source, "slots.source", tuple(slots.token.shape), "[S]")
    require_offsets(slots.offsets, "slots.offsets", slots.offsets.numel() - 1, slots.token.numel())


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(token, used)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, token).masked_fill_(~used, 0)

    @staticmethod
    @first_order("scatter_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token, used = ctx.saved_tensors
        rows = torch.where(used, grad, 0).to(compute_dtype(grad))
        dx = rows.new_zeros(ctx.num_tokens, grad.shape[1]).index_add_(0, token, rows)
        return dx.to(grad.dtype), None, None


def sum_bags(ys: Tensor, weights: Tensor | None, source: Tensor, num_used: int, num_tokens: int) -> Tensor:
    """The weighted sums of ``gather_tokens`` on a CPU, in one pass over the rows: a token is a bag of its K slots.

    In 16 bits only for unit weights, which the bags would round to the rows' dtype."""
    S = source.numel()
    slot_of = torch.empty_like(source)  # the inverse of source: routed pair -> slot
    slot_of[source] = torch.arange(S)
    bags = slot_of.view(num_tokens, -1)
    padding = None
    if num_used < S:  # the last slot is an empty one then: let it stand for all of them
        bags, padding = torch.where(bags < num_used, bags, S - 1), S - 1
    w = None if weights is None or ys.dtype in (torch.bfloat16, torch.float16) else weights.to(ys.dtype)
    return functional.embedding_bag(bags, ys, per_sample_weights=w, mode="sum", padding_idx=padding)


def fits_bags(ys: Tensor, weights: Tensor | None) -> bool:
    """Whether ``sum_bags`` gives what ``gather_tokens`` promises for these."""
    if ys.device.type != "cpu":
        return False
    return weights is None or ys.dtype in (torch.float32, torch.float64) or bool((weights == 1).all())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ys: Tensor, weights: Tensor | None, token: Tensor, source: Tensor, used: Tensor, T: int) -> Tensor:
        ctx.save_for_backward(ys, weights, token, source, used)
        if T > 0 and source.numel() > 0 and source.numel() % T == 0 and fits_bags(ys, weights):
            return sum_bags(ys, weights, source, int(used.sum()), T)
        rows = torch.where(used, ys, 0).to(compute_dtype(ys))  # [S, H]
        if weights is not None:
            rows = rows * weights.reshape(-1)[source][:, None].to(rows.dtype)
        return rows.new_zeros(T, ys.shape[1]).index_add_(0, token, rows).to(ys.dtype)

    @staticmethod
    @first_order("gather_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ys, weights, token, source, used = ctx.saved_tensors
        rows = grad.index_select(0, token).to(compute_dtype(grad))  # [S, H]
        dys = dweights = None
        if weights is not None and ctx.needs_input_grad[1]:
            dots = (torch.where(used, ys, 0).to(rows.dtype) * rows).sum(1)  # [S]
            dweights = torch.zeros(weights.numel(), dtype=rows.dtype, device=rows.device)
            dweights[source] = dots
            dweights = dweights.view(weights.shape).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            if weights is not None:
                rows = rows * weights.reshape(-1)[source][:, None].to(rows.dtype)
            dys = torch.where(used, rows, 0).to(ys.dtype)
        return dys, dweights, None, None, None, None


def scatter_tokens(x: Tensor, slots: Slots) -> Tensor:
    """xs[p] = x[token[p]]: a copy of each token's row for every expert it visits.

    Args:
        x: [T, H] floating point.
        slots: from ``dispatch_tokens``.

    Returns:
        xs [S, H], dtype of x; the rows of empty slots are zero.

    Raises:
        ValueError: a wrong rank or dtype; on CPU a token outside x, offsets that decrease or leave [0, S].

    Gradient: to x, summed in float32.
    """
    require_float(x, "x", 2, "[T, H]")
    _check_slots(slots)
    require_range(slots.token, "slots.token", 0, x.shape[0] - 1)
    return _Scatter.apply(x, slots.token, _used(slots))


def gather_tokens(ys: Tensor, slots: Slots, weights: Tensor | None = None, *, num_tokens: int | None = None) -> Tensor:
    """y[t] = sum over the slots p of token t of weights[source[p]] ys[p], summed in float32, in a fixed order.

    Args:
        ys: [S, H] floating point; the rows of empty slots are ignored, whatever they hold.
        slots: from ``dispatch_tokens``.
        weights: [T, K] floating point. None: unit weights.
        num_tokens: T, needed only without ``weights`` on a GPU; elsewhere read off ``weights`` or the slots.

    Returns:
        y [T, H], dtype of ys.

    Raises:
        ValueError: a wrong rank, shape or dtype, weights of another number of slots, offsets that decrease or leave [0, S].

    Gradient: to ys and weights.
    """
    require_float(ys, "ys", 2, "[S, H]")
    _check_slots(slots)
    S = slots.token.numel()
    require(ys.shape[0] == S, "ys", f"of shape {list(ys.shape)}", f"[S, H] with S = {S}")
    if weights is not None:
        require_float(weights, "weights", 2, "[T, K]")
        require(weights.numel() == S, "weights", f"of shape {list(weights.shape)}", f"[T, K] with T K = {S}")
        require_same(weights, "weights", ys, "ys", dtype=False)
        T = weights.shape[0]
        require(num_tokens in (None, T), "num_tokens", num_tokens, f"the {T} rows of weights")
    elif num_tokens is not None:
        T = num_tokens
    else:
        require(ys.device.type == "cpu", "num_tokens", None, "the number of tokens T, without weights on a GPU")
        T = int(slots.token.max()) + 1 if S else 0
    require_range(slots.token, "slots.token", 0, T - 1)
    return _Gather.apply(ys, weights, slots.token, slots.source, _used(slots), T)
