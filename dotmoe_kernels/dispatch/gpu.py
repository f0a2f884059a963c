# mypy: disable-error-code="no-untyped-def"
"""Dispatch in Triton: a stable counting sort of the routed pairs, rows out to their slots, weighted sums of rows back.

The sort: (1) a program counts the experts of its BLOCK_S pairs; (2) one program an expert turns the counts of all blocks into
exclusive sums; (3) a program sorts the keys (expert, position) of its block on the chip, so that the run of each expert is in
order and next to each other, and moves every run to offsets[e] + the expert's pairs in earlier blocks. Few pairs: (3) alone.
No order depends on an atomic. An index outside [0, E], which a GPU cannot report, counts as an empty slot.

Rows: a token's row is read once and written to its K slots; a token's K slots are summed in the accumulator's dtype (float32,
or float64 for float64 rows) in the order of j. A slot of at least offsets[E] is never read, and is written as zeros.

Cost: the sort reads the indices twice (the second time from L2) and writes 20 bytes a pair; scatter moves (1 + K) rows a token,
gather as many, its backward pass twice as many (once K less without dweights).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import MOST_PLANS, Launch, aligned, device_guard
from .._tiles import dispatch_tile, row_tile

MOST_EXPERTS = 1024  # a histogram's bins lie in registers


@triton.jit
def _experts_of(indices_ptr, start, S, K, E, stride_t, stride_k, BLOCK_S: tl.constexpr):
    """Experts of the pairs [start, start + BLOCK_S): E is an empty slot, E + 1 lies beyond the last pair."""
    lane = tl.arange(0, BLOCK_S)
    pair = start + lane
    live = lane < S - start
    t = pair // K
    at = indices_ptr + t.to(tl.int64) * stride_t + (pair - t * K).to(tl.int64) * stride_k
    e = tl.load(at, mask=live, other=0)
    e = tl.where((e >= 0) & (e < E), e, E).to(tl.int32)
    return tl.where(live, e, E + 1)


@triton.jit(do_not_specialize=["S", "K", "E", "blocks", "stride_t"])  # one binary for all sizes
def _dispatch_count_kernel(
    indices_ptr,  # [T, K]
    table_ptr,  # [E, blocks + 1]: pairs of expert e in block b
    S,
    K,
    E,
    blocks,
    stride_t,
    stride_k,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    expert = _experts_of(indices_ptr, block * BLOCK_S, S, K, E, stride_t, stride_k, BLOCK_S)
    routed = expert < E
    count = tl.histogram(tl.where(routed, expert, 0), BLOCK_E, mask=routed)
    e = tl.arange(0, BLOCK_E)
    tl.store(table_ptr + e.to(tl.int64) * (blocks + 1) + block, count, mask=e < E)


@triton.jit(do_not_specialize=["blocks"])
def _dispatch_scan_kernel(
    table_ptr,  # [E, blocks + 1]: counts in, exclusive sums out; the last entry is the expert's total
    blocks,
    BLOCK_B: tl.constexpr,
):
    table_ptr += tl.program_id(0).to(tl.int64) * (blocks + 1)
    carry = tl.full((), 0, tl.int32)
    for start in range(0, blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        count = tl.load(table_ptr + b, mask=b < blocks, other=0)
        tl.store(table_ptr + b, carry + tl.cumsum(count, 0) - count, mask=b < blocks)
        carry += tl.sum(count, 0)
    tl.store(table_ptr + blocks, carry)


@triton.jit(do_not_specialize=["S", "K", "E", "blocks", "stride_t"])
def _dispatch_place_kernel(
    indices_ptr,  # [T, K]
    table_ptr,  # [E, blocks + 1]: pairs of expert e before block b
    token_ptr,  # [S]
    source_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    slot_ptr,  # [S]: routed pair -> slot
    S,
    K,
    E,
    blocks,
    stride_t,
    stride_k,
    ALONE: tl.constexpr,  # one block, and no table
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    block = tl.program_id(0)
    start = block * BLOCK_S
    lane = tl.arange(0, BLOCK_S)
    expert = _experts_of(indices_ptr, start, S, K, E, stride_t, stride_k, BLOCK_S)
    e = tl.arange(0, BLOCK_E)
    if ALONE:
        routed = expert < E
        count = tl.histogram(tl.where(routed, expert, 0), BLOCK_E, mask=routed)
        before = tl.zeros_like(count)
        total = count
    else:
        row = table_ptr + e.to(tl.int64) * (blocks + 1)
        before = tl.load(row + block, mask=e < E, other=0)
        count = tl.load(row + block + 1, mask=e < E, other=0)
        total = tl.load(row + blocks, mask=e < E, other=0)
        count -= before
    end = tl.cumsum(total, 0)
    if block == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + e, end, mask=e < E)
    # a run begins at the sum of the counts before it in the sorted block, and belongs behind the expert's earlier pairs
    shift = (end - total + before) - (tl.cumsum(count, 0) - count)
    # empty slots: behind all used ones and those of earlier blocks, and in the block behind its used ones
    shift_empty = tl.sum(total, 0) + (start - tl.sum(before, 0)) - tl.sum(count, 0)

    key = tl.sort(expert * BLOCK_S + lane)
    expert = key // BLOCK_S
    pair = start + key % BLOCK_S
    slot = lane + tl.where(expert < E, tl.gather(shift, tl.minimum(expert, BLOCK_E - 1), 0), shift_empty)
    live = expert <= E
    at = slot.to(tl.int64)
    tl.store(token_ptr + at, (pair // K).to(tl.int64), mask=live)
    tl.store(source_ptr + at, pair.to(tl.int64), mask=live)
    tl.store(slot_ptr + pair.to(tl.int64), slot, mask=live)


@triton.jit(do_not_specialize=["S"])
def _inverse_slots_kernel(
    source_ptr,  # [S]: slot -> routed pair
    slot_ptr,  # [S]: routed pair -> slot
    S,
    BLOCK_S: tl.constexpr,
):
    lane = tl.arange(0, BLOCK_S)
    start = tl.program_id(0) * BLOCK_S
    live = lane < S - start
    slot = start + lane
    pair = tl.load(source_ptr + slot.to(tl.int64), mask=live, other=-1).to(tl.int64)
    tl.store(slot_ptr + pair, slot, mask=live & (pair >= 0) & (pair < S))


@triton.jit(do_not_specialize=["S", "K", "E", "per_program"])
def _scatter_rows_kernel(
    x_ptr,  # [T, H]
    slot_ptr,  # [T, K]
    offsets_ptr,  # [E + 1]
    xs_ptr,  # [S, H]
    S,
    H,
    K,
    E,
    per_program,  # slots of a token that one program writes
    stride_xt,
    stride_xh,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    first = tl.program_id(2) * per_program
    inside = h < H
    used = tl.minimum(tl.load(offsets_ptr + E), S)
    x = tl.load(x_ptr + t * stride_xt + h.to(tl.int64) * stride_xh, mask=inside, other=0.0)
    for j in range(first, tl.minimum(first + per_program, K)):
        slot = tl.load(slot_ptr + t * K + j)
        there = h < tl.where((slot >= 0) & (slot < S), H, 0)
        tl.store(xs_ptr + slot.to(tl.int64) * H + h, tl.where(slot < used, x, 0.0).to(x.dtype), mask=there)


@triton.jit(do_not_specialize=["S", "K", "E", "stride_wt"])
def _gather_rows_kernel(
    ys_ptr,  # [S, H]
    weights_ptr,  # [T, K] or None
    slot_ptr,  # [T, K]
    offsets_ptr,  # [E + 1]
    y_ptr,  # [T, H]
    S,
    H,
    K,
    E,
    stride_ys,
    stride_yh,
    stride_wt,
    stride_wk,
    stride_ot,
    HAS_WEIGHTS: tl.constexpr,
    SUM: tl.constexpr,  # dtype of the sums
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)).to(tl.int64)
    inside = h < H
    used = tl.minimum(tl.load(offsets_ptr + E), S)
    total = tl.zeros((BLOCK_H,), SUM)
    if HAS_WEIGHTS:
        weights_ptr += t * stride_wt
    for j in tl.range(0, K, loop_unroll_factor=4):
        slot = tl.load(slot_ptr + t * K + j)
        live = (slot >= 0) & (slot < used)
        at = ys_ptr + slot.to(tl.int64) * stride_ys + h * stride_yh
        row = tl.load(at, mask=h < tl.where(live, H, 0), other=0.0).to(SUM)
        if HAS_WEIGHTS:
            row *= tl.load(weights_ptr, mask=live, other=0.0).to(SUM)
            weights_ptr += stride_wk
        total += row
    tl.store(y_ptr + t * stride_ot + h, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "K", "E", "per_program", "stride_wt"])
def _gather_rows_bwd_kernel(
    dy_ptr,  # [T, H]
    ys_ptr,  # [S, H]
    weights_ptr,  # [T, K] or None
    slot_ptr,  # [T, K]
    offsets_ptr,  # [E + 1]
    dys_ptr,  # [S, H]
    dweights_ptr,  # [T, K]
    S,
    H,
    K,
    E,
    per_program,
    stride_dt,
    stride_dh,
    stride_ys,
    stride_yh,
    stride_wt,
    stride_wk,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,  # dys is wanted
    DOTS: tl.constexpr,  # dweights is wanted
    SUM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * per_program
    used = tl.minimum(tl.load(offsets_ptr + E), S)
    if HAS_WEIGHTS:
        weights_ptr += t * stride_wt + first.to(tl.int64) * stride_wk
    for j in range(first, tl.minimum(first + per_program, K)):
        slot = tl.load(slot_ptr + t * K + j)
        there = (slot >= 0) & (slot < S)
        live = there & (slot < used)
        slot = slot.to(tl.int64)
        if HAS_WEIGHTS:
            w = tl.load(weights_ptr, mask=live, other=0.0).to(SUM)
            weights_ptr += stride_wk
        dots = tl.zeros((BLOCK_H,), SUM)
        for start in range(0, H, BLOCK_H):
            h = (start + tl.arange(0, BLOCK_H)).to(tl.int64)
            inside = h < H
            dy = tl.load(dy_ptr + t * stride_dt + h * stride_dh, mask=inside, other=0.0).to(SUM)  # from L1 after the first j
            if DOTS:
                dots += dy * tl.load(ys_ptr + slot * stride_ys + h * stride_yh, mask=h < tl.where(live, H, 0), other=0.0).to(SUM)
            if ROWS:
                if HAS_WEIGHTS:
                    dy *= w
                dys = tl.where(live, dy, 0.0).to(dys_ptr.dtype.element_ty)
                tl.store(dys_ptr + slot * H + h, dys, mask=h < tl.where(there, H, 0))
        if DOTS:
            dweight = tl.where(live, tl.sum(dots, 0), 0.0).to(dweights_ptr.dtype.element_ty)
            tl.store(dweights_ptr + t * K + j, dweight)


# --- launchers ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=MOST_PLANS)
def _sort_plan(
    shape: tuple[int, int], strides: tuple[int, int], num_experts: int, keep: bool, *types: object
) -> tuple[int, tuple[Launch, ...]]:
    """(blocks, launches) of indices [T, K]; ``types``: what else the kernels are compiled for."""
    S = shape[0] * shape[1]
    tile, scan, options = dispatch_tile(S, num_experts)
    blocks = triton.cdiv(S, tile["BLOCK_S"])
    sizes = (S, shape[1], num_experts, blocks, *strides)
    place = Launch(_dispatch_place_kernel, (blocks,), sizes, {"ALONE": blocks == 1, **tile}, options, keep=keep)
    if blocks == 1:
        return blocks, (place,)
    count = Launch(_dispatch_count_kernel, (blocks,), sizes, tile, options, keep=keep)
    return blocks, (count, Launch(_dispatch_scan_kernel, (num_experts,), (blocks,), scan, options, keep=keep), place)


def sort_slots(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token [S] int64, source [S] int64, offsets [E + 1] int32 and slot_of [T, K] int32 of indices [T, K], any strides."""
    S, device = indices.numel(), indices.device
    token = torch.empty(S, dtype=torch.int64, device=device)
    source = torch.empty(S, dtype=torch.int64, device=device)
    slot_of = torch.empty(indices.shape, dtype=torch.int32, device=device)
    if S == 0:
        return token, source, torch.zeros(num_experts + 1, dtype=torch.int32, device=device), slot_of
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    blocks, launches = _sort_plan(indices.shape, indices.stride(), num_experts, aligned(indices), device, indices.dtype)
    with device_guard(indices):
        table = None
        if blocks > 1:
            count, scan, _ = launches
            table = torch.empty((num_experts, blocks + 1), dtype=torch.int32, device=device)
            count(indices, table)
            scan(table)
        launches[-1](indices, table, token, source, offsets, slot_of)
    return token, source, offsets, slot_of


