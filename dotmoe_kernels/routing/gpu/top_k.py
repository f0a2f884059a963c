# mypy: disable-error-code="no-untyped-def"
"""Top-K routing in Triton: one read of the logits [T, E] for everything, one kernel for its gradient. E <= 512.

An entry's key is the integer in the order of its value, then E - 1 - e: keys are unique, so ties go to the lower index, and the
K-th largest key tells the members in the original layout. The K largest keys are sorted; they hold value and index, so weights
need no gather. Each program goes through a run of tiles and leaves its counts, its sum of Q and of lse^2; a last small kernel
adds those in a fixed order. All in float32; the counts are whole numbers; no atomics. A model's router that nobody differentiates
leaves indices and unit weights alone, in the one launch.

    dZ = Q (G - <Q, G>) + Q 2 lse dz / tokens,   G = dQ + dw at the selected + E load dbalance / tokens
    renormalized weights are a softmax over the selected alone: dZ += w (dw - <w, dw>) there

Cost: forward one read and one write of [T, E] and 12 K bytes a token; backward the same with dprobs, else one read and one write.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
from ..._tiles import routing_finish_tile, routing_programs, routing_tile

LOWEST = tl.constexpr(-(2**62))  # below every key


@triton.jit
def order_keys(x, cols, E):
    """Unique int64 keys in the order of the float32 x [BLOCK_T, BLOCK_E], equal values by falling index; NaN is the lowest."""
    x = tl.where(x == x, x, float("-inf"))
    x = tl.where(x == 0, 0.0, x)  # -0 equals 0
    bits = x.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    key = order * 512 + (511 - cols).to(tl.int64)[None, :]
    return tl.where((cols < E)[None, :], key, LOWEST)


@triton.jit
def key_index(key):
    return 511 - (key & 511)


@triton.jit
def key_value(key):
    order = (key >> 9).to(tl.int32)
    return tl.where(order < 0, order ^ 0x7FFFFFFF, order).to(tl.float32, bitcast=True)


@triton.jit
def load_tile(ptr, rows, cols, T, E, stride_t, stride_e):
    inside = (rows < T)[:, None] & (cols < E)[None, :]
    at = rows.to(tl.int64)[:, None] * stride_t + cols.to(tl.int64)[None, :] * stride_e
    return tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def softmax_rows(z, inside):
    """(exp(z - lse), lse) of the columns ``inside``."""
    y = tl.where(inside, z, float("-inf"))
    top = tl.max(y, 1)
    e = tl.exp(y - top[:, None])
    total = tl.sum(e, 1)
    return e / total[:, None], top + tl.log(total)


@triton.jit
def scatter_slots(
    indices_ptr, dweights_ptr, rows, cols, live, K, stride_wt, stride_wk, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr
):
    """(dweights [BLOCK_T, BLOCK_E] at the selected experts, whether selected)."""
    grad = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    index_at = indices_ptr + rows * K
    dw_at = dweights_ptr + rows * stride_wt
    for _ in range(K):
        e = tl.load(index_at, mask=live, other=BLOCK_E)
        dw = tl.load(dw_at, mask=live, other=0.0).to(tl.float32)
        index_at += 1
        dw_at += stride_wk
        hit = cols[None, :] == e[:, None]
        grad = tl.where(hit, dw[:, None], grad)
        chosen = tl.where(hit, 1, chosen)
    return grad, chosen != 0


@triton.jit
def store_sums(count_ptr, sum_ptr, scalar_ptr, cols, E, count, q_sum, z_sum, tokens):
    """What a program leaves: count and sum of Q [E] each, (sum of lse^2, tokens)."""
    program = tl.program_id(0).to(tl.int64)
    tl.store(count_ptr + program * E + cols, tl.sum(count, 0), mask=cols < E)
    tl.store(sum_ptr + program * E + cols, tl.sum(q_sum, 0), mask=cols < E)
    tl.store(scalar_ptr + 2 * program, tl.sum(z_sum, 0))
    tl.store(scalar_ptr + 2 * program + 1, tl.sum(tokens, 0).to(tl.float32))  # below 2^24 a program


@triton.jit(do_not_specialize=["T", "E", "K", "experts", "chunk"])
def _route_top_k_kernel(
    logits_ptr,  # [T, E]
    mask_ptr,  # [T] int8, or None
    indices_ptr,  # [T, K] int64
    weights_ptr,  # [T, K]
    probs_ptr,  # [T, E], or None with the four below: indices and unit weights alone
    lse_ptr,  # [T]
    count_ptr,  # [programs, E] int32
    sum_ptr,  # [programs, E]
    scalar_ptr,  # [programs, 2]
    T,
    E,
    K,
    experts,  # E, or the first of the zero experts, whose choice is an empty slot
    chunk,  # rows of a program
    stride_zt,
    stride_ze,
    MODE: tl.constexpr,  # 0 unit, 1 softmax, 2 renormalized
    BLOCK_K: tl.constexpr,  # power of two, at most BLOCK_E
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, BLOCK_K)
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
        z = load_tile(logits_ptr, rows, cols, end, E, stride_zt, stride_ze)
        z = tl.where(valid[:, None], z, 0.0)  # a padding row may hold anything
        key = order_keys(z, cols, E)
        if BLOCK_K < BLOCK_E:
            best = tl.topk(key, BLOCK_K)  # [BLOCK_T, BLOCK_K], descending
        else:
            best = tl.sort(key, descending=True)
        used = (slots < K)[None, :]
        row = rows.to(tl.int64)
        if probs_ptr is not None:
            q, lse = softmax_rows(z, inside)
            last = tl.min(tl.where(used, best, -LOWEST), 1)
            count += ((key >= last[:, None]) & inside & valid[:, None]).to(tl.int32)
            q_sum += tl.where(inside & valid[:, None], q, 0.0)
            z_sum += tl.where(valid, lse * lse, 0.0)
            tokens += valid.to(tl.int32)
            tl.store(probs_ptr + row[:, None] * E + cols[None, :], q, mask=live[:, None] & inside)
            tl.store(lse_ptr + row, lse, mask=live)
        if MODE == 0:
            w = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32) + 1.0
        elif MODE == 1:
            w = tl.exp(key_value(best) - lse[:, None])
        else:
            w, _ = softmax_rows(key_value(best), used)
        index = key_index(best)
        chosen = valid[:, None] & (index < experts)
        at = row[:, None] * K + slots[None, :]
        tl.store(indices_ptr + at, tl.where(chosen, index, experts), mask=live[:, None] & used)
        tl.store(weights_ptr + at, tl.where(chosen, w, 0.0), mask=live[:, None] & used)
    if probs_ptr is not None:
        store_sums(count_ptr, sum_ptr, scalar_ptr, cols, E, count, q_sum, z_sum, tokens)


@triton.jit(do_not_specialize=["programs", "E"])
def _route_finish_kernel(
    count_ptr,  # [programs, E] int32
    sum_ptr,  # [programs, E]
    scalar_ptr,  # [programs, 2]
    load_ptr,  # [E]
    losses_ptr,  # [3]: balance, z, tokens
    programs,
    E,
    BLOCK_P: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.int32)
    q_sum = tl.zeros([BLOCK_P, BLOCK_E], dtype=tl.float32)
    z_sum = tl.zeros([BLOCK_P], dtype=tl.float32)
    tokens = tl.zeros([BLOCK_P], dtype=tl.float32)
    for first in range(0, programs, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        there = p < programs
        inside = there[:, None] & (cols < E)[None, :]
        at = p.to(tl.int64)[:, None] * E + cols[None, :]
        count += tl.load(count_ptr + at, mask=inside, other=0)
        q_sum += tl.load(sum_ptr + at, mask=inside, other=0.0)
        z_sum += tl.load(scalar_ptr + 2 * p, mask=there, other=0.0)
        tokens += tl.load(scalar_ptr + 2 * p + 1, mask=there, other=0.0)
    total = tl.sum(count, 0)  # [BLOCK_E]
    load = total.to(tl.float32) / tl.maximum(tl.sum(total.to(tl.int64), 0), 1).to(tl.float32)  # T K may pass 2^31
    n = tl.maximum(tl.sum(tokens, 0), 1.0)
    tl.store(load_ptr + cols, load, mask=cols < E)
    tl.store(losses_ptr, E * tl.sum(load * tl.sum(q_sum, 0), 0) / n)
    tl.store(losses_ptr + 1, tl.sum(z_sum, 0) / n)
    tl.store(losses_ptr + 2, n)


@triton.jit(do_not_specialize=["T", "E", "K"])
def _route_top_k_backward_kernel(
    logits_ptr,  # [T, E]
    indices_ptr,  # [T, K] int64
    load_ptr,  # [E]
    losses_ptr,  # [3]
    lse_ptr,  # [T]
    dweights_ptr,  # [T, K], or None
    dprobs_ptr,  # [T, E], or None
    dlosses_ptr,  # [3], or None
    dlogits_ptr,  # [T, E]
    T,
    E,
    K,
    stride_zt,
    stride_ze,
    stride_wt,
    stride_wk,
    stride_qt,
    stride_qe,
    stride_l,
    RENORMALIZED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_E)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    inside = (cols < E)[None, :]
    valid = tl.load(indices_ptr + rows * K, mask=live, other=E) < E
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    z = tl.where(valid[:, None], load_tile(logits_ptr, rows, cols, T, E, stride_zt, stride_ze), 0.0)
    q = tl.where(inside, tl.exp(z - lse[:, None]), 0.0)
    g = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    extra = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    of_z = tl.zeros([BLOCK_T], dtype=tl.float32)
    if dprobs_ptr is not None:
        g += load_tile(dprobs_ptr, rows, cols, T, E, stride_qt, stride_qe)
    if dlosses_ptr is not None:
        tokens = tl.load(losses_ptr + 2)
        dbalance = tl.load(dlosses_ptr)
        dz = tl.load(dlosses_ptr + stride_l)
        g += (tl.load(load_ptr + cols, mask=cols < E, other=0.0) * (E * dbalance / tokens))[None, :]
        of_z += 2 * lse * dz / tokens
    if dweights_ptr is not None:
        dw, chosen = scatter_slots(indices_ptr, dweights_ptr, rows, cols, live, K, stride_wt, stride_wk, BLOCK_T, BLOCK_E)
        if RENORMALIZED:
            w, _ = softmax_rows(z, chosen | (valid == 0)[:, None])
            w = tl.where(chosen, w, 0.0)
            extra = w * (dw - tl.sum(w * dw, 1)[:, None])
        else:
            g += dw
    dlogits = q * (g - tl.sum(q * g, 1)[:, None] + of_z[:, None]) + extra
    at = rows[:, None] * E + cols[None, :]
    tl.store(dlogits_ptr + at, tl.where(valid[:, None], dlogits, 0.0), mask=live[:, None] & inside)


_MODES = {"unit": 0, "softmax": 1, "renormalized": 2}


def row_programs(T: int, block_t: int, device: torch.device) -> tuple[int, int]:
    """(programs, rows of each)"""
    chunk = triton.cdiv(triton.cdiv(T, block_t), routing_programs(device)) * block_t
    return triton.cdiv(T, chunk) if T else 0, chunk


class Plan(NamedTuple):
    """How the rows of a forward are shared among programs, and its two launches."""

    programs: int
    route: Launch
    finish: Launch


@lru_cache(maxsize=MOST_PLANS)
def finish_launch(E: int, programs: int, device: torch.device) -> Launch:
    """Of ``Outputs``: count, sums, scalars, load, losses."""
    return Launch(_route_finish_kernel, (1,), (programs, E), *routing_finish_tile(E), keep=True)


@lru_cache(maxsize=MOST_PLANS)
def _plan(
    shape: tuple[int, int],
    strides: tuple[int, int],
    top_k: int,
    experts: int,
    weights: str,
    keep: bool,
    device: torch.device,
    *types: object,
) -> Plan:
    """Of logits [T, E]; ``types``: whatever else the kernel is compiled for."""
    (T, E), (tile, options) = shape, routing_tile(shape[1])
    programs, chunk = row_programs(T, tile["BLOCK_T"], device)
    constants = {"MODE": _MODES[weights], "BLOCK_K": min(triton.next_power_of_2(top_k), tile["BLOCK_E"]), **tile}
    route = Launch(_route_top_k_kernel, (programs,), (T, E, top_k, experts, chunk, *strides), constants, options, keep=keep)
    return Plan(programs, route, finish_launch(E, programs, device))


class Outputs:
    """Empty outputs of a forward, and the sums that its programs leave."""

    def __init__(self, logits: Tensor, slots: int, programs: int) -> None:
        (T, E), device, empty = logits.shape, logits.device, torch.empty  # sizes one by one: a tuple takes half as long again
        self.indices = empty(T, slots, dtype=torch.int64, device=device)
        self.weights = empty(T, slots, dtype=torch.float32, device=device)
        self.probs = empty(T, E, dtype=torch.float32, device=device)
        self.load = empty(E, dtype=torch.float32, device=device)
        self.losses = empty(3, dtype=torch.float32, device=device)
        self.lse = empty(T, dtype=torch.float32, device=device)
        self.count = empty(programs, E, dtype=torch.int32, device=device)
        self.sums = empty(programs, E, dtype=torch.float32, device=device)
        self.scalars = empty(programs, 2, dtype=torch.float32, device=device)

    def finish(self, launch: Launch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        launch(self.count, self.sums, self.scalars, self.load, self.losses)
        return self.weights, self.indices, self.probs, self.load, self.losses, self.lse


def byte_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.int8)


def forward(logits: Tensor, mask: Tensor | None, top_k: int, weights: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [T, E] any strides, mask [T] bool -> weights, indices [T, K], probs [T, E], load [E], losses [3], lse [T]."""
    shape, bytes_ = logits.shape, byte_mask(mask)
    keep = aligned(logits, bytes_)
    plan = _plan(shape, logits.stride(), top_k, shape[1], weights, keep, logits.device, logits.dtype, mask is None)
    out = Outputs(logits, top_k, plan.programs)
    with device_guard(logits):
        if plan.programs:
            plan.route(logits, bytes_, out.indices, out.weights, out.probs, out.lse, out.count, out.sums, out.scalars)
        return out.finish(plan.finish)


