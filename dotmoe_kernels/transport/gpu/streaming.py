# mypy: disable-error-code="no-untyped-def"
"""Sinkhorn in Triton: every step streams the affinity A [F, E] of every layer once.

    S_t = softmax_e(A / tau + g_{t-1});   q_t = sum_i S_t,i;   g_t = g_{t-1} - log(q_t / c)

g_t [E] is the log-potential after step t, c [E] the capacities. One launch a step: a program owns a run of whole rows of one layer,
so that a row's softmax stays inside it, and writes its column sums; the next launch begins by adding those of all the layer's
programs, in their order, and every program finds the same g_t, which the layer's first one keeps. The first step of a call has
column maxima, since a cold start may leave a column's every entry below float32; from then on q_t >= c / F, and sums suffice.
A layer that met the tolerance is marked by its count, and its later programs return at once: nothing waits for the host.

Accumulated in float32, in a fixed order: bitwise repeatable. Cost a step: one read of A, one exp an element; at the end one
read of A and one write of the plan. Workspace: the history [T + 1, E] and the column sums of the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import device_guard
from ..._tiles import transport_tiles
from .sums import (
    BLOCK_P,
    SCALARS,
    TINY,
    add_log_columns,
    columns_times,
    combine_programs,
    exponents,
    load_columns,
    load_rows,
    logsumexp_programs,
    sum_programs,
    vector_strides,
)


@triton.jit
def _log_ratio(partial_ptr, c_ptr, programs, logarithmic, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """(log(q / c), |q / c - 1|) of the last step's column sums q; both 0 beyond the E columns."""
    c = load_columns(c_ptr, cols, E, 1.0)
    if logarithmic:
        step = logsumexp_programs(partial_ptr, programs, E, cols, E, BLOCK_P, BLOCK) - tl.log(c)
        ratio = tl.exp(step)
    else:
        ratio = sum_programs(partial_ptr, programs, E, cols, E, BLOCK_P, BLOCK) / c
        step = tl.log(tl.where(ratio < TINY, TINY, ratio))  # NaN stays NaN
    return tl.where(cols < E, step, 0.0), tl.where(cols < E, tl.abs(ratio - 1.0), 0.0)