@lru_cache(maxsize=MOST_PLANS)
def _inverse_plan(S: int, keep: bool, *types: object) -> Launch:
    return Launch(_inverse_slots_kernel, (triton.cdiv(S, 1024),), (S,), {"BLOCK_S": 1024}, {"num_warps": 4}, keep=keep)


def inverse(source: Tensor) -> Tensor:
    S = source.numel()
    source, slot_of = source.contiguous(), torch.empty(S, dtype=torch.int32, device=source.device)
    if S > 0:
        with device_guard(source):
            _inverse_plan(S, aligned(source), source.device, source.dtype)(source, slot_of)
    return slot_of


def _sum_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _share(T: int, K: int) -> int:
    """How many of a token's slots a program takes: all of them, unless there are too few tokens for the machine."""
    return max(1, min(K, T * K // 2048))


@lru_cache(maxsize=MOST_PLANS)
def _scatter_plan(
    pairs: tuple[int, int], H: int, E: int, strides: tuple[int, int], dtype: torch.dtype, keep: bool, *types: object
) -> Launch:
    """Of x [T, H] with these strides and slot_of [T, K]; ``types``: what else the kernel is compiled for."""
    (T, K), (tile, options) = pairs, row_tile(H, dtype)
    share = _share(T, K)
    grid = (T, triton.cdiv(H, tile["BLOCK_H"]), triton.cdiv(K, share))
    return Launch(_scatter_rows_kernel, grid, (T * K, H, K, E, share, *strides), tile, options, keep=keep)


def scatter_rows(x: Tensor, slot_of: Tensor, offsets: Tensor) -> Tensor:
    (T, K), H = slot_of.shape, x.shape[1]
    xs = x.new_empty(T * K, H)
    if xs.numel() == 0:
        return xs
    slot_of, offsets = slot_of.contiguous(), offsets.contiguous()
    keep, types = aligned(x, slot_of, offsets), (x.device, slot_of.dtype, offsets.dtype)
    launch = _scatter_plan((T, K), H, offsets.numel() - 1, x.stride(), x.dtype, keep, *types)
    with device_guard(x):
        launch(x, slot_of, offsets, xs)
    return xs


@lru_cache(maxsize=MOST_PLANS)
def _gather_plan(
    pairs: tuple[int, int],
    H: int,
    E: int,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    keep: bool,
    *types: object,
) -> Launch:
    """Of ys [S, H], slot_of [T, K], and strides of ys, weights and rows of y; ``types``: what else the kernel is compiled for."""
    (T, K), (tile, options) = pairs, row_tile(H, dtype)
    constants = {"HAS_WEIGHTS": weighted, "SUM": _sum_dtype(dtype), **tile}
    grid = (T, triton.cdiv(H, tile["BLOCK_H"]))
    return Launch(_gather_rows_kernel, grid, (T * K, H, K, E, *strides), constants, options, keep=keep)


def gather_rows(ys: Tensor, weights: Tensor | None, slot_of: Tensor, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """y [T, H]; ``out``: where to write it, some columns of a wider tensor."""
    (T, K), H = slot_of.shape, ys.shape[1]
    y = ys.new_empty(T, H) if out is None else out
    if T * H == 0:
        return y
    slot_of, offsets = slot_of.contiguous(), offsets.contiguous()
    strides = (*ys.stride(), *((0, 1) if weights is None else weights.stride()), y.stride(0))
    keep, types = aligned(ys, weights, slot_of, offsets, y), (ys.device, slot_of.dtype, offsets.dtype, y.dtype)
    launch = _gather_plan(
        *((T, K), H, offsets.numel() - 1, strides, ys.dtype, weights is not None, keep),
        *types,
        None if weights is None else weights.dtype,
    )
    with device_guard(ys):
        launch(ys, weights, slot_of, offsets, y)
    return y


def gather_rows_backward(
    grad: Tensor, ys: Tensor | None, weights: Tensor | None, slot_of: Tensor, offsets: Tensor, needs_ys: bool
) -> tuple[Tensor, Tensor]:
    """dys [S, H] (empty unless needed) and dweights [T, K] (empty where ys or weights is None)."""
    (T, K), H = slot_of.shape, grad.shape[1]
    dots = ys is not None and weights is not None
    dys = grad.new_empty((T * K, H) if needs_ys else 0)
    dweights = weights.new_empty(T, K) if dots and weights is not None else grad.new_empty(0)
    if T * K == 0:
        return dys, dweights
    tile, options = row_tile(H, grad.dtype)
    share = _share(T, K)
    with device_guard(grad):
        _gather_rows_bwd_kernel[T, triton.cdiv(K, share)](
            grad,
            ys if dots else None,
            weights,
            slot_of.contiguous(),
            offsets.contiguous(),
            dys if needs_ys else None,
            dweights if dots else None,
            T * K,
            H,
            K,
            offsets.numel() - 1,
            share,
            *grad.stride(),
            *(ys.stride() if dots and ys is not None else (0, 1)),
            *((0, 1) if weights is None else weights.stride()),
            HAS_WEIGHTS=weights is not None,
            ROWS=needs_ys,
            DOTS=dots,
            SUM=_sum_dtype(grad.dtype),
            **tile,
            **options,
        )
    return dys, dweights
