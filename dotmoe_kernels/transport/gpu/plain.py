# mypy: disable-error-code="no-untyped-def"
"""The plain, log-domain form of the exact adjoint, for the steps whose range the rank-2T form does not bear.

With S = softmax_e(X + g_{t-1}) and Q = S over its column sums: fbar = -Q gbar, gbar <- -S^T fbar, dX gets -(Q gbar + S fbar).
Such are the steps of a cold start with a column far below the others: few, and most calls have none. One program a layer takes them
all, two reads of A each, and returns at once where there are none; what it finds, ``product.py`` adds to dX.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import SCALARS, add_log_columns, columns_times, exponents, load_columns, load_rows, sum_programs


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_adjoint_plain_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    plain_ptr,  # [L]
    partial_ptr,  # [2, L, programs, 2, E]
    uf_ptr,  # [L, T, F] out: fbar of the plain steps
    fbar_ptr,  # [L, F]
    z_ptr,  # [L, T, E] out: gbar / total of the column sums
    v_ptr,  # [L, T, E] out: top of the column sums
    dlogc_ptr,  # [L, E]
    dinit_ptr,  # [L, E]
    F,
    num_iters,
    programs,
    stride_al,
    stride_af,
    stride_ae,
    E: tl.constexpr,
    VEC: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The steps that are not safe in the rank-2T form, all by one program a layer; and d g_0."""
    layer = tl.program_id(0).to(tl.int64)
    layers = tl.num_programs(0)
    steps = tl.load(count_ptr + layer).to(tl.int32)
    plain = tl.load(plain_ptr + layer)
    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    x_ptr = a_ptr + layer * stride_al * VEC
    in_ptr = partial_ptr + (((plain + 1) % 2) * layers + layer) * programs * 2 * E
    cols = tl.arange(0, BLOCK_E)
    gbar = sum_programs(in_ptr, programs, 2 * E, cols, E, BLOCK_P, BLOCK_E)
    dlogc = load_columns(dlogc_ptr + layer * E, cols, E, 0.0)
    dlogc = tl.where(plain < steps, dlogc, 0.0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        gbar_rest = sum_programs(in_ptr, programs, 2 * E, cols_rest, E, BLOCK_P, BLOCK_R)
        dlogc_rest = load_columns(dlogc_ptr + layer * E, cols_rest, E, 0.0)
        dlogc_rest = tl.where(plain < steps, dlogc_rest, 0.0)
    for done in range(0, plain):
        step = plain - done
        at = layer * num_iters + step - 1
        g_ptr = history_ptr + (layer * (num_iters + 1) + step - 1) * E
        g = load_columns(g_ptr, cols, E, 0.0)
        if BLOCK_R > 0:
            g_rest = load_columns(g_ptr, cols_rest, E, 0.0)
        else:
            g_rest = g
        top, total, top_rest, total_rest = add_log_columns(
            x_ptr, 0, F, stride_af * VEC, stride_ae, inv_tau, g, g_rest, E, BLOCK_E, BLOCK_R, BLOCK_F
        )
        dlogc += gbar
        share = tl.where(cols < E, gbar / total, 0.0)
        tl.store(z_ptr + at * E + cols, share, mask=cols < E)
        tl.store(v_ptr + at * E + cols, top, mask=cols < E)
        acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
        if BLOCK_R > 0:
            dlogc_rest += gbar_rest
            share_rest = tl.where(cols_rest < E, gbar_rest / total_rest, 0.0)
            tl.store(z_ptr + at * E + cols_rest, share_rest, mask=cols_rest < E)
            tl.store(v_ptr + at * E + cols_rest, top_rest, mask=cols_rest < E)
            acc_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        for first in range(0, F, BLOCK_F):
            rows = first + tl.arange(0, BLOCK_F)
            inside = rows < F
            y = exponents(load_rows(x_ptr, rows, cols, F, stride_af * VEC, stride_ae, E), cols, inv_tau, g, E)
            row_top = tl.max(y, axis=1)
            if BLOCK_R > 0:
                a_rest = load_rows(x_ptr, rows, cols_rest, F, stride_af * VEC, stride_ae, E)
                y_rest = exponents(a_rest, cols_rest, inv_tau, g_rest, E)
                row_top = tl.maximum(row_top, tl.max(y_rest, axis=1))
            row_sum = tl.sum(tl.exp(y - row_top[:, None]), axis=1)
            if BLOCK_R > 0:
                row_sum += tl.sum(tl.exp(y_rest - row_top[:, None]), axis=1)
            log_s = y - row_top[:, None] - tl.log(row_sum)[:, None]
            q_gbar = columns_times(log_s, top, share, cols, E)
            fbar = -tl.sum(q_gbar, axis=1)
            if BLOCK_R > 0:
                log_s_rest = y_rest - row_top[:, None] - tl.log(row_sum)[:, None]
                fbar -= tl.sum(columns_times(log_s_rest, top_rest, share_rest, cols_rest, E), axis=1)
            if not EXACT_ROWS:
                fbar += tl.load(fbar_ptr + layer * F + rows, mask=rows < tl.where(step == steps, F, 0), other=0.0)
            fbar = tl.where(inside, fbar, 0.0)
            tl.store(uf_ptr + at * F + rows, fbar, mask=inside)
            acc += tl.exp(log_s) * fbar[:, None]
            if BLOCK_R > 0:
                acc_rest += tl.exp(log_s_rest) * fbar[:, None]
        gbar = -tl.sum(acc, axis=0)
        if BLOCK_R > 0:
            gbar_rest = -tl.sum(acc_rest, axis=0)
    tl.store(dinit_ptr + layer * E + cols, gbar, mask=cols < E)
    tl.store(dlogc_ptr + layer * E + cols, dlogc, mask=cols < E)
    if BLOCK_R > 0:
        tl.store(dinit_ptr + layer * E + cols_rest, gbar_rest, mask=cols_rest < E)
        tl.store(dlogc_ptr + layer * E + cols_rest, dlogc_rest, mask=cols_rest < E)


@triton.jit
def add_plain_step(
    dx,
    dx_rest,
    x_ptr,
    rows,
    end,
    stride_af,
    stride_ae,
    inv_tau,
    g_ptr,
    share_ptr,
    top_ptr,
    fbar,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dX - (Q gbar + S fbar) of one plain step."""
    cols = tl.arange(0, BLOCK_E)
    y = exponents(load_rows(x_ptr, rows, cols, end, stride_af, stride_ae, E), cols, inv_tau, load_columns(g_ptr, cols, E, 0.0), E)
    row_top = tl.max(y, axis=1)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        a_rest = load_rows(x_ptr, rows, cols_rest, end, stride_af, stride_ae, E)
        y_rest = exponents(a_rest, cols_rest, inv_tau, load_columns(g_ptr, cols_rest, E, 0.0), E)
        row_top = tl.maximum(row_top, tl.max(y_rest, axis=1))
    row_sum = tl.sum(tl.exp(y - row_top[:, None]), axis=1)
    if BLOCK_R > 0:
        row_sum += tl.sum(tl.exp(y_rest - row_top[:, None]), axis=1)
    log_s = y - row_top[:, None] - tl.log(row_sum)[:, None]
    share = load_columns(share_ptr, cols, E, 0.0)
    dx -= columns_times(log_s, load_columns(top_ptr, cols, E, 0.0), share, cols, E) + tl.exp(log_s) * fbar[:, None]
    if BLOCK_R > 0:
        log_s_rest = y_rest - row_top[:, None] - tl.log(row_sum)[:, None]
        share_rest = load_columns(share_ptr, cols_rest, E, 0.0)
        top_of_rest = load_columns(top_ptr, cols_rest, E, 0.0)
        dx_rest -= columns_times(log_s_rest, top_of_rest, share_rest, cols_rest, E) + tl.exp(log_s_rest) * fbar[:, None]
    return dx, dx_rest