@triton.jit
def _column_shares(parts_ptr, c_ptr, programs, cols, E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    """(top, c / total, log(q / c)) of the column sums q = total * exp(top), of all the programs' [programs, 2, E]."""
    top, total = combine_programs(parts_ptr, programs, cols, E, BLOCK_P, BLOCK)
    share = load_columns(c_ptr, cols, E, 0.0) / total
    return top, share, tl.where(cols < E, top - tl.log(share), 0.0)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_first_step_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    history_ptr,  # [L, T + 1, E]
    partial_ptr,  # [2, L, programs, E]
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
    """Step 1: the logarithms of the programs' column sums, from g_0."""
    program = tl.program_id(0)
    layer = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)
    g_ptr = history_ptr + layer * (num_iters + 1) * E
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
    out_ptr = partial_ptr + ((tl.num_programs(1) + layer) * tl.num_programs(0) + program) * E
    tl.store(out_ptr + cols, top + tl.log(total), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, top_rest + tl.log(total_rest), mask=cols_rest < E)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_step_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    c_ptr,  # [L, E]
    history_ptr,  # [L, T + 1, E]
    partial_ptr,  # [2, L, programs, E], by the parity of the step
    count_ptr,  # [L] steps taken by a layer that has stopped, else 0
    F,
    num_iters,
    step,
    chunk,
    tol,
    stride_al,
    stride_af,
    stride_ae,
    E: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Step ``step`` >= 2: g of the step before it from that step's column sums, then the column sums of this one."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    layers = tl.num_programs(1)
    layer = tl.program_id(1).to(tl.int64)
    if tl.load(count_ptr + layer) > 0:
        return
    cols = tl.arange(0, BLOCK_E)
    last_ptr = partial_ptr + (((step - 1) % 2) * layers + layer) * programs * E
    g_ptr = history_ptr + (layer * (num_iters + 1) + step - 2) * E
    change, off = _log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols, E, BLOCK_P, BLOCK_E)
    g = load_columns(g_ptr, cols, E, 0.0) - change
    worst = tl.max(off, axis=0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        change_rest, off_rest = _log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols_rest, E, BLOCK_P, BLOCK_R)
        g_rest = load_columns(g_ptr, cols_rest, E, 0.0) - change_rest
        worst = tl.maximum(worst, tl.max(off_rest, axis=0))
    if program == 0:
        tl.store(g_ptr + E + cols, g, mask=cols < E)
        if BLOCK_R > 0:
            tl.store(g_ptr + E + cols_rest, g_rest, mask=cols_rest < E)
    if (tol > 0.0) & (worst <= tol):  # every program of the layer finds the same
        if program == 0:
            tl.store(count_ptr + layer, step - 1)
        return

    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    x_ptr = a_ptr + layer * stride_al * VEC
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        acc_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        a = load_rows(x_ptr, rows, cols, end, stride_af * VEC, stride_ae, E)
        if BLOCK_R > 0:  # both loads in flight before the first use
            a_rest = load_rows(x_ptr, rows, cols_rest, end, stride_af * VEC, stride_ae, E)
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
    out_ptr = partial_ptr + (((step % 2) * layers + layer) * programs + program) * E
    tl.store(out_ptr + cols, tl.sum(acc, axis=0), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, tl.sum(acc_rest, axis=0), mask=cols_rest < E)


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
    worst_ptr,  # [L, programs] final "column": the largest row error of each program
    F,
    num_iters,
    chunk,
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
    programs = tl.num_programs(0)
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
        change, off = _log_ratio(last_ptr, c_ptr + layer * E, programs, num_iters == 1, cols, E, BLOCK_P, BLOCK_E)
        g = g_before - change
        if BLOCK_R > 0:
            change_rest, off_rest = _log_ratio(
                last_ptr, c_ptr + layer * E, programs, num_iters == 1, cols_rest, E, BLOCK_P, BLOCK_R
            )
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
        sums_ptr = partial_ptr + ((((num_iters + 1) % 2) * layers + layer) * programs + program) * E
        tl.store(sums_ptr + cols, tl.sum(acc, axis=0), mask=cols < E)
        if BLOCK_R > 0:
            tl.store(sums_ptr + cols_rest, tl.sum(acc_rest, axis=0), mask=cols_rest < E)
    else:
        lost = tl.sum((worst != worst).to(tl.int32), axis=0) > 0  # a maximum may drop a NaN
        tl.store(worst_ptr + layer * programs + program, tl.where(lost, float("nan"), tl.max(worst, axis=0)))


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_error_kernel(
    c_ptr,  # [L, E]
    partial_ptr,  # [2, L, programs, E]
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
    layers = tl.num_programs(0)
    if EXACT_ROWS:
        cols = tl.arange(0, BLOCK_E)
        sums_ptr = partial_ptr + (((num_iters + 1) % 2) * layers + layer) * programs * E
        change, off = _log_ratio(sums_ptr, c_ptr + layer * E, programs, False, cols, E, BLOCK_P, BLOCK_E)
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


def solve(
    affinity: Tensor, capacity: Tensor, tau: Tensor, init: Tensor, num_iters: int, tol: float, exact_rows: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """affinity [L, F, E], capacity [L, E], tau [L], init [L, E] -> plan, log_u, log_v, history [L, T + 1, E], count, error."""
    L, F, E = affinity.shape
    new = capacity.new_empty
    plan, log_u, log_v = new((L, F, E)), new((L, F)), new((L, E))
    history, error = new((L, num_iters + 1, E)), new((L,))
    count = torch.zeros(L, dtype=torch.int64, device=affinity.device)
    if L == 0:
        return plan, log_u, log_v, history, count, error
    capacity, tau = capacity.contiguous(), tau.contiguous()
    history[:, 0] = init
    tiles, first_tiles, plan_tiles = (transport_tiles(E, kernel, device=affinity.device) for kernel in ("step", "first", "plan"))
    programs, chunk = tiles.split(F, L)
    partial, worst, columns = new((2, L, programs, E)), new((L, programs)), new(0 if exact_rows else (L, programs, 2, E))
    stride_l, stride_f, stride_e, vec = vector_strides(affinity)
    strides = {"stride_al": stride_l, "stride_af": stride_f, "stride_ae": stride_e, "E": E, "VEC": vec}
    grid = (programs, L)
    with device_guard(affinity):
        _sinkhorn_first_step_kernel[grid](
            affinity, tau, history, partial, F, num_iters, chunk, **strides, **first_tiles.blocks, **first_tiles.options
        )
        for step in range(2, num_iters + 1):
            _sinkhorn_step_kernel[grid](
                affinity,
                tau,
                capacity,
                history,
                partial,
                count,
                F,
                num_iters,
                step,
                chunk,
                tol,
                **strides,
                **tiles.blocks,
                BLOCK_P=BLOCK_P,
                **tiles.options,
            )
        if not exact_rows:
            first = {**strides, **first_tiles.blocks, **first_tiles.options}
            _sinkhorn_columns_kernel[grid](affinity, tau, history, count, columns, F, num_iters, chunk, **first)
        _sinkhorn_plan_kernel[grid](
            affinity,
            tau,
            capacity,
            history,
            partial,
            count,
            plan,
            log_u,
            log_v,
            columns,
            worst,
            F,
            num_iters,
            chunk,
            **strides,
            EXACT_ROWS=exact_rows,
            **plan_tiles.blocks,
            BLOCK_P=BLOCK_P,
            **plan_tiles.options,
        )
        _sinkhorn_error_kernel[(L,)](
            capacity,
            partial,
            worst,
            count,
            error,
            num_iters,
            programs,
            E=E,
            EXACT_ROWS=exact_rows,
            BLOCK_E=triton.next_power_of_2(max(E, 16)),
            BLOCK_P=BLOCK_P,
        )
    return plan, log_u, log_v, history, count, error
