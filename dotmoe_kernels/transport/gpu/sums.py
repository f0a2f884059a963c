# mypy: disable-error-code="no-untyped-def"
"""What the transport's kernels share: tiles of whole rows, and column sums in a fixed order.

A program owns a run of rows of one layer. Its tile is [BLOCK_F, BLOCK_E] and, where BLOCK_R > 0, a second one [BLOCK_F, BLOCK_R]
of the columns that a power of two leaves over; column sums are kept an element each and added over the tile's rows at the end. The
sums of all programs of a layer, [programs, E], are added by whoever needs them. All in float32; no atomics.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

FLOOR = tl.constexpr(-3.0e38)  # below every exponent, and finite: a difference with -inf is no NaN
TINY = tl.constexpr(1.0e-37)
BLOCK_P = 16  # programs whose column sums are read at a time
SCALARS = ["F", "num_iters", "step", "chunk", "programs", "tol", "safe", "splits"]  # one binary, whatever they are


@triton.jit
def load_columns(ptr, cols, E: tl.constexpr, other):
    return tl.load(ptr + cols, mask=cols < E, other=other)


@triton.jit
def load_rows(x_ptr, rows, cols, end, stride_xf, stride_xe, E: tl.constexpr):
    """A tile [BLOCK_F, BLOCK] in float32; 0 outside the rows below ``end`` and the E columns."""
    inside = (rows < end)[:, None] & (cols < E)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_xf + cols.to(tl.int64)[None, :] * stride_xe
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def exponents(a, cols, inv_tau, g, E: tl.constexpr):
    """A / tau + g; the columns beyond E get -inf."""
    return tl.where((cols < E)[None, :], tl.fma(a, inv_tau, g[None, :]), float("-inf"))


@triton.jit
def sum_programs(partial_ptr, programs, stride_p, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """The sum [BLOCK] of the layer's partial sums [programs, E], in a fixed order."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (cols < E)[None, :]
        at = partial_ptr + p[:, None] * stride_p + cols[None, :]
        total += tl.sum(tl.load(at, mask=inside, other=0.0, cache_modifier=".cg"), axis=0)  # others may have just written them
    return total


