# mypy: disable-error-code="no-untyped-def"
"""SoftMoE routing in Triton: sort, LapSum, truncation, cap, load and losses in one kernel, its gradient in another. E <= 512.

Keys as in ``gpu.py``, all sorted, so that the scans of LapSum run over them; p of the sorted keys gives the slots that are kept:
the first always, then those with p > theta, at most max_active. The balance loss takes q = p / sum p. LapSum in float64.

    dp = dprobs + dw at the kept + (c - <c, q>) / sum p,   c = E load dbalance / tokens;   then the gradient of LapSum,
    dscores += softmax(scores) 2 lse dz / tokens

Cost: one read and one write of [T, E] each way, and 12 max_active bytes a token.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
from ..._tiles import soft_routing_tile, soft_top_k_tile
from ...soft_topk.gpu import laplace, laplace_gradient, laplace_offset
from .top_k import (
    Outputs,
    Plan,
    byte_mask,
    finish_launch,
    key_index,
    key_value,
    load_tile,
    order_keys,
    pair,
    row_programs,
    scatter_slots,
    softmax_rows,
    store_sums,
)


@triton.jit(do_not_specialize=["T", "E", "K", "chunk", "threshold"])
def _route_soft_top_k_kernel(
    scores_ptr,  # [T, E]
    k_ptr,  # [T] float64
    temperature_ptr,  # [T] float64
    mask_ptr,  # [T] int8, or None
    indices_ptr,  # [T, K] int64
    weights_ptr,  # [T, K]
    probs_ptr,  # [T, E]
    lse_ptr,  # [T]
    solution_ptr,  # [T, 2] float64
    count_ptr,  # [programs, E] int32
    sum_ptr,  # [programs, E]
    scalar_ptr,  # [programs, 2]
    threshold,
    T,
    E,
    K,  # max_active
    chunk,
    stride_st,
    stride_se,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_E)  # experts, and places of the sorted row
    inside = (cols < E)[None, :]
    count = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    q_sum = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    z_sum = tl.zeros([BLOCK_T], dtype=tl.float32)
    tokens = tl.zeros([BLOCK_T], dtype=tl.int32)
    begin = tl.program_id(0) * chunk
    end = tl.minimum(begin + chunk, T)
    for first in range(begin, end, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        live = rows < end
        valid = live
        if mask_ptr is not None:
            valid = live & (tl.load(mask_ptr + rows, mask=live, other=0) != 0)
        row = rows.to(tl.int64)
        r = load_tile(scores_ptr, rows, cols, end, E, stride_st, stride_se)
        r = tl.where(valid[:, None], r, 0.0)  # a padding row may hold anything
        k = tl.load(k_ptr + row, mask=live, other=0.5)
        alpha = tl.load(temperature_ptr + row, mask=live, other=1.0)
        _, lse = softmax_rows(r, inside)
        key = order_keys(r, cols, E)
        best = tl.sort(key, descending=True)
        s = key_value(best).to(tl.float64) / alpha[:, None]
        pivot, offset = laplace_offset(s, k, cols, E)
        ranked = laplace((s - pivot[:, None]) - offset[:, None]).to(tl.float32)
        p = laplace((r.to(tl.float64) / alpha[:, None] - pivot[:, None]) - offset[:, None]).to(tl.float32)
        p = tl.where(inside, p, 0.0)
        keep = ((ranked > threshold) | (cols == 0)[None, :]) & (cols < K)[None, :] & valid[:, None]
        last = tl.min(tl.where(keep, best, 1 << 62), 1)
        count += ((key >= last[:, None]) & inside).to(tl.int32)
        q_sum += tl.where(valid[:, None], p / tl.sum(p, 1)[:, None], 0.0)
        z_sum += tl.where(valid, lse * lse, 0.0)
        tokens += valid.to(tl.int32)
        stored = live[:, None] & (cols < K)[None, :]
        at = row[:, None] * K + cols[None, :]
        tl.store(indices_ptr + at, tl.where(keep, key_index(best), E), mask=stored)
        tl.store(weights_ptr + at, tl.where(keep, ranked, 0.0), mask=stored)
        tl.store(probs_ptr + row[:, None] * E + cols[None, :], p, mask=live[:, None] & inside)
        tl.store(lse_ptr + row, lse, mask=live)
        tl.store(solution_ptr + 2 * row, pivot, mask=live)
        tl.store(solution_ptr + 2 * row + 1, offset, mask=live)
    store_sums(count_ptr, sum_ptr, scalar_ptr, cols, E, count, q_sum, z_sum, tokens)


@triton.jit(do_not_specialize=["T", "E", "K"])
def _route_soft_top_k_backward_kernel(
    scores_ptr,  # [T, E]
    temperature_ptr,  # [T] float64
    indices_ptr,  # [T, K] int64
    load_ptr,  # [E]
    losses_ptr,  # [3]
    lse_ptr,  # [T]
    solution_ptr,  # [T, 2] float64
    dweights_ptr,  # [T, K], or None
    dprobs_ptr,  # [T, E], or None
    dlosses_ptr,  # [3], or None
    dscores_ptr,  # [T, E]
    dk_ptr,  # [T] float64
    dtemperature_ptr,  # [T] float64
    T,
    E,
    K,
    stride_st,
    stride_se,
    stride_wt,
    stride_wk,
    stride_pt,
    stride_pe,
    stride_l,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    inside = (cols < E)[None, :]
    valid = tl.load(indices_ptr + rows * K, mask=live, other=E) < E
    r = tl.where(valid[:, None], load_tile(scores_ptr, rows, cols, T, E, stride_st, stride_se), 0.0)
    alpha = tl.load(temperature_ptr + rows, mask=live, other=1.0)
    pivot = tl.load(solution_ptr + 2 * rows, mask=live, other=0.0)
    offset = tl.load(solution_ptr + 2 * rows + 1, mask=live, other=0.0)
    g = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    of_z = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    if dweights_ptr is not None:
        dw, _ = scatter_slots(indices_ptr, dweights_ptr, rows, cols, live, K, stride_wt, stride_wk, BLOCK_T, BLOCK_E)
        g += dw
    if dprobs_ptr is not None:
        g += load_tile(dprobs_ptr, rows, cols, T, E, stride_pt, stride_pe)
    if dlosses_ptr is not None:
        tokens = tl.load(losses_ptr + 2)
        dbalance = tl.load(dlosses_ptr)
        dz = tl.load(dlosses_ptr + stride_l)
        lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
        p = laplace((r.to(tl.float64) / alpha[:, None] - pivot[:, None]) - offset[:, None]).to(tl.float32)
        p = tl.where(inside, p, 0.0)
        total = tl.sum(p, 1)
        c = tl.load(load_ptr + cols, mask=cols < E, other=0.0) * (E * dbalance / tokens)
        g += (c[None, :] - (tl.sum(p * c[None, :], 1) / total)[:, None]) / total[:, None]
        of_z = tl.exp(r - lse[:, None]) * (2 * lse * dz / tokens)[:, None]
    g = tl.where(valid[:, None] & inside, g, 0.0)
    dr, dk, dalpha = laplace_gradient(r.to(tl.float64), alpha, pivot, offset, g.to(tl.float64), inside)
    dscores = tl.where(valid[:, None], dr.to(tl.float32) + of_z, 0.0)
    tl.store(dscores_ptr + rows[:, None] * E + cols[None, :], dscores, mask=live[:, None] & inside)
    tl.store(dk_ptr + rows, dk, mask=live)
    tl.store(dtemperature_ptr + rows, dalpha, mask=live)


@lru_cache(maxsize=MOST_PLANS)
def _plan(
    shape: tuple[int, int],
    strides: tuple[int, int],
    max_active: int,
    keep: bool,
    device: torch.device,
    *types: object,
) -> Plan:
    """Of scores [T, E]; ``types``: whatever else the kernel is compiled for."""
    (T, E), (tile, options) = shape, soft_routing_tile(shape[1])
    programs, chunk = row_programs(T, tile["BLOCK_T"], device)
    route = Launch(_route_soft_top_k_kernel, (programs,), (T, E, max_active, chunk, *strides), tile, options, keep=keep)
    return Plan(programs, route, finish_launch(E, programs, device))


def forward(
    scores: Tensor, k: Tensor, temperature: Tensor, mask: Tensor | None, threshold: float, max_active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scores [T, E] any strides, k and temperature [T] float64 -> weights, indices [T, K], probs [T, E], load [E], losses [3],
    lse [T], solution [T, 2] float64."""
    k, temperature, bytes_ = k.contiguous(), temperature.contiguous(), byte_mask(mask)
    keep = aligned(scores, k, temperature, bytes_)
    plan = _plan(scores.shape, scores.stride(), max_active, keep, scores.device, scores.dtype, mask is None)
    out = Outputs(scores, max_active, plan.programs)
    solution = torch.empty((scores.shape[0], 2), dtype=torch.float64, device=scores.device)
    with device_guard(scores):
        if plan.programs:
            outputs = (out.indices, out.weights, out.probs, out.lse, solution, out.count, out.sums, out.scalars)
            plan.route(scores, k, temperature, bytes_, *outputs, threshold)
        return *out.finish(plan.finish), solution


def backward(
    scores: Tensor,
    temperature: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    solution: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dscores [T, E] in the dtype of the scores, dk and dtemperature [T] float64."""
    T, E = scores.shape
    dscores = torch.empty((T, E), dtype=scores.dtype, device=scores.device)
    dk, dtemperature = (torch.empty(T, dtype=torch.float64, device=scores.device) for _ in range(2))
    tile, options = soft_top_k_tile(E)
    if T:
        with device_guard(scores):
            _route_soft_top_k_backward_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
                scores,
                temperature.contiguous(),
                indices,
                load,
                losses,
                lse,
                solution,
                dweights,
                dprobs,
                dlosses,
                dscores,
                dk,
                dtemperature,
                T,
                E,
                indices.shape[1],
                *scores.stride(),
                *pair(dweights),
                *pair(dprobs),
                0 if dlosses is None else dlosses.stride(0),
                **tile,
                **options,
            )
    return dscores, dk, dtemperature
