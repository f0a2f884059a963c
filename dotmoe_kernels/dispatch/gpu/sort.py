# mypy: disable-error-code="no-untyped-def"
"""Dispatch's sort in Triton: a stable counting sort of the routed pairs.

(1) A program counts the experts of its BLOCK_S pairs; (2) one program an expert turns the counts of all blocks into exclusive sums;
(3) a program sorts the keys (expert, position) of its block on the chip, so that the run of each expert is in order and next to
each other, and moves every run to offsets[e] + the expert's pairs in earlier blocks. Few pairs: (3) alone. No order depends on an
atomic. An index outside [0, E], which a GPU cannot report, counts as an empty slot. Where grouped products follow, (3) leaves their
table of row tiles too (``tiles.py``), each program a part of it.

Cost: the indices are read twice (the second time from L2) and 20 bytes a pair written.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
from ..._tiles import dispatch_tile, row_tiles_tile
from .tiles import RowTiles, empty_table, write_row_tiles

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


@triton.jit(do_not_specialize=["S", "K", "E", "blocks", "stride_t", "tiles"])
def _dispatch_place_kernel(
    indices_ptr,  # [T, K]
    table_ptr,  # [E, blocks + 1]: pairs of expert e before block b
    token_ptr,  # [S]
    source_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    slot_ptr,  # [S]: routed pair -> slot
    tiles_ptr,  # [tiles, 4]: the row tiles, or None
    S,
    K,
    E,
    blocks,
    stride_t,
    stride_k,
    tiles,
    ALONE: tl.constexpr,  # one block, and no table
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a row tile
    GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    if tiles_ptr is not None:
        share = tl.cdiv(tiles, blocks)
        write_row_tiles(
            tiles_ptr, block * share, tl.minimum((block + 1) * share, tiles), end - total, end, BLOCK_M, GROUP_M, BLOCK_R
        )
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


# --- launchers ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=MOST_PLANS)
def _sort_plan(
    shape: tuple[int, int],
    strides: tuple[int, int],
    num_experts: int,
    tiles: tuple[int, int, int],
    keep: bool,
    *types: object,
) -> tuple[int, tuple[Launch, ...]]:
    """(blocks, launches) of indices [T, K]; ``tiles``: how many row tiles of how many rows, in bands of how many; ``types``: what
    else the kernels are compiled for."""
    S = shape[0] * shape[1]
    tile, scan, options = dispatch_tile(S, num_experts)
    blocks, (count, block_m, group_m) = triton.cdiv(S, tile["BLOCK_S"]), tiles
    sizes = (S, shape[1], num_experts, blocks, *strides)
    of_tiles = {"BLOCK_M": block_m, "GROUP_M": group_m, "BLOCK_R": row_tiles_tile(num_experts)[0]["BLOCK_R"]}
    constants = {"ALONE": blocks == 1, **tile, **of_tiles}
    place = Launch(_dispatch_place_kernel, (blocks,), (*sizes, count), constants, options, keep=keep)
    if blocks == 1:
        return blocks, (place,)
    counting = Launch(_dispatch_count_kernel, (blocks,), sizes, tile, options, keep=keep)
    return blocks, (counting, Launch(_dispatch_scan_kernel, (num_experts,), (blocks,), scan, options, keep=keep), place)


def _sort(
    indices: Tensor, num_experts: int, table: Tensor | None, block_m: int = 1, group_m: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sort_slots``; ``table``: the row tiles of ``block_m`` rows, written in passing."""
    S, device = indices.numel(), indices.device
    token = torch.empty(S, dtype=torch.int64, device=device)
    source = torch.empty(S, dtype=torch.int64, device=device)
    slot_of = torch.empty(indices.shape, dtype=torch.int32, device=device)
    if S == 0:
        return token, source, torch.zeros(num_experts + 1, dtype=torch.int32, device=device), slot_of
    offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    tiles = (0 if table is None else len(table), block_m, group_m)
    keep, types = aligned(indices, table), (device, indices.dtype, table is None)
    blocks, launches = _sort_plan(indices.shape, indices.stride(), num_experts, tiles, keep, *types)
    with device_guard(indices):
        counts = None
        if blocks > 1:
            count, scan, _ = launches
            counts = torch.empty((num_experts, blocks + 1), dtype=torch.int32, device=device)
            count(indices, counts)
            scan(counts)
        launches[-1](indices, counts, token, source, offsets, slot_of, table)
    return token, source, offsets, slot_of


def sort_slots(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """token [S] int64, source [S] int64, offsets [E + 1] int32 and slot_of [T, K] int32 of indices [T, K], any strides."""
    return _sort(indices, num_experts, None)


def sort_into_tiles(
    indices: Tensor, num_experts: int, block_m: int, group_m: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, RowTiles]:
    """``sort_slots``, and the row tiles of ``block_m`` rows in bands of ``group_m``; at most MOST_EXPERTS experts."""
    table = empty_table(indices.numel(), num_experts, block_m, indices.device)
    return *_sort(indices, num_experts, table, block_m, group_m), RowTiles(table, block_m, group_m)


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