@triton.jit
def logsumexp_programs(partial_ptr, programs, stride_p, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """The same for partial sums that were stored as logarithms; a logarithm too."""
    top = tl.full([BLOCK], FLOOR, dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (cols < E)[None, :]
        at = partial_ptr + p[:, None] * stride_p + cols[None, :]
        part = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        top = tl.maximum(top, tl.max(part, axis=0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (cols < E)[None, :]
        at = partial_ptr + p[:, None] * stride_p + cols[None, :]
        part = tl.load(at, mask=inside, other=float("-inf"), cache_modifier=".cg")
        total += tl.sum(tl.exp(part - top[None, :]), axis=0)
    return top + tl.log(total)


@triton.jit
def combine_programs(parts_ptr, programs, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """(top [BLOCK], total [BLOCK]) of the layer's partial sums total * exp(top), [programs, 2, E]. Not as logarithms: far below 0
    one would be known only to its last digits."""
    top = tl.full([BLOCK], FLOOR, dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (cols < E)[None, :]
        part = tl.load(parts_ptr + p[:, None] * 2 * E + cols[None, :], mask=inside, other=float("-inf"))
        top = tl.maximum(top, tl.max(part, axis=0))
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < programs)[:, None] & (cols < E)[None, :]
        at = parts_ptr + p[:, None] * 2 * E + cols[None, :]
        part = tl.load(at, mask=inside, other=float("-inf"))
        total += tl.sum(tl.load(at + E, mask=inside, other=0.0) * tl.exp(part - top[None, :]), axis=0)
    return top, total


@triton.jit
def columns_times(log_s, top, share, cols, E: tl.constexpr):
    """exp(log_s - top) * share, column e of S summing to total * exp(top): the columns of S over their sums, times gbar or c, with
    share = gbar / total or c / total; 0 beyond the E columns.

    The logarithm of a sum is never taken: far below 0 it would be known only to its last digits."""
    inside = (cols < E)[None, :]
    return tl.where(inside, tl.exp(log_s - tl.where(inside, top[None, :], 0.0)) * share[None, :], 0.0)


@triton.jit
def _accumulate_logs(log_s, top, total):
    """Adds exp(log_s) to the running sums total * exp(top), an element each."""
    new_top = tl.maximum(top, log_s)
    return new_top, total * tl.exp(top - new_top) + tl.exp(log_s - new_top)


@triton.jit
def _sum_rows(top, total):
    """The sums over a tile's rows, [BLOCK_F, BLOCK] -> [BLOCK] each."""
    column_top = tl.max(top, axis=0)
    return column_top, tl.sum(total * tl.exp(top - column_top[None, :]), axis=0)


@triton.jit
def add_log_columns(
    a_ptr,
    begin,
    end,
    stride_af,
    stride_ae,
    inv_tau,
    g,
    g_rest,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Column sums total * exp(top) of softmax_e(A / tau + g) over rows begin..end; (top, total) of both column parts."""
    cols = tl.arange(0, BLOCK_E)
    top = tl.full([BLOCK_F, BLOCK_E], FLOOR, dtype=tl.float32)
    total = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        top_rest = tl.full([BLOCK_F, BLOCK_R], FLOOR, dtype=tl.float32)
        total_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        a = load_rows(a_ptr, rows, cols, end, stride_af, stride_ae, E)
        if BLOCK_R > 0:
            a_rest = load_rows(a_ptr, rows, cols_rest, end, stride_af, stride_ae, E)
        y = exponents(a, cols, inv_tau, g, E)
        row_top = tl.max(y, axis=1)
        if BLOCK_R > 0:
            y_rest = exponents(a_rest, cols_rest, inv_tau, g_rest, E)
            row_top = tl.maximum(row_top, tl.max(y_rest, axis=1))
        row_sum = tl.sum(tl.exp(y - row_top[:, None]), axis=1)
        if BLOCK_R > 0:
            row_sum += tl.sum(tl.exp(y_rest - row_top[:, None]), axis=1)
        log_sum = tl.where(inside, tl.log(row_sum), float("inf"))  # a row that is not there adds exp(-inf)
        top, total = _accumulate_logs(y - row_top[:, None] - log_sum[:, None], top, total)
        if BLOCK_R > 0:
            top_rest, total_rest = _accumulate_logs(y_rest - row_top[:, None] - log_sum[:, None], top_rest, total_rest)
    column_top, column_total = _sum_rows(top, total)
    if BLOCK_R > 0:
        column_top_rest, column_total_rest = _sum_rows(top_rest, total_rest)
    else:
        column_top_rest, column_total_rest = column_top, column_total
    return column_top, column_total, column_top_rest, column_total_rest


@triton.jit
def add_columns(
    a_ptr,
    begin,
    end,
    stride_af,
    stride_ae,
    inv_tau,
    g,
    g_rest,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Column sums of softmax_e(A / tau + g) over rows begin..end, of both column parts."""
    cols = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        acc_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        a = load_rows(a_ptr, rows, cols, end, stride_af, stride_ae, E)
        if BLOCK_R > 0:  # both loads in flight before the first use
            a_rest = load_rows(a_ptr, rows, cols_rest, end, stride_af, stride_ae, E)
        y = exponents(a, cols, inv_tau, g, E)
        row_top = tl.max(y, axis=1)
        if BLOCK_R > 0:
            y_rest = exponents(a_rest, cols_rest, inv_tau, g_rest, E)
            row_top = tl.maximum(row_top, tl.max(y_rest, axis=1))
        s = tl.exp(y - row_top[:, None])
        row_sum = tl.sum(s, axis=1)
        if BLOCK_R > 0:
            s_rest = tl.exp(y_rest - row_top[:, None])
            row_sum += tl.sum(s_rest, axis=1)
        scale = tl.where(rows < end, 1.0 / row_sum, 0.0)
        acc = tl.fma(s, scale[:, None], acc)
        if BLOCK_R > 0:
            acc_rest = tl.fma(s_rest, scale[:, None], acc_rest)
    total = tl.sum(acc, axis=0)
    if BLOCK_R > 0:
        total_rest = tl.sum(acc_rest, axis=0)
    else:
        total_rest = total
    return total, total_rest


@triton.jit
def log_ratio(partial_ptr, c_ptr, programs, logarithmic, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """(log(q / c), |q / c - 1|) of the last step's column sums q; both 0 beyond the E columns."""
    c = load_columns(c_ptr, cols, E, 1.0)
    if logarithmic:
        step = logsumexp_programs(partial_ptr, programs, E, cols, E, BLOCK_P, BLOCK) - tl.log(c)
        ratio = tl.exp(step)
    else:
        ratio = sum_programs(partial_ptr, programs, E, cols, E, BLOCK_P, BLOCK) / c
        step = tl.log(tl.where(ratio < TINY, TINY, ratio))  # NaN stays NaN
    return tl.where(cols < E, step, 0.0), tl.where(cols < E, tl.abs(ratio - 1.0), 0.0)


def vector_strides(x: Tensor) -> tuple[int, int, int, int]:
    """(stride_l, stride_f, stride_e, VEC) of x [L, F, E], the first two in units of VEC elements.

    The compiler knows of an argument only whether 16 divides it: at E = 148 a row of float32 is aligned to 16 bytes, and yet its
    loads would go by single elements. VEC is a constant factor that it can see."""
    stride_l, stride_f, stride_e = x.stride()
    vec = gcd(stride_l, stride_f, 16) if stride_e == 1 else 1
    return stride_l // vec, stride_f // vec, stride_e, vec
