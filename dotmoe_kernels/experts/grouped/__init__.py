"""Grouped experts: the slots sorted by expert, one product an expert. For prefill and training.

    ys[p] = Down_e (act(Gate_e xs[p]) * (Up_e xs[p])),  p in [offsets[e], offsets[e + 1])

xs [S, H], S = T K. Only experts with slots are read. Cost: 6 S s H flops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._autograd import first_order
from ..._backend import is_direct, use_kernels
from ..._checks import require, require_float, require_grid, require_offsets, require_same
from . import cpu
from .cpu.products import multiply, multiply_backward
from .operators import grouped_ffn_op, grouped_mm_backward_op, grouped_mm_op


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
    if use_kernels(b):  # the gradient of b is a tile of a matrix by an expert
        require_grid(b.shape[0], "b", b, "experts")
    return _GroupedMM.apply(a, b, offsets)


def grouped_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    workspace: int | None = None,
) -> Tensor:
    """x [T, H] -> [T, H] over the expert-sorted slots, without a gradient; the arguments of ``expert_ffn``, checked there."""
    arguments = (x, gate_up_proj, down_proj, indices, weights, activation)
    if not use_kernels(x):
        return cpu.grouped_ffn(*arguments)
    if is_direct(*arguments[:5]):
        from .gpu.forward import grouped_ffn as launch

        return launch(*arguments, "", workspace)
    return grouped_ffn_op(*arguments, "", workspace)
