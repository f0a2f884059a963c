# mypy: disable-error-code="no-untyped-def"
"""The exact adjoint of the Sinkhorn steps taken, in Triton: dL/dA from G = dL/dP, streaming the plan P [F, E] once a step.

With v_t = exp(g_t - g_n) [E] (up to a scale, which cancels) and n the steps a layer took, for t = n..1:

    u_t = 1 / (P v_{t-1});   z_t = gbar / (P^T u_t);   fbar = -u_t (P z_t);   gbar <- -v_{t-1} P^T(u_t fbar)

from gbar = the column sums of dX_n, dX_n = P (G - sum_e P G) ("row") or P G ("column", whose sums over e join fbar at t = n); at
the end dX = dX_n - P * sum_t [u_t z_t + u_t fbar_t v_{t-1}], of rank 2T, d log c = sum_t gbar_t and d g_0 = gbar. P stands for
softmax_e(X + g_n) whichever end was chosen: a row's scale cancels in u_t.

One launch a step. Its programs own whole rows, as in the forward; each finds P z_t and, one step ahead, P v_{t-2}, adds up
the column sums P^T(u_t fbar_t) and P^T u_{t-1}, and the next launch begins by adding those of all programs. The column sums of u_t
come from the same P, not from the capacities, so that rounding cannot be amplified from step to step.

Steps whose v_{t-1} spreads beyond e^60 are left to the plain form (``plain.py``); the device decides which, for each layer. The
product at the end is in ``product.py``.

Accumulated in float32, in a fixed order. Cost: one read of P a step; at the end one of P, G and A, 4 T F E flops, and one write.
Workspace a layer: u and u fbar [T, F], z and v [T, E].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import Launch, aligned, device_guard
from ..._tiles import transport_tiles
from ..cpu.scaling import SAFE
from .plain import _sinkhorn_adjoint_plain_kernel
from .product import BLOCK_T, _sinkhorn_adjoint_finish_kernel
from .sums import BLOCK_P, SCALARS, load_columns, load_rows, sum_programs, vector_strides


@triton.jit
def _scaling_of(at_ptr, last_ptr, low, cols, E: tl.constexpr):
    """exp(g_t - g_n - low); 0 beyond the E columns."""
    shift = load_columns(at_ptr, cols, E, 0.0) - load_columns(last_ptr, cols, E, 0.0)
    return tl.where(cols < E, tl.exp(shift - low), 0.0)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_adjoint_range_kernel(
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    low_ptr,  # [L, T] out: the least entry of g_{t-1} - g_n
    plain_ptr,  # [L] out: steps 1..plain are taken in the plain form
    num_iters,
    safe,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,  # all E columns
    BLOCK_T: tl.constexpr,
):
    """Which steps are safe in the rank-2T form; one program a layer."""
    layer = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_E)
    steps = tl.load(count_ptr + layer).to(tl.int32)
    g_ptr = history_ptr + layer * (num_iters + 1) * E
    last = load_columns(g_ptr + steps * E, cols, E, 0.0)
    plain = 0
    for first in range(0, steps, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        inside = (t < steps)[:, None] & (cols < E)[None, :]
        shift = tl.load(g_ptr + t[:, None] * E + cols[None, :], mask=inside, other=0.0) - last[None, :]
        low = tl.min(tl.where(inside, shift, float("inf")), axis=1)
        high = tl.max(tl.where(inside, shift, float("-inf")), axis=1)
        tl.store(low_ptr + layer * num_iters + t, low, mask=t < steps)
        plain = tl.maximum(plain, tl.max(tl.where(high - low > safe, t + 1, 0), axis=0))
    tl.store(plain_ptr + layer, plain)


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_adjoint_start_kernel(
    plan_ptr,  # [L, F, E]
    grad_ptr,  # [L, F, E], any strides
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    low_ptr,  # [L, T]
    plain_ptr,  # [L]
    partial_ptr,  # [2, L, programs, 2, E] of gbar and of P^T u
    u_ptr,  # [L, T, F]
    fbar_ptr,  # [L, F] final "column": what joins fbar at the last step
    F,
    num_iters,
    chunk,
    stride_gl,
    stride_gf,
    stride_ge,
    E: tl.constexpr,
    VEC: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """gbar at the end, and u of the last step with its column sums."""
    program = tl.program_id(0)
    layers = tl.num_programs(1)
    layer = tl.program_id(1).to(tl.int64)
    steps = tl.load(count_ptr + layer).to(tl.int32)
    more = tl.load(plain_ptr + layer) < steps
    cols = tl.arange(0, BLOCK_E)
    g_ptr = history_ptr + (layer * (num_iters + 1) + steps) * E
    low = tl.load(low_ptr + layer * num_iters + steps - 1)
    v = tl.where(more, _scaling_of(g_ptr - E, g_ptr, low, cols, E), 1.0)
    acc_g = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    acc_u = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        v_rest = tl.where(more, _scaling_of(g_ptr - E, g_ptr, low, cols_rest, E), 1.0)
        acc_g_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        acc_u_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
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
        w_sum = tl.sum(w, axis=1)
        pv = tl.sum(p * v[None, :], axis=1)
        if BLOCK_R > 0:
            w_rest *= p_rest
            w_sum += tl.sum(w_rest, axis=1)
            pv += tl.sum(p_rest * v_rest[None, :], axis=1)
        u = tl.where(inside, 1.0 / pv, 0.0)
        tl.store(u_ptr + (layer * num_iters + steps - 1) * F + rows, u, mask=rows < tl.where(more, end, 0))
        acc_u = tl.fma(p, u[:, None], acc_u)
        if EXACT_ROWS:
            acc_g += w - p * w_sum[:, None]
        else:
            acc_g += w
            tl.store(fbar_ptr + layer * F + rows, w_sum, mask=inside)
        if BLOCK_R > 0:
            acc_u_rest = tl.fma(p_rest, u[:, None], acc_u_rest)
            if EXACT_ROWS:
                acc_g_rest += w_rest - p_rest * w_sum[:, None]
            else:
                acc_g_rest += w_rest
    out_ptr = partial_ptr + ((((steps + 1) % 2) * layers + layer) * tl.num_programs(0) + program) * 2 * E
    tl.store(out_ptr + cols, tl.sum(acc_g, axis=0), mask=cols < E)
    tl.store(out_ptr + E + cols, tl.sum(acc_u, axis=0), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, tl.sum(acc_g_rest, axis=0), mask=cols_rest < E)
        tl.store(out_ptr + E + cols_rest, tl.sum(acc_u_rest, axis=0), mask=cols_rest < E)


@triton.jit
def _next_z(
    partial_ptr,
    dlogc_ptr,
    z_ptr,
    v_ptr,
    v,
    programs,
    first,
    keep,
    cols,
    E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z = gbar / q from the programs' sums; the layer's first program keeps z, v and adds gbar to d log c."""
    gbar = sum_programs(partial_ptr, programs, 2 * E, cols, E, BLOCK_P, BLOCK)
    q = sum_programs(partial_ptr + E, programs, 2 * E, cols, E, BLOCK_P, BLOCK)
    z = tl.where(cols < E, gbar / q, 0.0)
    if keep:
        tl.store(z_ptr + cols, z, mask=cols < E)
        tl.store(v_ptr + cols, v, mask=cols < E)
        total = tl.load(dlogc_ptr + cols, mask=cols < tl.where(first, 0, E), other=0.0)
        tl.store(dlogc_ptr + cols, total + gbar, mask=cols < E)
    return z