def choose(logits: Tensor, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
    """logits [T, E] any strides, of which the columns from ``experts`` on are zero experts -> unit weights, indices [T, K]."""
    shape, device = logits.shape, logits.device
    weights = torch.empty(shape[0], top_k, dtype=torch.float32, device=device)
    indices = torch.empty(shape[0], top_k, dtype=torch.int64, device=device)
    if shape[0] == 0:
        return weights, indices
    plan = _plan(shape, logits.stride(), top_k, experts, "unit", aligned(logits), device, logits.dtype, "alone")
    with device_guard(logits):
        plan.route(logits, None, indices, weights, None, None, None, None, None)
    return weights, indices


def pair(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def backward(
    logits: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
    mode: str,
) -> Tensor:
    """dlogits [T, E] in the dtype of the logits; gradients may have any strides."""
    T, E = logits.shape
    dlogits = torch.empty((T, E), dtype=logits.dtype, device=logits.device)
    tile, options = routing_tile(E)
    if T:
        with device_guard(logits):
            _route_top_k_backward_kernel[(triton.cdiv(T, tile["BLOCK_T"]),)](
                logits,
                indices,
                load,
                losses,
                lse,
                dweights,
                dprobs,
                dlosses,
                dlogits,
                T,
                E,
                indices.shape[1],
                *logits.stride(),
                *pair(dweights),
                *pair(dprobs),
                0 if dlosses is None else dlosses.stride(0),
                RENORMALIZED=mode == "renormalized",
                **tile,
                **options,
            )
    return dlogits
