# mypy: disable-error-code="no-untyped-def"
"""Sinkhorn in Triton: every step streams the affinity A [F, E] of every layer once.

    S_t = softmax_e(A / tau + g_{t-1});   q_t = sum_i S_t,i;   g_t = g_{t-1} - log(q_t / c)

g_t [E] is the log-potential after step t, c [E] the capacities. One launch a step: a program owns a run of whole rows of one layer,
so that a row's softmax stays inside it, and writes its column sums; the next launch begins by adding those of all the layer's
programs, in their order, and every program finds the same g_t, which the layer's first one keeps. The first step of a call has
column maxima, since a cold start may leave a column's every entry below float32; from then on q_t >= c / F, and sums suffice.
A layer that met the tolerance is marked by its count, and its later programs return at once: nothing waits for the host. Where all
programs fit a GPU at once, one launch can take all the steps (``persistent.py``).

Accumulated in float32, in a fixed order: bitwise repeatable. Cost a step: one read of A, one exp an element; at the end one
read of A and one write of the plan. Workspace: the history [T + 1, E] and the column sums of the programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import device_guard
from ..._tiles import TransportTiles, transport_form, transport_tiles
from .ending import _sinkhorn_columns_kernel, _sinkhorn_error_kernel, _sinkhorn_plan_kernel
from .persistent import take_steps
from .sums import BLOCK_P, SCALARS, add_columns, add_log_columns, load_columns, log_ratio, vector_strides


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
    change, off = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols, E, BLOCK_P, BLOCK_E)
    g = load_columns(g_ptr, cols, E, 0.0) - change
    worst = tl.max(off, axis=0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        change_rest, off_rest = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols_rest, E, BLOCK_P, BLOCK_R)
        g_rest = load_columns(g_ptr, cols_rest, E, 0.0) - change_rest
        worst = tl.maximum(worst, tl.max(off_rest, axis=0))
    else:
        g_rest = g
    if program == 0:
        tl.store(g_ptr + E + cols, g, mask=cols < E)
        if BLOCK_R > 0:
            tl.store(g_ptr + E + cols_rest, g_rest, mask=cols_rest < E)
    if (tol > 0.0) & (worst <= tol):  # every program of the layer finds the same
        if program == 0:
            tl.store(count_ptr + layer, step - 1)
        return

    begin = program * chunk
    total, total_rest = add_columns(
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
    out_ptr = partial_ptr + (((step % 2) * layers + layer) * programs + program) * E
    tl.store(out_ptr + cols, total, mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, total_rest, mask=cols_rest < E)


def _take_steps(
    affinity: Tensor,
    tau: Tensor,
    capacity: Tensor,
    history: Tensor,
    partial: Tensor,
    count: Tensor,
    tol: float,
    chunk: int,
    tiles: TransportTiles,
    known: dict[str, int],
) -> None:
    """All the steps, a launch each: history [L, T + 1, E], partial [2, L, programs, E], count [L]."""
    (_, F, E), num_iters, grid = affinity.shape, history.shape[1] - 1, (partial.shape[2], len(count))
    first = transport_tiles(E, "first", device=affinity.device)
    _sinkhorn_first_step_kernel[grid](
        affinity, tau, history, partial, F, num_iters, chunk, **known, **first.blocks, **first.options
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
            **known,
            **tiles.blocks,
            BLOCK_P=BLOCK_P,
            **tiles.options,
        )


def _finish(
    affinity: Tensor,
    tau: Tensor,
    capacity: Tensor,
    history: Tensor,
    partial: Tensor,
    count: Tensor,
    chunk: int,
    exact_rows: bool,
    known: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """plan, log_u, log_v and error from the steps' sums. The plan's programs hold more registers than a step's, so fewer of them
    run at once, and its grid is its own."""
    (L, F, E), num_iters, programs = affinity.shape, history.shape[1] - 1, partial.shape[2]
    new = capacity.new_empty
    plan, log_u, log_v, error = new((L, F, E)), new((L, F)), new((L, E)), new((L,))
    tiles = transport_tiles(E, "plan", device=affinity.device)
    writers, rows = tiles.split(F, L)
    worst, sums, columns = new((L, writers)), new((L, writers, E)), new(0 if exact_rows else (L, programs, 2, E))
    if not exact_rows:
        first = transport_tiles(E, "first", device=affinity.device)
        _sinkhorn_columns_kernel[programs, L](
            affinity, tau, history, count, columns, F, num_iters, chunk, **known, **first.blocks, **first.options
        )
    _sinkhorn_plan_kernel[writers, L](
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
        sums,
        F,
        num_iters,
        rows,
        programs,
        **known,
        EXACT_ROWS=exact_rows,
        **tiles.blocks,
        BLOCK_P=BLOCK_P,
        **tiles.options,
    )
    _sinkhorn_error_kernel[(L,)](
        capacity,
        sums,
        worst,
        count,
        error,
        num_iters,
        writers,
        E=E,
        EXACT_ROWS=exact_rows,
        BLOCK_E=triton.next_power_of_2(max(E, 16)),
        BLOCK_P=BLOCK_P,
    )
    return plan, log_u, log_v, error


def solve(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    init: Tensor,
    num_iters: int,
    tol: float,
    exact_rows: bool,
    form: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """affinity [L, F, E], capacity [L, E], tau [L], init [L, E] -> plan, log_u, log_v, history [L, T + 1, E], count, error.

    form: "streaming", a launch a step, or "persistent", one for all of them; empty: that of ``_tiles``."""
    L, F, E = affinity.shape
    new, device = capacity.new_empty, affinity.device
    history = new((L, num_iters + 1, E))
    count, met = torch.zeros((2, L), dtype=torch.int64, device=device)
    if L == 0:
        return new((L, F, E)), new((L, F)), new((L, E)), history, count, new((L,))
    capacity, tau = capacity.contiguous(), tau.contiguous()
    history[:, 0] = init
    form = form or transport_form(L, F, E, num_iters, device)
    tiles = transport_tiles(E, "persistent" if form == "persistent" else "step", device=device)
    programs, chunk = tiles.split(F, L)
    if form == "persistent" and device.type != "cuda":
        programs, chunk = 1, F  # interpreted programs run one after the other: none could wait for the next
    partial = new((2, L, programs, E))
    stride_l, stride_f, stride_e, vec = vector_strides(affinity)
    known = {"stride_al": stride_l, "stride_af": stride_f, "stride_ae": stride_e, "E": E, "VEC": vec}
    state = (affinity, tau, capacity, history, partial, count)
    with device_guard(affinity):
        if form == "persistent":
            take_steps(*state, met, tol, chunk, tiles, known)
        else:
            _take_steps(*state, tol, chunk, tiles, known)
        plan, log_u, log_v, error = _finish(*state, chunk, exact_rows, known)
    return plan, log_u, log_v, history, count, error
