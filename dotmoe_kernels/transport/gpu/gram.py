# mypy: disable-error-code="no-untyped-def"
"""The gradient of Sinkhorn at its fixed point, in Triton (``implicit.py`` has the formula): three launches and a small solve.

    stats   r_i = sum_e P_ie, a_i = sum_e P G, and by column q_e = sum_i P_ie and the right side sum_i P_ie (G_ie - a_i / r_i)
    gram    W = P^T diag(1/r) P [E, E], by blocks and by runs of rows; the blocks below the diagonal are copies
    apply   dA_ie = P_ie (G_ie - x_i - y_e) / tau, x = (a - P y) / r

P, G [F, E]; y [E] solves the Laplacian system in float64 by Cholesky, all layers at once and without looking at the result.
Accumulated in float32 (true float32: no TF32), in a fixed order. Cost: two reads of P and G, E / BLOCK_M more of P (from the
cache), F E (E + BLOCK_M) flops, one write.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import device_guard
from ..._tiles import gram_tiles, transport_tiles
from ..cpu.implicit import laplacian
from .sums import SCALARS, load_columns, load_rows, vector_strides


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_stats_kernel(
    plan_ptr,  # [L, F, E]
    grad_ptr,  # [L, F, E], any strides
    r_ptr,  # [L, F] out
    sum_ptr,  # [L, F] out
    partial_ptr,  # [L, programs, 2, E] out: q and the right side
    F,
    chunk,
    stride_gl,
    stride_gf,
    stride_ge,
    E: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Row sums r and a, and the programs' column sums."""
    program = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)
    acc_q = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    acc_b = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        acc_q_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        acc_b_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    p_ptr = plan_ptr + layer * F * E
    gr_ptr = grad_ptr + layer * stride_gl * VEC
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        p = load_rows(p_ptr, rows, cols, end, E, 1, E)
        w = load_rows(gr_ptr, rows, cols, end, stride_gf * VEC, stride_ge, E)
        if BLOCK_R > 0:  # all loads in flight before the first use
            p_rest = load_rows(p_ptr, rows, cols_rest, end, E, 1, E)
            w_rest = load_rows(gr_ptr, rows, cols_rest, end, stride_gf * VEC, stride_ge, E)
        w *= p
        r = tl.sum(p, axis=1)
        a = tl.sum(w, axis=1)
        if BLOCK_R > 0:
            w_rest *= p_rest
            r += tl.sum(p_rest, axis=1)
            a += tl.sum(w_rest, axis=1)
        tl.store(r_ptr + layer * F + rows, r, mask=inside)
        tl.store(sum_ptr + layer * F + rows, a, mask=inside)
        mean = tl.where(inside, a / r, 0.0)
        acc_q += p
        acc_b += w - p * mean[:, None]
        if BLOCK_R > 0:
            acc_q_rest += p_rest
            acc_b_rest += w_rest - p_rest * mean[:, None]
    out_ptr = partial_ptr + (layer * tl.num_programs(0) + program) * 2 * E
    tl.store(out_ptr + cols, tl.sum(acc_q, axis=0), mask=cols < E)
    tl.store(out_ptr + E + cols, tl.sum(acc_b, axis=0), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, tl.sum(acc_q_rest, axis=0), mask=cols_rest < E)
        tl.store(out_ptr + E + cols_rest, tl.sum(acc_b_rest, axis=0), mask=cols_rest < E)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_gram_kernel(
    plan_ptr,  # [L, F, E]
    r_ptr,  # [L, F]
    gram_ptr,  # [L, splits, E, E] out
    F,
    chunk,
    E: tl.constexpr,
    BLOCKS: tl.constexpr,  # column blocks
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of P^T diag(1/r) P over one run of rows."""
    m = tl.program_id(0) // BLOCKS
    n = tl.program_id(0) % BLOCKS
    if m > n:
        return
    split = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    cols_m = m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_n = n * BLOCK_M + tl.arange(0, BLOCK_M)
    p_ptr = plan_ptr + layer * F * E
    begin = split * chunk
    end = tl.minimum(begin + chunk, F)
    acc = tl.zeros([BLOCK_M, BLOCK_M], dtype=tl.float32)
    for first in range(begin, end, BLOCK_K):
        rows = first + tl.arange(0, BLOCK_K)
        r = tl.load(r_ptr + layer * F + rows, mask=rows < end, other=1.0)
        left = load_rows(p_ptr, rows, cols_m, end, E, 1, E) / r[:, None]
        right = load_rows(p_ptr, rows, cols_n, end, E, 1, E)
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    out_ptr = gram_ptr + (layer * tl.num_programs(1) + split) * E * E
    inside = (cols_m < E)[:, None] & (cols_n < E)[None, :]
    tl.store(out_ptr + cols_m[:, None] * E + cols_n[None, :], acc, mask=inside)
    if m < n:
        tl.store(out_ptr + cols_n[None, :] * E + cols_m[:, None], acc, mask=inside)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_apply_kernel(
    x_ptr,  # [L, F, E] the affinity
    tau_ptr,  # [L]
    plan_ptr,  # [L, F, E]
    grad_ptr,  # [L, F, E], any strides
    r_ptr,  # [L, F]
    sum_ptr,  # [L, F]
    y_ptr,  # [L, E]
    da_ptr,  # [L, F, E] out
    xdx_ptr,  # [L, programs] out: sum of X dX
    F,
    chunk,
    stride_xl,
    stride_xf,
    stride_xe,
    stride_gl,
    stride_gf,
    stride_ge,
    E: tl.constexpr,
    VEC: tl.constexpr,
    VEC_G: tl.constexpr,
    NEEDS_TAU: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """dA, elementwise once P y is known."""
    program = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    cols = tl.arange(0, BLOCK_E)
    y = load_columns(y_ptr + layer * E, cols, E, 0.0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        y_rest = load_columns(y_ptr + layer * E, cols_rest, E, 0.0)
    p_ptr = plan_ptr + layer * F * E
    gr_ptr = grad_ptr + layer * stride_gl * VEC_G
    out_ptr = da_ptr + layer * F * E
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    xdx = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        p = load_rows(p_ptr, rows, cols, end, E, 1, E)
        da = load_rows(gr_ptr, rows, cols, end, stride_gf * VEC_G, stride_ge, E)
        if BLOCK_R > 0:
            p_rest = load_rows(p_ptr, rows, cols_rest, end, E, 1, E)
            da_rest = load_rows(gr_ptr, rows, cols_rest, end, stride_gf * VEC_G, stride_ge, E)
        r = tl.load(r_ptr + layer * F + rows, mask=inside, other=1.0)
        a = tl.load(sum_ptr + layer * F + rows, mask=inside, other=0.0)
        py = tl.sum(p * y[None, :], axis=1)
        if BLOCK_R > 0:
            py += tl.sum(p_rest * y_rest[None, :], axis=1)
        xi = (a - py) / r
        da = p * (da - xi[:, None] - y[None, :]) * inv_tau
        here = rows.to(tl.int64)[:, None] * E
        tl.store(out_ptr + here + cols[None, :], da.to(da_ptr.dtype.element_ty), mask=inside[:, None] & (cols < E)[None, :])
        if NEEDS_TAU:
            xdx += tl.sum(load_rows(x_ptr + layer * stride_xl * VEC, rows, cols, end, stride_xf * VEC, stride_xe, E) * da, axis=1)
        if BLOCK_R > 0:
            da_rest = p_rest * (da_rest - xi[:, None] - y_rest[None, :]) * inv_tau
            inside_rest = inside[:, None] & (cols_rest < E)[None, :]
            tl.store(out_ptr + here + cols_rest[None, :], da_rest.to(da_ptr.dtype.element_ty), mask=inside_rest)
            if NEEDS_TAU:
                x_rest = load_rows(x_ptr + layer * stride_xl * VEC, rows, cols_rest, end, stride_xf * VEC, stride_xe, E)
                xdx += tl.sum(x_rest * da_rest, axis=1)
    if NEEDS_TAU:
        tl.store(xdx_ptr + layer * tl.num_programs(0) + program, tl.sum(xdx, axis=0))


def _solve(gram: Tensor, q: Tensor, rhs: Tensor) -> Tensor:
    """y [L, E] of gram [L, E, E], q [L, E], rhs [L, E], in float64; on a GPU nothing here waits for the device."""
    factor = torch.linalg.cholesky_ex(laplacian(gram, q), check_errors=False).L
    rhs = rhs.double()
    rhs = (rhs - rhs.mean(-1, keepdim=True))[..., None]
    half = torch.linalg.solve_triangular(factor, rhs, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)[..., 0]


def implicit_gradient(affinity: Tensor, tau: Tensor, plan: Tensor, grad: Tensor, needs_tau: bool) -> tuple[Tensor, Tensor, Tensor]:
    """affinity, plan, grad [L, F, E], tau [L] -> dA, d capacity [L, E] with <q, dc> = 0, d tau."""
    L, F, E = plan.shape
    new = plan.new_empty
    da = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)  # contiguous
    if L == 0:
        return da, new((L, E)), torch.zeros_like(tau)
    tau = tau.contiguous()
    tiles = transport_tiles(E, "stats", device=plan.device)
    programs, chunk = tiles.split(F, L)
    block, gram_options = gram_tiles(E)
    blocks = triton.cdiv(E, block["BLOCK_M"])
    pairs = blocks * (blocks + 1) // 2
    rows_a_split = max(512, triton.cdiv(triton.cdiv(F, max(1, 2 * tiles.wave // (pairs * L))), 64) * 64)
    splits = triton.cdiv(F, rows_a_split)
    r, w_sum, partial = new((L, F)), new((L, F)), new((L, programs, 2, E))
    gram, xdx = new((L, splits, E, E)), new((L, programs))
    grad_l, grad_f, grad_e, vec_g = vector_strides(grad)
    x_l, x_f, x_e, vec = vector_strides(affinity)
    grad_strides = {"stride_gl": grad_l, "stride_gf": grad_f, "stride_ge": grad_e}
    with device_guard(plan):
        _sinkhorn_stats_kernel[(programs, L)](
            plan, grad, r, w_sum, partial, F, chunk, **grad_strides, E=E, VEC=vec_g, **tiles.blocks, **tiles.options
        )
        _sinkhorn_gram_kernel[(blocks * blocks, splits, L)](
            plan, r, gram, F, rows_a_split, E=E, BLOCKS=blocks, **block, **gram_options
        )
        q, rhs = partial.sum(1).unbind(1)
        y = _solve(gram.sum(1, dtype=torch.float64), q, rhs).to(plan.dtype).contiguous()
        apply_tiles = transport_tiles(E, "apply", device=plan.device)
        _sinkhorn_apply_kernel[(programs, L)](
            affinity,
            tau,
            plan,
            grad,
            r,
            w_sum,
            y,
            da,
            xdx,
            F,
            chunk,
            stride_xl=x_l,
            stride_xf=x_f,
            stride_xe=x_e,
            **grad_strides,
            E=E,
            VEC=vec,
            VEC_G=vec_g,
            NEEDS_TAU=needs_tau,
            **apply_tiles.blocks,
            **apply_tiles.options,
        )
    dtau = -xdx.sum(1) / tau if needs_tau else torch.zeros_like(tau)
    return da, y - (q * y).sum(-1, keepdim=True) / q.sum(-1, keepdim=True), dtau
