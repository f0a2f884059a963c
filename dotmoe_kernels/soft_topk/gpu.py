# mypy: disable-error-code="no-untyped-def"
"""LapSum in Triton, whole rows of up to 512 scores: sort, two scans, solve and values in one kernel; its gradient in another.

    s = r / alpha, descending;   R_i = sum_{s_j >= s_i} e^{s_i - s_j},   L_i = sum_{s_j <= s_i} e^{s_j - s_i}
    sum_j Phi(s_i - s_j) = (elements below) + 1/2 + (R_i - L_i) / 2 says between which neighbours b lies (``cpu.py``)

Scores are sorted in float32; all that follows is in float64, as on a CPU. The backward reads the scores again and the row's
solution (pivot, offset), b = pivot + offset, so no second [T, E] is kept. Cost: one read and one write of [T, E]; about
2 log2(E) exponentials an element for the scans.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import MOST_PLANS, Launch, aligned, device_guard
from .._tiles import soft_top_k_tile


@triton.jit
def _join(s_a, sum_a, s_b, sum_b):
    """Joins two neighbouring runs of a scan: sums measured from the lowest element of each. Commutative, so that it does not matter
    which of the two a scan in reverse hands over first."""
    decay = tl.exp(-tl.abs(s_a - s_b))
    return tl.minimum(s_a, s_b), tl.where(s_a > s_b, sum_a * decay + sum_b, sum_b * decay + sum_a)


@triton.jit
def _at(x, cols, index):
    """x[t, index_t] of a tile, 0 where there is none. [BLOCK_T]"""
    return tl.sum(tl.where(cols[None, :] == index[:, None], x, 0.0), 1)


@triton.jit
def laplace_offset(s, k, cols, E):
    """(pivot, offset) [BLOCK_T] for the descending s [BLOCK_T, BLOCK_E], its first E columns, and k [BLOCK_T]; all float64."""
    inside = (cols < E)[None, :]
    s = tl.where(inside, s, -1.0e300)  # far below, and finite: a difference is no NaN
    one = tl.where(inside, s * 0.0 + 1.0, 0.0)
    _, right = tl.associative_scan((s, one), 1, _join)
    _, left = tl.associative_scan((-s, one), 1, _join, reverse=True)
    phi = (E - 1 - cols).to(tl.float64)[None, :] + 0.5 + (right - left) * 0.5
    m = tl.sum((inside & (phi < (E - k)[:, None])).to(tl.int32), 1)  # elements below b
    upper, lower = _at(s, cols, E - 1 - m), _at(s, cols, E - m)
    log_b = tl.log(tl.maximum(_at(left, cols, E - m), 1.0))
    log_c = tl.log(tl.maximum(_at(right, cols, E - 1 - m), 1.0))
    lowest, highest = m == 0, m == E
    gap = tl.where(lowest | highest, 0.0, upper - lower)
    d = (E - m).to(tl.float64) - k
    q = tl.sqrt(d * d + tl.exp(log_b + log_c - gap))
    above = tl.log(tl.maximum(d + q, 1.0e-300)) - log_c
    below = log_b - tl.log(tl.maximum(q - d, 1.0e-300))
    middle = (gap + log_b - log_c) * 0.5
    offset = tl.where(d > 0, above, tl.where(d < 0, below, middle))
    offset = tl.where(lowest, tl.log(tl.maximum(2 * (E - k), 1.0e-300)) - log_c, offset)
    offset = tl.where(highest, log_b - tl.log(tl.maximum(2 * k, 1.0e-300)), offset)
    return tl.where(lowest | ((d > 0) & (m < E)), upper, lower), offset


@triton.jit
def laplace(z):
    half = 0.5 * tl.exp(-tl.abs(z))
    return tl.where(z <= 0, half, 1 - half)


@triton.jit
def laplace_gradient(r, alpha, pivot, offset, grad, inside):
    """(dr [BLOCK_T, BLOCK_E], dk, dalpha [BLOCK_T]) from dL/dp; all float64."""
    z = (r / alpha[:, None] - pivot[:, None]) - offset[:, None]
    y = tl.where(inside, -tl.abs(z), float("-inf"))
    top = tl.max(y, 1)
    density = tl.exp(y - top[:, None])
    total = tl.sum(density, 1)
    h = density / total[:, None]
    dk = tl.sum(h * grad, 1)
    scale = 0.5 * tl.exp(top) * total / alpha
    dr = scale[:, None] * h * (grad - dk[:, None])
    return dr, dk, -tl.sum(dr * r, 1) / alpha


@triton.jit(do_not_specialize=["T", "E"])
def _soft_top_k_kernel(
    scores_ptr,  # [T, E]
    k_ptr,  # [T] float64
    temperature_ptr,  # [T] float64
    p_ptr,  # [T, E]
    solution_ptr,  # [T, 2] float64
    T,
    E,
    stride_st,
    stride_se,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_E)
    live = rows < T
    inside = live[:, None] & (cols < E)[None, :]
    at = rows[:, None] * stride_st + cols.to(tl.int64)[None, :] * stride_se
    r = tl.load(scores_ptr + at, mask=inside, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + rows, mask=live, other=0.5)
    alpha = tl.load(temperature_ptr + rows, mask=live, other=1.0)
    s = tl.sort(tl.where((cols < E)[None, :], r, float("-inf")), descending=True).to(tl.float64) / alpha[:, None]
    pivot, offset = laplace_offset(s, k, cols, E)
    p = laplace((r.to(tl.float64) / alpha[:, None] - pivot[:, None]) - offset[:, None])
    tl.store(p_ptr + rows[:, None] * E + cols[None, :], p.to(tl.float32), mask=inside)
    tl.store(solution_ptr + 2 * rows, pivot, mask=live)
    tl.store(solution_ptr + 2 * rows + 1, offset, mask=live)


@triton.jit(do_not_specialize=["T", "E"])
def _soft_top_k_backward_kernel(
    scores_ptr,  # [T, E]
    temperature_ptr,  # [T] float64
    solution_ptr,  # [T, 2] float64
    grad_ptr,  # [T, E]
    dscores_ptr,  # [T, E]
    dk_ptr,  # [T] float64
    dtemperature_ptr,  # [T] float64
    T,
    E,
    stride_st,
    stride_se,
    stride_gt,
    stride_ge,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.arange(0, BLOCK_E)
    live = rows < T
    inside = live[:, None] & (cols < E)[None, :]
    col = cols.to(tl.int64)[None, :]
    r = tl.load(scores_ptr + rows[:, None] * stride_st + col * stride_se, mask=inside, other=0.0).to(tl.float64)
    grad = tl.load(grad_ptr + rows[:, None] * stride_gt + col * stride_ge, mask=inside, other=0.0).to(tl.float64)
    alpha = tl.load(temperature_ptr + rows, mask=live, other=1.0)
    pivot = tl.load(solution_ptr + 2 * rows, mask=live, other=0.0)
    offset = tl.load(solution_ptr + 2 * rows + 1, mask=live, other=0.0)
    dr, dk, dalpha = laplace_gradient(r, alpha, pivot, offset, grad, (cols < E)[None, :])
    tl.store(dscores_ptr + rows[:, None] * E + col, dr.to(tl.float32), mask=inside)
    tl.store(dk_ptr + rows, dk, mask=live)
    tl.store(dtemperature_ptr + rows, dalpha, mask=live)


@lru_cache(maxsize=MOST_PLANS)
def _plan(shape: tuple[int, int], strides: tuple[int, int], keep: bool, *types: object) -> Launch:
    """Of scores [T, E]; ``types``: what else the kernel is compiled for."""
    (T, E), (tile, options) = shape, soft_top_k_tile(shape[1])
    return Launch(_soft_top_k_kernel, (triton.cdiv(T, tile["BLOCK_T"]),), (T, E, *strides), tile, options, keep=keep)


def forward(scores: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """scores [T, E] any strides, k and temperature [T] float64 -> p [T, E] float32, solution [T, 2] float64."""
    T, E = scores.shape
    p = torch.empty((T, E), dtype=torch.float32, device=scores.device)
    solution = torch.empty((T, 2), dtype=torch.float64, device=scores.device)
    if T:
        k, temperature = k.contiguous(), temperature.contiguous()
        launch = _plan(scores.shape, scores.stride(), aligned(scores, k, temperature), scores.device, scores.dtype)
        with device_guard(scores):
            launch(scores, k, temperature, p, solution)
    return p, solution


def backward(scores: Tensor, temperature: Tensor, solution: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dscores [T, E] in the dtype of the scores, dk [T], dtemperature [T] float64."""
    T, E = scores.shape
    dscores = torch.empty((T, E), dtype=scores.dtype, device=scores.device)
    dk, dtemperature = (torch.empty(T, dtype=torch.float64, device=scores.device) for _ in range(2))
    tile, options = soft_top_k_tile(E)
    if T:
        with device_guard(scores):
            _soft_top_k_backward_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
                scores,
                temperature.contiguous(),
                solution,
                grad,
                dscores,
                dk,
                dtemperature,
                T,
                E,
                *scores.stride(),
                *grad.stride(),
                **tile,
                **options,
            )
    return dscores, dk, dtemperature