@triton.jit(do_not_specialize=SCALARS)
def _sinkhorn_adjoint_step_kernel(
    plan_ptr,  # [L, F, E]
    history_ptr,  # [L, T + 1, E]
    count_ptr,  # [L]
    low_ptr,  # [L, T]
    plain_ptr,  # [L]
    partial_ptr,  # [2, L, programs, 2, E] of gbar and of P^T u, by the parity of the step
    u_ptr,  # [L, T, F]
    uf_ptr,  # [L, T, F] u fbar
    fbar_ptr,  # [L, F]
    z_ptr,  # [L, T, E]
    v_ptr,  # [L, T, E]
    dlogc_ptr,  # [L, E]
    step,
    F,
    num_iters,
    chunk,
    E: tl.constexpr,
    EXACT_ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Step ``step``, from the last to the first."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    layers = tl.num_programs(1)
    layer = tl.program_id(1).to(tl.int64)
    steps = tl.load(count_ptr + layer).to(tl.int32)
    plain = tl.load(plain_ptr + layer)
    if (step > steps) | (step <= plain):
        return
    more = step - 1 > plain
    at = layer * num_iters + step - 1
    cols = tl.arange(0, BLOCK_E)
    g_ptr = history_ptr + layer * (num_iters + 1) * E
    in_ptr = partial_ptr + (((step + 1) % 2) * layers + layer) * programs * 2 * E
    low = tl.load(low_ptr + at)
    before = tl.maximum(step - 2, 0)
    low_before = tl.load(low_ptr + layer * num_iters + before)
    v = _scaling_of(g_ptr + (step - 1) * E, g_ptr + steps * E, low, cols, E)
    v_before = tl.where(more, _scaling_of(g_ptr + before * E, g_ptr + steps * E, low_before, cols, E), 1.0)
    z = _next_z(
        in_ptr,
        dlogc_ptr + layer * E,
        z_ptr + at * E,
        v_ptr + at * E,
        v,
        programs,
        step == steps,
        program == 0,
        cols,
        E,
        BLOCK_P,
        BLOCK_E,
    )
    acc_f = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    acc_u = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    if BLOCK_R > 0:
        cols_rest = BLOCK_E + tl.arange(0, BLOCK_R)
        v_rest = _scaling_of(g_ptr + (step - 1) * E, g_ptr + steps * E, low, cols_rest, E)
        v_before_rest = tl.where(more, _scaling_of(g_ptr + before * E, g_ptr + steps * E, low_before, cols_rest, E), 1.0)
        z_rest = _next_z(
            in_ptr,
            dlogc_ptr + layer * E,
            z_ptr + at * E,
            v_ptr + at * E,
            v_rest,
            programs,
            step == steps,
            program == 0,
            cols_rest,
            E,
            BLOCK_P,
            BLOCK_R,
        )
        acc_f_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
        acc_u_rest = tl.zeros([BLOCK_F, BLOCK_R], dtype=tl.float32)
    p_ptr = plan_ptr + layer * F * E
    begin = program * chunk
    end = tl.minimum(begin + chunk, F)
    for first in range(begin, end, BLOCK_F):
        rows = first + tl.arange(0, BLOCK_F)
        inside = rows < end
        p = load_rows(p_ptr, rows, cols, end, E, 1, E)
        if BLOCK_R > 0:
            p_rest = load_rows(p_ptr, rows, cols_rest, end, E, 1, E)
        u = tl.load(u_ptr + at * F + rows, mask=inside, other=0.0)
        pz = tl.sum(p * z[None, :], axis=1)
        pv = tl.sum(p * v_before[None, :], axis=1)
        if BLOCK_R > 0:
            pz += tl.sum(p_rest * z_rest[None, :], axis=1)
            pv += tl.sum(p_rest * v_before_rest[None, :], axis=1)
        fbar = -u * pz
        if not EXACT_ROWS:
            fbar += tl.load(fbar_ptr + layer * F + rows, mask=rows < tl.where(step == steps, end, 0), other=0.0)
        uf = u * fbar
        tl.store(uf_ptr + at * F + rows, uf, mask=inside)
        u_before = tl.where(inside, 1.0 / pv, 0.0)
        tl.store(u_ptr + (at - 1) * F + rows, u_before, mask=rows < tl.where(more, end, 0))
        acc_f = tl.fma(p, uf[:, None], acc_f)
        acc_u = tl.fma(p, u_before[:, None], acc_u)
        if BLOCK_R > 0:
            acc_f_rest = tl.fma(p_rest, uf[:, None], acc_f_rest)
            acc_u_rest = tl.fma(p_rest, u_before[:, None], acc_u_rest)
    out_ptr = partial_ptr + (((step % 2) * layers + layer) * programs + program) * 2 * E
    tl.store(out_ptr + cols, -v * tl.sum(acc_f, axis=0), mask=cols < E)
    tl.store(out_ptr + E + cols, tl.sum(acc_u, axis=0), mask=cols < E)
    if BLOCK_R > 0:
        tl.store(out_ptr + cols_rest, -v_rest * tl.sum(acc_f_rest, axis=0), mask=cols_rest < E)
        tl.store(out_ptr + E + cols_rest, tl.sum(acc_u_rest, axis=0), mask=cols_rest < E)


def unrolled_adjoint(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    plan: Tensor,
    history: Tensor,
    count: Tensor,
    grad: Tensor,
    exact_rows: bool,
    needs_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """affinity, plan, grad [L, F, E], capacity [L, E], tau [L], history [L, T + 1, E] -> dA, d capacity, d tau, d init."""
    L, F, E = plan.shape
    T = history.shape[1] - 1
    new = plan.new_empty
    da = torch.empty(affinity.shape, dtype=affinity.dtype, device=affinity.device)  # contiguous
    dlogc, dinit = new((L, E)), new((L, E))
    if L == 0:
        return da, torch.zeros_like(capacity), torch.zeros_like(tau), dinit
    tau = tau.contiguous()
    tiles, finish_tiles, plain_tiles = (transport_tiles(E, kernel, device=plan.device) for kernel in ("adjoint", "finish", "plain"))
    programs, chunk = tiles.split(F, L)
    low, plain = new((L, T)), torch.empty(L, dtype=torch.int32, device=plan.device)
    partial = new((2, L, programs, 2, E))
    u, uf, fbar = new((L, T, F)), new((L, T, F)), new((L, F))
    z, v, xdx = new((L, T, E)), new((L, T, E)), new((L, programs))
    grad_l, grad_f, grad_e, vec_g = vector_strides(grad)
    a_l, a_f, a_e, vec = vector_strides(affinity)
    grad_strides = {"stride_gl": grad_l, "stride_gf": grad_f, "stride_ge": grad_e}
    a_strides = {"stride_al": a_l, "stride_af": a_f, "stride_ae": a_e, "VEC": vec}
    fixed = {"E": E, "EXACT_ROWS": exact_rows}
    common = {**fixed, **tiles.blocks, **tiles.options}
    potentials, sums = (history, count, low, plain), (u, uf, fbar, z, v)
    with device_guard(plan):
        _sinkhorn_adjoint_range_kernel[(L,)](
            *potentials, T, SAFE, E=E, BLOCK_E=triton.next_power_of_2(max(E, 16)), BLOCK_T=BLOCK_T, num_warps=4
        )
        _sinkhorn_adjoint_start_kernel[(programs, L)](
            plan, grad, *potentials, partial, u, fbar, F, T, chunk, **grad_strides, VEC=vec_g, **common
        )
        constants, keep = {**fixed, **tiles.blocks, "BLOCK_P": BLOCK_P}, aligned(plan, history, count)
        back = Launch(_sinkhorn_adjoint_step_kernel, (programs, L), (F, T, chunk), constants, tiles.options, keep=keep)
        for step in range(T, 0, -1):
            back(plan, *potentials, partial, *sums, dlogc, step)
        plain_sums = (partial, uf, fbar, z, v, dlogc, dinit)
        _sinkhorn_adjoint_plain_kernel[(L,)](
            *(affinity, tau, history, count, plain, *plain_sums, F, T, programs),
            **a_strides,
            **fixed,
            **plain_tiles.blocks,
            BLOCK_P=BLOCK_P,
            **plain_tiles.options,
        )
        _sinkhorn_adjoint_finish_kernel[(programs, L)](
            *(affinity, tau, plan, grad, history, count, plain, u, uf, z, v, da, xdx, F, T, chunk),
            **a_strides,
            **grad_strides,
            VEC_G=vec_g,
            NEEDS_TAU=needs_tau,
            **fixed,
            **finish_tiles.blocks,
            BLOCK_T=BLOCK_T,
            **finish_tiles.options,
        )
    dtau = -xdx.sum(1) / tau if needs_tau else torch.zeros_like(tau)
    return da, dlogc / capacity, dtau, dinit
