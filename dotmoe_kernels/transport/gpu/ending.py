# mypy: disable-error-code="no-untyped-def"
"""The end of a Sinkhorn call in Triton: from the potentials after the last step to the plan and its error.

    final "row":     P = softmax_e(A / tau + g_T)
    final "column":  P_e = c_e softmax_i(A / tau + log u), of the last step's row potentials: by the columns' maxima and totals,
                     since potentials rounded to float32 would miss the sums at a low temperature

One read of A for either, one more before it for the columns, one write of the plan. Accumulated in float32, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .sums import (
    SCALARS,
    add_log_columns,
    columns_times,
    combine_programs,
    exponents,
    load_columns,
    load_rows,
    log_ratio,
)


@triton.jit
def _column_shares(parts_ptr, c_ptr, programs, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """(top, c / total, log(q / c)) of the column sums q = total * exp(top), of all the programs' [programs, 2, E]."""
    top, total = combine_programs(parts_ptr, programs, cols, E, BLOCK_P, BLOCK)
    share = load_columns(c_ptr, cols, E, 0.0) / total
    return top, share, tl.where(cols < E, top - tl.log(share), 0.0)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_columns_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    columns_ptr,  # [L, programs, 2, E] out
    F,
    num_iters,
    chunk,
    stride_al,
    stride_af,
    stride_ae,
    E: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """final "column": the last step's column sums once more, by the columns' maxima, which the plan is taken from."""
    program = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    stopped = tl.load(count_ptr + layer)
    steps = tl.where(stopped > 0, stopped, num_iters)
    cols = tl.arange(0, BLOCK_E)
    g_ptr = history_ptr + (layer * (num_iters + 1) + steps - 1) * E
    g = load_columns(g_ptr, cols, E, 0.0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        g_rest = load_columns(g_ptr, cols_rest, E, 0.0)
    else:
        g_rest = g
    begin = program * chunk
    top, total, top_rest, total_rest = add_log_columns(
        a_ptr + layer * stride_al * VEC,
        begin,
        tl.minimum(begin + chunk, F),
        stride_af * VEC,
        stride_ae,
        1.0 / tl.load(tau_ptr + layer),
        g,
        g_rest,
        E,
        BLOCK_E,
        BLOCK_R,
        BLOCK_F,
    )
    out_ptr = columns_ptr + (layer * tl.num_programs(0) + program) * 2 * E
    tl.store(out_ptr + cols, top, mask=cols < E)
    tl.store(out_ptr + E + cols, total, mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, top_rest, mask=cols_rest < E)
        tl.store(out_ptr + E + cols_rest, total_rest, mask=cols_rest < E)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_plan_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    c_ptr,  # [L, E]
    history_ptr,  # [L, T + 1, E]
    partial_ptr,  # [2, L, programs, E]
    count_ptr,  # [L]
    plan_ptr,  # [L, F, E]
    log_u_ptr,  # [L, F]
    log_v_ptr,  # [L, E]
    columns_ptr,  # [L, programs, 2, E] final "column": top and total of the last step's column sums
    worst_ptr,  # [L, own programs] final "column": the largest row error of each program
    sums_ptr,  # [L, own programs, E] final "row": the plan's column sums
    F,
    num_iters,
    chunk,
    programs,  # of the steps, who left partial and columns
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
    """g_n of the last step taken, and the plan from it."""
    program = tl.program_id(0)
    layers = tl.num_programs(1)
    layer = tl.program_id(1).to(tl.int64)
    stopped = tl.load(count_ptr + layer)
    steps = tl.where(stopped > 0, stopped, num_iters)
    cols = tl.arange(0, BLOCK_E)
    last_ptr = partial_ptr + ((num_iters % 2) * layers + layer) * programs * E
    g_ptr = history_ptr + (layer * (num_iters + 1) + steps) * E
    g_before = load_columns(g_ptr - E, cols, E, 0.0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        g_before_rest = load_columns(g_ptr - E, cols_rest, E, 0.0)
    if not EXACT_ROWS:
        parts_ptr = columns_ptr + layer * programs * 2 * E
        top, share, change = _column_shares(parts_ptr, c_ptr + layer * E, programs, cols, E, BLOCK_P, BLOCK_E)
        g = g_before - change
        if BLOCK_R > 0:
            top_rest, share_rest, change_rest = _column_shares(
                parts_ptr, c_ptr + layer * E, programs, cols_rest, E, BLOCK_P, BLOCK_R
            )
            g_rest = g_before_rest - change_rest
    elif stopped > 0:
        g = load_columns(g_ptr, cols, E, 0.0)
        if BLOCK_R > 0:
            g_rest = load_columns(g_ptr, cols_rest, E, 0.0)
    else:
        change, off = log_ratio(last_ptr, c_ptr + layer * E, programs, num_iters == 1, cols, E, BLOCK_P, BLOCK_E)
        g = g_before - change
        if BLOCK_R > 0:
            change_rest, off_rest = log_ratio(last_ptr, c_ptr + layer * E, programs, num_iters == 1, cols_rest, E, BLOCK_P, BLOCK_R)
            g_rest = g_before_rest - change_rest
    if program == 0:
        tl.store(log_v_ptr + layer * E + cols, g, mask=cols < E)
        if BLOCK_R > 0:
            tl.store(log_v_ptr + layer * E + cols_rest, g_rest, mask=cols_rest < E)
        kept = (stopped > 0) & EXACT_ROWS
        for t in range(tl.where(kept, steps + 1, steps), num_iters + 1):  # what lies beyond a stop is written too
            at = history_ptr + (layer * (num_iters + 1) + t) * E
            tl.store(at + cols, g, mask=cols < E)
            if BLOCK_R > 0:
                tl.store(at + cols_rest, g_rest, mask=cols_rest < E)

    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    x_ptr = a_ptr + layer * stride_al * VEC
    out_ptr = plan_ptr + layer * F * E
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    if EXACT_ROWS:
        g_row = g
        acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    else:
        g_row = g_before
        worst = tl.zeros([BLOCK_F], dtype=tl.float32)
    if BLOCK_R > 0:
        if EXACT_ROWS:
            g_row_rest = g_rest
            acc_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        else:
            g_row_rest = g_before_rest
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        a = load_rows(x_ptr, rows, cols, end, stride_af * VEC, stride_ae, E)
        if BLOCK_R > 0:
            a_rest = load_rows(x_ptr, rows, cols_rest, end, stride_af * VEC, stride_ae, E)
        y = exponents(a, cols, inv_tau, g_row, E)
        row_top = tl.max(y, axis=1)
        if BLOCK_R > 0:
            y_rest = exponents(a_rest, cols_rest, inv_tau, g_row_rest, E)
            row_top = tl.maximum(row_top, tl.max(y_rest, axis=1))
        s = tl.exp(y - row_top[:, None])
        row_sum = tl.sum(s, axis=1)
        if BLOCK_R > 0:
            s_rest = tl.exp(y_rest - row_top[:, None])
            row_sum += tl.sum(s_rest, axis=1)
        log_u = -(row_top + tl.log(row_sum))
        if EXACT_ROWS:
            scale = tl.where(inside, 1.0 / row_sum, 0.0)
            p = s * scale[:, None]
            acc += p
            if BLOCK_R > 0:
                p_rest = s_rest * scale[:, None]
                acc_rest += p_rest
        else:  # the columns' softmax: exp(X + log_u + g) would miss their sums by the rounding of X
            log_sum = tl.log(row_sum)
            p = columns_times(y - row_top[:, None] - log_sum[:, None], top, share, cols, E)
            row_total = tl.sum(p, axis=1)
            if BLOCK_R > 0:
                p_rest = columns_times(y_rest - row_top[:, None] - log_sum[:, None], top_rest, share_rest, cols_rest, E)
                row_total += tl.sum(p_rest, axis=1)
            row_off = tl.where(inside, tl.abs(row_total - 1.0), 0.0)
            worst = tl.where((row_off > worst) | (row_off != row_off), row_off, worst)  # NaN wins
        at = rows.to(tl.int64)[:, None] * E
        tl.store(out_ptr + at + cols[None, :], p, mask=inside[:, None] & (cols < E)[None, :])
        if BLOCK_R > 0:
            tl.store(out_ptr + at + cols_rest[None, :], p_rest, mask=inside[:, None] & (cols_rest < E)[None, :])
        tl.store(log_u_ptr + layer * F + rows, log_u, mask=inside)
    if EXACT_ROWS:
        sums_ptr += (layer * tl.num_programs(0) + program) * E
        tl.store(sums_ptr + cols, tl.sum(acc, axis=0), mask=cols < E)
        if BLOCK_R > 0:
            tl.store(sums_ptr + cols_rest, tl.sum(acc_rest, axis=0), mask=cols_rest < E)
    else:
        lost = tl.sum((worst != worst).to(tl.int32), axis=0) > 0  # a maximum may drop a NaN
        tl.store(worst_ptr + layer * tl.num_programs(0) + program, tl.where(lost, float("nan"), tl.max(worst, axis=0)))


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_error_kernel(
    c_ptr,  # [L, E]
    sums_ptr,  # [L, programs, E]
    worst_ptr,  # [L, programs]
    count_ptr,  # [L] int64: 0 becomes the number of steps asked for
    error_ptr,  # [L]
    num_iters,
    programs,
    E: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,  # all E columns
    BLOCK_P: tl.constexpr,
):
    """The largest relative error of the plan's inexact marginal; one program a layer."""
    layer = tl.program_id(0).to(tl.int64)
    if EXACT_ROWS:
        cols = tl.arange(0, BLOCK_E)
        sums_ptr += layer * programs * E
        change, off = log_ratio(sums_ptr, c_ptr + layer * E, programs, False, cols, E, BLOCK_P, BLOCK_E)
        lost = tl.sum((off != off).to(tl.int32), axis=0) > 0
        error = tl.where(lost, float("nan"), tl.max(off, axis=0))
    else:
        error = tl.load(worst_ptr + layer * programs)
        for p in range(1, programs):
            other = tl.load(worst_ptr + layer * programs + p)
            error = tl.where((other > error) | (other != other), other, error)
    tl.store(error_ptr + layer, error)
    if tl.load(count_ptr + layer) == 0:
        tl.store(count_ptr + layer, num_iters.to(tl.int64))
