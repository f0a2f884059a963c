"""Dispatch without Triton: a NumPy radix sort on a CPU, sums by ``embedding_bag`` there, and plain PyTorch on any device.

NumPy sorts keys of 8 or 16 bits by their digits, in time linear in S; torch.sort compares. The second half is what the operators
do where there is no Triton: whole [T, K, H] arrays, summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .._autograd import first_order
from .._checks import compute_dtype


def sort_slots(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token, source, offsets) of ``Slots``, of indices [T, K] in [0, E]."""
    K = max(indices.shape[1], 1)
    if indices.device.type != "cpu" or num_experts > np.iinfo(np.uint16).max:
        experts = indices.reshape(-1)
        values, order = torch.sort(torch.where((experts >= 0) & (experts < num_experts), experts, num_experts), stable=True)
        bounds = torch.arange(num_experts, dtype=values.dtype, device=values.device)
        ends = torch.zeros(num_experts + 1, dtype=torch.int32, device=values.device)
        ends[1:] = torch.searchsorted(values, bounds, right=True, out_int32=True)
        return torch.div(order, K, rounding_mode="floor"), order, ends
    flat = indices.reshape(-1).numpy()
    source = flat.astype(np.uint8 if num_experts <= np.iinfo(np.uint8).max else np.uint16).argsort(kind="stable")
    offsets = np.zeros(num_experts + 1, dtype=np.int32)
    np.cumsum(np.bincount(flat, minlength=num_experts + 1)[:num_experts], out=offsets[1:])
    return torch.from_numpy(source // K), torch.from_numpy(source), torch.from_numpy(offsets)


def inverse(source: Tensor) -> Tensor:
    """[S] int32: routed pair -> slot."""
    slot_of = torch.empty(source.shape, dtype=torch.int32, device=source.device)
    slot_of[source] = torch.arange(source.numel(), dtype=torch.int32, device=source.device)
    return slot_of


# --- as autograd functions on the slots ---------------------------------------------------------------------------------


def _clear_empty(rows: Tensor, offsets: Tensor) -> Tensor:
    """rows [S, H] with those of the empty slots, which come last, set to zero in place."""
    if rows.device.type == "cpu":  # their number is at hand
        used = int(offsets[-1])
        if used < rows.shape[0]:
            rows[used:] = 0
        return rows
    return rows.masked_fill_((torch.arange(rows.shape[0], device=rows.device) >= offsets[-1])[:, None], 0)


def scatter(x: Tensor, token: Tensor, offsets: Tensor) -> Tensor:
    return _clear_empty(x.index_select(0, token), offsets)


class Scatter(torch.autograd.Function):
    """(x [T, H], token [S], offsets [E + 1]) -> xs [S, H]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(token, offsets)
        ctx.num_tokens = x.shape[0]
        return scatter(x, token, offsets)

    @staticmethod
    @first_order("scatter_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        token, offsets = ctx.saved_tensors
        rows = _clear_empty(grad.to(compute_dtype(grad), copy=True), offsets)
        dx = rows.new_zeros(ctx.num_tokens, grad.shape[1]).index_add_(0, token, rows)
        return dx.to(grad.dtype), None, None


def sum_bags(ys: Tensor, weights: Tensor | None, source: Tensor, num_used: int, num_tokens: int) -> Tensor:
    """The weighted sums of ``gather_tokens`` on a CPU, in one pass over the rows: a token is a bag of its K slots.

    In 16 bits only for unit weights, which the bags would round to the rows' dtype."""
    S = source.numel()
    if ys.shape[1] == 0:  # embedding_bag refuses rows without columns, in some processes
        return ys.new_zeros(num_tokens, 0)
    slot_of = np.empty(S, dtype=np.int64)  # the inverse of source: routed pair -> slot
    slot_of[source.numpy()] = np.arange(S)
    padding = None
    if num_used < S:  # the last slot is an empty one then: let it stand for all of them
        padding = S - 1
        slot_of[slot_of >= num_used] = padding
    bags = torch.from_numpy(slot_of).view(num_tokens, -1)
    w = None if weights is None or ys.dtype in (torch.bfloat16, torch.float16) else weights.to(ys.dtype)
    return functional.embedding_bag(bags, ys, per_sample_weights=w, mode="sum", padding_idx=padding)


def fits_bags(ys: Tensor, weights: Tensor | None) -> bool:
    """Whether ``sum_bags`` gives what ``gather_tokens`` promises for these."""
    if ys.device.type != "cpu":
        return False
    return weights is None or ys.dtype in (torch.float32, torch.float64) or bool((weights == 1).all())


def gather(ys: Tensor, weights: Tensor | None, token: Tensor, source: Tensor, offsets: Tensor, T: int) -> Tensor:
    if source.numel() > 0 and fits_bags(ys, weights):
        return sum_bags(ys, weights, source, int(offsets[-1]), T)
    rows = ys.to(compute_dtype(ys), copy=True)  # [S, H]
    if weights is not None:
        rows.mul_(weights.reshape(-1)[source][:, None].to(rows.dtype))
    return rows.new_zeros(T, ys.shape[1]).index_add_(0, token, _clear_empty(rows, offsets)).to(ys.dtype)


class Gather(torch.autograd.Function):
    """(ys [S, H], weights [T, K] or None, token [S], source [S], offsets [E + 1], T) -> y [T, H]"""

    @staticmethod
    def forward(ctx: Any, ys: Tensor, weights: Tensor | None, token: Tensor, source: Tensor, offsets: Tensor, T: int) -> Tensor:
        ctx.save_for_backward(ys, weights, token, source, offsets)
        return gather(ys, weights, token, source, offsets, T)

    @staticmethod
    @first_order("gather_tokens")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ys, weights, token, source, offsets = ctx.saved_tensors
        rows = _clear_empty(grad.index_select(0, token).to(compute_dtype(grad)), offsets)  # [S, H]
        dys = dweights = None
        if weights is not None and ctx.needs_input_grad[1]:
            products = _clear_empty(ys.to(rows.dtype) * rows, offsets)  # an empty slot may hold anything
            dweights = torch.zeros(weights.numel(), dtype=rows.dtype, device=rows.device)
            dweights[source] = products.sum(1)
            dweights = dweights.view(weights.shape).to(weights.dtype)
        if ctx.needs_input_grad[0]:
            if weights is not None:
                rows = _clear_empty(rows.mul_(weights.reshape(-1)[source][:, None].to(rows.dtype)), offsets)
            dys = rows.to(ys.dtype)
        return dys, dweights, None, None, None, None


# --- as the operators: slot_of [T, K] -----------------------------------------------------------------------------------


def _live(slot_of: Tensor, offsets: Tensor) -> Tensor:
    return (slot_of < offsets[-1])[..., None]  # [T, K, 1]


def _place(rows: Tensor, slot_of: Tensor) -> Tensor:
    """rows [T, K, H] -> [S, H]"""
    out = rows.new_empty(slot_of.numel(), rows.shape[2])
    out[slot_of.reshape(-1)] = rows.reshape(out.shape)
    return out


def scatter_rows(x: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    return _place(torch.where(_live(slot_of, offsets), x[:, None], 0), slot_of)


def gather_rows(ys: Tensor, weights: Tensor | None, slot_of: Tensor, offsets: Tensor) -> Tensor:
    rows = torch.where(_live(slot_of, offsets), ys[slot_of], 0).to(compute_dtype(ys))  # [T, K, H]
    if weights is not None:
        rows = torch.where(_live(slot_of, offsets), rows * weights[..., None].to(rows.dtype), 0)
    return rows.sum(1).to(ys.dtype)


def gather_rows_backward(
    grad: Tensor, ys: Tensor | None, weights: Tensor | None, slot_of: Tensor, offsets: Tensor, needs_ys: bool
) -> tuple[Tensor, Tensor]:
    live, rows = _live(slot_of, offsets), grad[:, None].to(compute_dtype(grad))  # [T, 1, H]
    dys, dweights = grad.new_empty(0), grad.new_empty(0)
    if ys is not None and weights is not None:
        dots = torch.where(live, ys[slot_of].to(rows.dtype) * rows, 0).sum(-1)
        dweights = dots.to(weights.dtype)
    if needs_ys:
        scaled = rows if weights is None else rows * weights[..., None].to(rows.dtype)
        dys = _place(torch.where(live, scaled, 0).to(grad.dtype), slot_of)
    return dys, dweights
