# mypy: disable-error-code="no-untyped-def"
"""The last pass of the exact adjoint: dA = dX / tau, with the rank-2T product of all its steps.

    dX = dX_n - P * sum_t [u_t z_t + u_t fbar_t v_{t-1}] - the shares of the plain steps

dX_n = P (G - sum_e P G) for exact rows, P G for exact columns; u_t, u_t fbar_t [T, F] and z_t, v_{t-1} [T, E] are the steps'.
Accumulated in float32 (true float32: no TF32). Cost: one read of P, G and, where asked for, A; 4 T F E flops; one write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .plain import add_plain_step
from .sums import SCALARS, load_rows

BLOCK_T = 16  # steps of the product at a time


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_adjoint_finish_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    plan_ptr,  # [L, F, E]
    grad_ptr,  # [L, F, E], any strides
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    plain_ptr,  # [L]
    u_ptr,  # [L, T, F]
    uf_ptr,  # [L, T, F]
    z_ptr,  # [L, T, E]
    v_ptr,  # [L, T, E]
    da_ptr,  # [L, F, E] out
    xdx_ptr,  # [L, programs] out: sum of X dX
    F,
    num_iters,
    chunk,
    stride_al,
    stride_af,
    stride_ae,
    stride_gl,
    stride_gf,
    stride_ge,
    E: tl.constexpr,
    VEC: tl.constexpr,
    VEC_G: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    NEEDS_TAU: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """dA = dX / tau: the end's share, the product of rank 2T, and the plain steps."""
    program = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    steps = tl.load(count_ptr + layer).to(tl.int32)
    plain = tl.load(plain_ptr + layer)
    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    cols = tl.arange(0, BLOCK_E)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
    x_ptr = a_ptr + layer * stride_al * VEC
    gr_ptr = grad_ptr + layer * stride_gl * VEC_G
    p_ptr = plan_ptr + layer * F * E
    out_ptr = da_ptr + layer * F * E
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    xdx = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
        if BLOCK_R > 0:
            acc_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        for first_t in range(plain // BLOCK_T * BLOCK_T, steps, BLOCK_T):
            t = first_t + tl.arange(0, BLOCK_T)
            taken = ((t >= plain) & (t < steps))[:, None]
            at = (layer * num_iters + t)[:, None]
            u = tl.load(u_ptr + at * F + rows[None, :], mask=taken & inside[None, :], other=0.0)
            uf = tl.load(uf_ptr + at * F + rows[None, :], mask=taken & inside[None, :], other=0.0)
            z = tl.load(z_ptr + at * E + cols[None, :], mask=taken & (cols < E)[None, :], other=0.0)
            v = tl.load(v_ptr + at * E + cols[None, :], mask=taken & (cols < E)[None, :], other=0.0)
            acc = tl.dot(tl.trans(u), z, acc, input_precision="ieee")
            acc = tl.dot(tl.trans(uf), v, acc, input_precision="ieee")
            if BLOCK_R > 0:
                z_rest = tl.load(z_ptr + at * E + cols_rest[None, :], mask=taken & (cols_rest < E)[None, :], other=0.0)
                v_rest = tl.load(v_ptr + at * E + cols_rest[None, :], mask=taken & (cols_rest < E)[None, :], other=0.0)
                acc_rest = tl.dot(tl.trans(u), z_rest, acc_rest, input_precision="ieee")
                acc_rest = tl.dot(tl.trans(uf), v_rest, acc_rest, input_precision="ieee")
        p = load_rows(p_ptr, rows, cols, end, E, 1, E)
        dx = load_rows(gr_ptr, rows, cols, end, stride_gf * VEC_G, stride_ge, E)
        if BLOCK_R > 0:
            p_rest = load_rows(p_ptr, rows, cols_rest, end, E, 1, E)
            dx_rest = load_rows(gr_ptr, rows, cols_rest, end, stride_gf * VEC_G, stride_ge, E)
            dx_rest *= p_rest
        dx *= p
        if EXACT_ROWS:
            w_sum = tl.sum(dx, axis=1)
            if BLOCK_R > 0:
                w_sum += tl.sum(dx_rest, axis=1)
                dx_rest -= p_rest * w_sum[:, None]
            dx -= p * w_sum[:, None]
        dx -= p * acc
        if BLOCK_R > 0:
            dx_rest -= p_rest * acc_rest
        else:
            dx_rest = dx
        for done in range(0, plain):
            t = plain - 1 - done
            at = layer * num_iters + t
            fbar = tl.load(uf_ptr + at * F + rows, mask=inside, other=0.0)
            dx, dx_rest = add_plain_step(
                dx,
                dx_rest,
                x_ptr,
                rows,
                end,
                stride_af * VEC,
                stride_ae,
                inv_tau,
                history_ptr + (layer * (num_iters + 1) + t) * E,
                z_ptr + at * E,
                v_ptr + at * E,
                fbar,
                E,
                BLOCK_E,
                BLOCK_R,
            )
        da = dx * inv_tau
        here = rows.to(tl.int64)[:, None] * E
        tl.store(out_ptr + here + cols[None, :], da.to(da_ptr.dtype.element_ty), mask=inside[:, None] & (cols < E)[None, :])
        if NEEDS_TAU:
            a = load_rows(x_ptr, rows, cols, end, stride_af * VEC, stride_ae, E)
            xdx += tl.sum(tl.where(inside[:, None] & (cols < E)[None, :], a * da, 0.0), axis=1)
        if BLOCK_R > 0:
            da_rest = dx_rest * inv_tau
            inside_rest = inside[:, None] & (cols_rest < E)[None, :]
            tl.store(out_ptr + here + cols_rest[None, :], da_rest.to(da_ptr.dtype.element_ty), mask=inside_rest)
            if NEEDS_TAU:
                a_rest = load_rows(x_ptr, rows, cols_rest, end, stride_af * VEC, stride_ae, E)
                xdx += tl.sum(tl.where(inside_rest, a_rest * da_rest, 0.0), axis=1)
    if NEEDS_TAU:
        tl.store(xdx_ptr + layer * tl.num_programs(0) + program, tl.sum(xdx, axis=0))
