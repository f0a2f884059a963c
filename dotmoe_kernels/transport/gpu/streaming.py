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

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
from ..._tiles import transport_tiles
from .ending import _sinkhorn_columns_kernel, _sinkhorn_error_kernel, _sinkhorn_plan_kernel
from .sums import (
    BLOCK_P,
    SCALARS,
    add_log_columns,
    exponents,
    load_columns,
    load_rows,
    log_ratio,
    vector_strides,
)


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
    step,
    tol,
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
    change, off = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols, E, BLOCK_P, BLOCK_E)
    g = load_columns(g_ptr, cols, E, 0.0) - change
    worst = tl.max(off, axis=0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        change_rest, off_rest = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols_rest, E, BLOCK_P, BLOCK_R)
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


class _Plan(NamedTuple):
    """The launches of a call, and how many programs share a layer."""

    programs: int
    first: Launch
    step: Launch
    columns: Launch
    plan: Launch
    error: Launch


@lru_cache(maxsize=MOST_PLANS)
def _plan(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int, int],
    num_iters: int,
    exact_rows: bool,
    keep: bool,
    device: torch.device,
    *types: object,
) -> _Plan:
    """Of an affinity [L, F, E] and its ``vector_strides``; ``types``: what else the kernels are compiled for."""
    L, F, E = shape
    first, step, plan = (transport_tiles(E, kernel, device=device) for kernel in ("first", "step", "plan"))
    programs, chunk = step.split(F, L)
    sizes, layout = (F, num_iters, chunk, *strides[:3]), {"E": E, "VEC": strides[3]}
    grid, exact = (programs, L), {"EXACT_ROWS": exact_rows, "BLOCK_P": BLOCK_P}
    constants = {"E": E, "BLOCK_E": triton.next_power_of_2(max(E, 16)), **exact}
    of_first = {**layout, **first.blocks}
    return _Plan(
        programs,
        Launch(_sinkhorn_first_step_kernel, grid, sizes, of_first, first.options, keep=keep),
        Launch(_sinkhorn_step_kernel, grid, sizes, {**layout, **step.blocks, "BLOCK_P": BLOCK_P}, step.options, keep=keep),
        Launch(_sinkhorn_columns_kernel, grid, sizes, of_first, first.options, keep=keep),
        Launch(_sinkhorn_plan_kernel, grid, sizes, {**layout, **exact, **plan.blocks}, plan.options, keep=keep),
        Launch(_sinkhorn_error_kernel, (L,), (num_iters, programs), constants, keep=keep),
    )


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
    keep, types = aligned(affinity, capacity, tau), (affinity.device, affinity.dtype)
    launches = _plan(affinity.shape, vector_strides(affinity), num_iters, exact_rows, keep, *types)
    programs = launches.programs
    partial, worst, columns = new((2, L, programs, E)), new((L, programs)), new(0 if exact_rows else (L, programs, 2, E))
    with device_guard(affinity):
        launches.first(affinity, tau, history, partial)
        for step in range(2, num_iters + 1):
            launches.step(affinity, tau, capacity, history, partial, count, step, tol)
        if not exact_rows:
            launches.columns(affinity, tau, history, count, columns)
        launches.plan(affinity, tau, capacity, history, partial, count, plan, log_u, log_v, columns, worst)
        launches.error(capacity, partial, worst, count, error)
    return plan, log_u, log_v, history, count, error
