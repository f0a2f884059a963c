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

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
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


class _Plan(NamedTuple):
    """The launches of a call, and how many programs share a layer: in its steps, each of ``chunk`` rows, and in the plan's kernel,
    whose programs hold more registers than a step's, so that fewer of them run at once, and whose grid is its own."""

    form: str
    programs: int
    chunk: int
    tiles: TransportTiles
    known: dict[str, int]
    writers: int
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
    form: str,
    keep: bool,
    device: torch.device,
    *types: object,
) -> _Plan:
    """Of an affinity [L, F, E] and its ``vector_strides``; ``types``: what else the kernels are compiled for."""
    L, F, E = shape
    form = form or transport_form(L, F, E, num_iters, device)
    first, step, plan = (transport_tiles(E, kernel, device=device) for kernel in ("first", "step", "plan"))
    tiles = transport_tiles(E, "persistent", device=device) if form == "persistent" else step
    programs, chunk = tiles.split(F, L)
    if form == "persistent" and device.type != "cuda":
        programs, chunk = 1, F  # interpreted programs run one after the other: none could wait for the next
    writers, rows = plan.split(F, L)
    stride_l, stride_f, stride_e, vec = strides
    layout, exact = {"E": E, "VEC": vec}, {"EXACT_ROWS": exact_rows, "BLOCK_P": BLOCK_P}
    sizes, of_plan = (F, num_iters, chunk, *strides[:3]), (F, num_iters, rows, programs, *strides[:3])
    grid, of_first = (programs, L), {**layout, **first.blocks}
    constants = {"E": E, "BLOCK_E": triton.next_power_of_2(max(E, 16)), **exact}
    return _Plan(
        form,
        programs,
        chunk,
        tiles,
        {"stride_al": stride_l, "stride_af": stride_f, "stride_ae": stride_e, **layout},
        writers,
        Launch(_sinkhorn_first_step_kernel, grid, sizes, of_first, first.options, keep=keep),
        Launch(_sinkhorn_step_kernel, grid, sizes, {**layout, **step.blocks, "BLOCK_P": BLOCK_P}, step.options, keep=keep),
        Launch(_sinkhorn_columns_kernel, grid, sizes, of_first, first.options, keep=keep),
        Launch(_sinkhorn_plan_kernel, (writers, L), of_plan, {**layout, **exact, **plan.blocks}, plan.options, keep=keep),
        Launch(_sinkhorn_error_kernel, (L,), (num_iters, writers), constants, keep=keep),
    )


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
    new = capacity.new_empty
    plan, log_u, log_v = new((L, F, E)), new((L, F)), new((L, E))
    history, error = new((L, num_iters + 1, E)), new((L,))
    count, met = torch.zeros((2, L), dtype=torch.int64, device=affinity.device)
    if L == 0:
        return plan, log_u, log_v, history, count, error
    capacity, tau = capacity.contiguous(), tau.contiguous()
    history[:, 0] = init
    keep, types = aligned(affinity, capacity, tau, count), (affinity.device, affinity.dtype)
    launches = _plan(affinity.shape, vector_strides(affinity), num_iters, exact_rows, form, keep, *types)
    programs, writers = launches.programs, launches.writers
    partial, worst, sums = new((2, L, programs, E)), new((L, writers)), new((L, writers, E))
    columns = new(0 if exact_rows else (L, programs, 2, E))
    state = (affinity, tau, capacity, history, partial, count)
    with device_guard(affinity):
        if launches.form == "persistent":
            take_steps(*state, met, tol, launches.chunk, launches.tiles, launches.known)
        else:
            launches.first(affinity, tau, history, partial)
            for step in range(2, num_iters + 1):
                launches.step(*state, step, tol)
        if not exact_rows:
            launches.columns(affinity, tau, history, count, columns)
        launches.plan(*state, plan, log_u, log_v, columns, worst, sums)
        launches.error(capacity, sums, worst, count, error)
    return plan, log_u, log_v, history, count, error
