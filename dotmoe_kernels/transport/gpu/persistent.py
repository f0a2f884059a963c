# mypy: disable-error-code="no-untyped-def"
"""Sinkhorn in Triton, all steps in one launch: the programs of a layer meet at a barrier after each.

The arithmetic is that of ``streaming.py``. A step's end is an addition to the layer's counter and a look at it until all of the
layer's programs have come, instead of the end of a launch; the potentials stay in registers. Every program finds the same sums, so
all of a layer stop at the same step, and its launch ends there. Programs wait for each other: all must run at once, which a
cooperative launch sees to (it fails where they would not fit), and so this form is for a GPU. The interpreter runs one program
after the other; there a layer has one program, which waits for nobody.

Cost a step: one read of A, from L2 where A fits it, and a barrier; the host launches once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..._tiles import TransportTiles
from .sums import SCALARS, add_columns, add_log_columns, load_columns, log_ratio

MOST_LOOKS = tl.constexpr(1 << 22)  # seconds; a GPU that does not keep its promise must not hang


@triton.jit
def _meet(met_ptr, arrivals):
    """Whether the layer's programs have come to its barriers ``arrivals`` times in all; waits for them."""
    tl.debug_barrier()  # all that this program's threads stored comes before its arrival
    tl.atomic_add(met_ptr, 1, sem="acq_rel", scope="gpu")
    looks = tl.full([], 0, tl.int32)
    here = tl.atomic_add(met_ptr, 0, sem="acq_rel", scope="gpu")
    while (here < arrivals) & (looks < MOST_LOOKS):
        here = tl.atomic_add(met_ptr, 0, sem="acq_rel", scope="gpu")
        looks += 1
    tl.debug_barrier()
    return here >= arrivals


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_persistent_kernel(
    a_ptr,  # [L, F, E]
    tau_ptr,  # [L]
    c_ptr,  # [L, E]
    history_ptr,  # [L, T + 1, E]
    partial_ptr,  # [2, L, programs, E], by the parity of the step
    count_ptr,  # [L] steps taken by a layer that has stopped, else 0
    met_ptr,  # [L] arrivals at the layer's barriers, from 0
    F,
    num_iters,
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
    FIRST_F: tl.constexpr,  # rows of a tile of the first step, which keeps twice the sums
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    layers = tl.num_programs(1)
    layer = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)
    g_ptr = history_ptr + layer * (num_iters + 1) * E
    g = load_columns(g_ptr, cols, E, 0.0)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        g_rest = load_columns(g_ptr, cols_rest, E, 0.0)
    else:
        g_rest = g
    x_ptr = a_ptr + layer * stride_al * VEC
    inv_tau = 1.0 / tl.load(tau_ptr + layer)
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    top, total, top_rest, total_rest = add_log_columns(
        x_ptr, begin, end, stride_af * VEC, stride_ae, inv_tau, g, g_rest, E, BLOCK_E, BLOCK_R, FIRST_F
    )
    parity = layers * programs * E  # elements between the sums of odd and of even steps
    all_ptr = partial_ptr + layer * programs * E
    own_ptr = all_ptr + program * E
    tl.store(own_ptr + parity + cols, top + tl.log(total), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(own_ptr + parity + cols_rest, top_rest + tl.log(total_rest), mask=cols_rest < E)
    step = 2
    arrivals = programs.to(tl.int64)
    lost = programs < 0  # no
    going = num_iters > 1
    if going:
        going = _meet(met_ptr + layer, arrivals)
        lost = going == 0
    while going:
        last_ptr = all_ptr + ((step - 1) % 2) * parity
        change, off = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols, E, BLOCK_P, BLOCK_E)
        g -= change
        worst = tl.max(off, axis=0)
        if BLOCK_R > 0:
            change_rest, off_rest = log_ratio(last_ptr, c_ptr + layer * E, programs, step == 2, cols_rest, E, BLOCK_P, BLOCK_R)
            g_rest -= change_rest
            worst = tl.maximum(worst, tl.max(off_rest, axis=0))
        else:
            g_rest = g
        if program == 0:
            tl.store(g_ptr + (step - 1) * E + cols, g, mask=cols < E)
            if BLOCK_R > 0:
                tl.store(g_ptr + (step - 1) * E + cols_rest, g_rest, mask=cols_rest < E)
        going = (tol <= 0.0) | (worst > tol) | (worst != worst)  # every program of the layer finds the same
        if going:
            sums, sums_rest = add_columns(
                x_ptr, begin, end, stride_af * VEC, stride_ae, inv_tau, g, g_rest, E, BLOCK_E, BLOCK_R, BLOCK_F
            )
            tl.store(own_ptr + (step % 2) * parity + cols, sums, mask=cols < E)
            if BLOCK_R > 0:
                tl.store(own_ptr + (step % 2) * parity + cols_rest, sums_rest, mask=cols_rest < E)
            going = step < num_iters
            if going:
                arrivals += programs
                going = _meet(met_ptr + layer, arrivals)
                lost = going == 0
        elif program == 0:
            tl.store(count_ptr + layer, step - 1)
        step += 1
    if lost:  # shows in the plan and in its error
        tl.store(own_ptr + (num_iters % 2) * parity + cols, float("nan"), mask=cols < E)


def take_steps(
    affinity: Tensor,
    tau: Tensor,
    capacity: Tensor,
    history: Tensor,
    partial: Tensor,
    count: Tensor,
    met: Tensor,
    tol: float,
    chunk: int,
    tiles: TransportTiles,
    known: dict[str, int],
) -> None:
    """All the steps: history [L, T + 1, E], partial [2, L, programs, E], count and met [L] of zeros."""
    F, num_iters, programs = affinity.shape[1], history.shape[1] - 1, partial.shape[2]
    options = tiles.options | ({"launch_cooperative_grid": True} if affinity.device.type == "cuda" else {})
    _sinkhorn_persistent_kernel[programs, len(count)](
        affinity, tau, capacity, history, partial, count, met, F, num_iters, chunk, tol, **known, **tiles.blocks, **options
    )
