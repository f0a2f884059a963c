"""Grouped experts: the slots sorted by expert, one product an expert. For prefill and training.

    ys[p] = Down_e (act(Gate_e xs[p]) * (Up_e xs[p])),  p in [offsets[e], offsets[e + 1])

xs [S, H], S = T K. Only experts with slots are read. Cost: 6 S s H flops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..._autograd import first_order, wants_gradient
from ..._backend import use_triton
from ..._checks import compute_dtype, require, require_float, require_offsets, require_same
from ..._tiles import expert_by_expert
from ...dispatch import Slots, fits_bags, gather_tokens, sort_slots, sum_bags
from .. import training as training_gpu
from ..activations import find_activation
from .operators import grouped_ffn_op, grouped_mm_backward_op, grouped_mm_op
from .cpu.padded import padded_ffn, run_lengths
from ..training import training_ffn


def use_kernels(tensor: Tensor) -> bool:
    return use_triton(tensor) and tensor.dtype != torch.float64  # which the matrix units of few GPUs take


def _segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows."""
    bounds = offsets.tolist()
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


def _fits_torch(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped product takes these: on a CPU, rows in steps of 16 bytes, one of the last two strides 1."""
    if a.device.type != "cpu" or a.dtype not in (torch.float32, torch.bfloat16) or not hasattr(functional, "grouped_mm"):
        return False
    step = 16 // a.element_size()
    lined_up = all(t.stride(-1) == 1 and t.stride(-2) % step == 0 for t in (a, b if b.stride(-1) == 1 else b.transpose(-1, -2)))
    return lined_up and a.numel() > 0 and b.shape[2] % step == 0 and a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0


def multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """out[rows of e] = a[rows of e] @ b[e]; rows beyond the last offset are zero."""
    if _fits_torch(a, b):
        out = functional.grouped_mm(a, b, offs=offsets[1:].to(torch.int32))
        out[int(offsets[-1]) :] = 0
        return out
    out = a.new_empty(a.shape[0], b.shape[2])
    end = 0
    for e, start, end in _segments(offsets):
        torch.mm(a[start:end], b[e], out=out[start:end])
    out[end:] = 0
    return out


def multiply_backward(
    grad: Tensor, a: Tensor | None, b: Tensor, offsets: Tensor, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(da, db) of ``multiply``, each only if needed; ``a`` is None where db is not."""
    grad = grad.contiguous()
    da = multiply(grad, b.transpose(1, 2), offsets) if needs_a else None
    if not needs_b or a is None:
        return da, None
    db = torch.zeros_like(b)  # keeps the strides of b
    for e, start, end in _segments(offsets):
        db[e] = a[start:end].T @ grad[start:end]
    return da, db


def _as_operator(tensor: Tensor) -> bool:
    return use_kernels(tensor) or torch.compiler.is_compiling()


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(a if ctx.needs_input_grad[1] else None, b, offsets)
        return grouped_mm_op(a, b, offsets) if _as_operator(a) else multiply(a, b, offsets)

    @staticmethod
    @first_order("grouped_mm")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b, offsets = ctx.saved_tensors
        needs_a, needs_b, _ = ctx.needs_input_grad
        if _as_operator(grad):
            da, db = grouped_mm_backward_op(grad, a, b, offsets, needs_a, needs_b)
            return da if needs_a else None, db if needs_b else None, None
        return *multiply_backward(grad, a, b, offsets, needs_a, needs_b), None


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Grouped product: the rows [offsets[e], offsets[e + 1]) of ``a`` times ``b[e]``.

    Args:
        a: [S, Kdim] floating point.
        b: [E, Kdim, N], any strides, the dtype of ``a``.
        offsets: [E + 1] int32 or int64, a leading 0, not decreasing, 0 <= offsets[E] <= S.

    Returns:
        [S, N] in the dtype of ``a``; rows beyond offsets[E] are zero.

    Raises:
        ValueError: a wrong rank, shape or dtype; on CPU offsets that decrease or leave [0, S].

    Gradient: to a and b. A second derivative is refused.
    """
    require_float(a, "a", 2, "[S, Kdim]")
    require_float(b, "b", 3, "[E, Kdim, N]")
    require_same(b, "b", a, "a")
    require(a.shape[1] == b.shape[1], "b", f"of shape {list(b.shape)}", f"[E, Kdim, N] with Kdim = {a.shape[1]}")
    require_offsets(offsets, "offsets", b.shape[0], a.shape[0])
    return _GroupedMM.apply(a, b, offsets)


def _expert_by_expert(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, slots: Slots, weights: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Each expert from its tokens' rows to their sums while they are in the cache; the [S, H] rows never exist as a whole."""
    y = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device)
    w = weights.reshape(-1)[slots.source][:, None].to(y.dtype)  # [S, 1]
    for e, start, end in _segments(slots.offsets):
        token = slots.token[start:end]
        gate, up = (x.index_select(0, token) @ gate_up_proj[e].T).chunk(2, -1)  # [n, s] each
        rows = act(gate).mul_(up) @ down_proj[e].T
        y.index_add_(0, token, rows.to(y.dtype) * w[start:end])
    return y.to(x.dtype)


def grouped_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    recompute: bool = False,
    workspace: int | None = None,
) -> Tensor:
    """x [T, H] -> [T, H] over the expert-sorted slots; the arguments of ``expert_ffn``, checked there."""
    E = gate_up_proj.shape[0]
    needs_grad = wants_gradient(x, gate_up_proj, down_proj, weights)
    if use_kernels(x):
        arguments = (x, gate_up_proj, down_proj, indices, weights, activation)
        if needs_grad:
            return training_gpu.training_ffn(*arguments, recompute, workspace)
        return grouped_ffn_op(*arguments, "", workspace)
    slots, act = sort_slots(indices, E), find_activation(activation).forward
    if weights is None:
        weights = torch.ones(indices.shape, dtype=torch.float32, device=x.device)
    if not needs_grad:
        if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):
            padded, run = run_lengths(slots, down_proj)
            if run:
                return padded_ffn(x, gate_up_proj, down_proj, slots, indices, weights, act, padded, run)
        if x.device.type == "cpu" and expert_by_expert(x.dtype, indices.numel(), E):
            return _expert_by_expert(x, gate_up_proj, down_proj, slots, weights, act)
        gate, up = multiply(x[slots.token], gate_up_proj.transpose(1, 2), slots.offsets).chunk(2, -1)  # [S, s] each
        ys = multiply(act(gate).mul_(up), down_proj.transpose(1, 2), slots.offsets)
        if indices.numel() > 0 and fits_bags(ys, weights):
            return sum_bags(ys, weights, slots.source, int(slots.offsets[-1]), len(x))
        return gather_tokens(ys, slots, weights)
    return training_ffn(x, gate_up_proj, down_proj, weights, slots, activation, recompute)
