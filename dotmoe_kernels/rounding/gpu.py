# mypy: disable-error-code="no-untyped-def"
"""Deferred acceptance in Triton: scores [L, F, E], capacity [L, E] -> expert_of [L, F], one program a layer.

The rows wait in a ring. A sweep takes up to SWEEP of them: (1) each proposes to the best expert that would still have it and is
noted in that expert's list; (2) the experts that are full are found; (3) each keeps its best c_e, refuses the others, which go
back into the ring, and raises its threshold (score, row). A refused row lies below that threshold, so a pair is tried at most
once and the loop ends. The stable matching is unique, so neither the order within a list nor the size of a sweep shows in it.

Scores are compared as integers in the order of their values (the two zeros equal, NaN as the lowest): the c_e-th best of a
list is found by bisection over that integer, ties by bisection over the row; nothing is sorted.

Threads of a program exchange everything but sums through global memory. What one of them writes, the others read only behind a
``debug_barrier``, which orders global memory within a program, and with ``volatile``, so that no load is moved, merged or
served from a stale line. Between two barriers no address is both written and read: phase 1 reads ring, thresholds and scores
and writes lists and counts (slots of a list are handed out by an atomic addition); phase 2 reads counts and writes the list of
full experts; phase 3 reads lists and writes them only after a barrier of its own, to places it has already read.

Cost: 1.0-1.1 reads of the scores on the plan of a converged Sinkhorn call, up to about 20 when all rows are equal; scratch of
8 (F + E SWEEP) bytes a layer for lists in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._backend import device_guard
from .._checks import compute_dtype
from .._tiles import rounding_tile


@triton.jit
def _order_key(x, KEY: tl.constexpr, HIGHEST: tl.constexpr):
    """Integers in the order of the floating-point numbers ``x``."""
    x = tl.where(x == x, x, float("-inf"))
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(KEY, bitcast=True)
    return tl.where(bits < 0, bits ^ HIGHEST, bits)


@triton.jit
def _count_above(key_ptr, base, size, longest, threshold, BLOCK_S: tl.constexpr):
    """How many of each list have a key of at least ``threshold`` [X]."""
    total = tl.zeros_like(size)
    for start in range(0, longest, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        live = s[None, :] < size[:, None]  # [X, S]
        key = tl.load(key_ptr + base[:, None] + s[None, :], mask=live, other=0, volatile=True)
        total += tl.sum((live & (key >= threshold[:, None])).to(tl.int32), 1)
    return total


@triton.jit
def _count_kept(key_ptr, row_ptr, base, size, longest, threshold, last_row, BLOCK_S: tl.constexpr):
    """How many of each list lie above ``threshold``, or at it with a row of at most ``last_row`` [X]."""
    total = tl.zeros_like(size)
    for start in range(0, longest, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        live = s[None, :] < size[:, None]  # [X, S]
        at = base[:, None] + s[None, :]
        key = tl.load(key_ptr + at, mask=live, other=0, volatile=True)
        row = tl.load(row_ptr + at, mask=live, other=0, volatile=True)
        tie = (key == threshold[:, None]) & (row <= last_row[:, None])
        total += tl.sum((live & ((key > threshold[:, None]) | tie)).to(tl.int32), 1)
    return total


@triton.jit
def _threshold(key_ptr, row_ptr, base, size, longest, capacity, F, KEY: tl.constexpr, HIGHEST: tl.constexpr, BLOCK_S: tl.constexpr):
    """(key, row) [X]: exactly ``capacity`` of each list lie above this key, or at it with at most this row."""
    low = tl.zeros_like(size).to(KEY) + HIGHEST
    high = tl.zeros_like(size).to(KEY) - HIGHEST
    for start in range(0, longest, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        live = s[None, :] < size[:, None]  # [X, S]
        at = key_ptr + base[:, None] + s[None, :]
        low = tl.minimum(low, tl.min(tl.load(at, mask=live, other=HIGHEST, volatile=True), 1))
        high = tl.maximum(high, tl.max(tl.load(at, mask=live, other=-HIGHEST, volatile=True), 1))
    high += 1
    found = size  # entries of at least low; those of at least high are fewer than capacity
    search = (found > capacity) & (low + 1 < high)
    while tl.max(search.to(tl.int32), 0) > 0:
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        count = _count_above(key_ptr, base, size, longest, middle, BLOCK_S)
        enough = search & (count >= capacity)
        low = tl.where(enough, middle, low)
        found = tl.where(enough, count, found)
        high = tl.where(search & (count < capacity), middle, high)
        search = (found > capacity) & (low + 1 < high)
    tied = found > capacity
    below = tl.where(tied, -1, F - 1).to(tl.int32)
    last_row = tl.zeros_like(size) + (F - 1)
    search = tied
    while tl.max(search.to(tl.int32), 0) > 0:
        middle = (below + last_row) >> 1
        count = _count_kept(key_ptr, row_ptr, base, size, longest, low, middle, BLOCK_S)
        last_row = tl.where(search & (count >= capacity), middle, last_row)
        below = tl.where(search & (count < capacity), middle, below)
        search = tied & (below + 1 < last_row)
    return low, last_row


@triton.jit(do_not_specialize=["F", "E", "most", "stride_sl", "stride_sf"])  # one binary for all sizes
def _deferred_acceptance_kernel(
    scores_ptr,  # [L, F, E]
    capacity_ptr,  # [L, E], summing to at most F
    begin_ptr,  # [L, E]: exclusive sums of capacity
    expert_of_ptr,  # [L, F]
    ring_ptr,  # [L, F]: the rows that wait
    state_ptr,  # [L, 3, E]: length of the list, row of the threshold, experts to visit
    bar_ptr,  # [L, E]: key of the threshold
    list_row_ptr,  # [L, F + E SWEEP]
    list_key_ptr,
    F,
    E,
    most,  # sweeps: a row proposes to an expert once, so that F E are never needed
    stride_sl,
    stride_sf,
    stride_se,
    KEY: tl.constexpr,  # tl.int32 or tl.int64
    HIGHEST: tl.constexpr,  # its largest value
    SWEEP: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_X: tl.constexpr,  # experts and
    BLOCK_S: tl.constexpr,  # list entries of a selection
):
    FLOAT: tl.constexpr = tl.float64 if HIGHEST > 2**31 else tl.float32
    layer = tl.program_id(0).to(tl.int64)
    scores_ptr += layer * stride_sl
    capacity_ptr += layer * E
    begin_ptr += layer * E
    expert_of_ptr += layer * F
    ring_ptr += layer * F
    count_ptr = state_ptr + layer * 3 * E
    bar_row_ptr = count_ptr + E
    visit_ptr = bar_row_ptr + E
    bar_ptr += layer * E
    list_row_ptr += layer * (F + E * SWEEP)
    list_key_ptr += layer * (F + E * SWEEP)

    # every row waits; an expert is open to all pairs, or to none if it has no room
    for start in range(0, F, 1024):
        row = start + tl.arange(0, 1024)
        tl.store(ring_ptr + row, row, mask=row < F)
    for start in range(0, E, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        room = tl.load(capacity_ptr + e, mask=e < E, other=0) > 0
        tl.store(count_ptr + e, tl.zeros_like(e), mask=e < E)
        tl.store(bar_ptr + e, tl.where(room, -HIGHEST, HIGHEST).to(KEY), mask=e < E)  # no key is as low or as high
        tl.store(bar_row_ptr + e, tl.where(room, F, -1), mask=e < E)
    tl.debug_barrier()

    head = tl.full((), 0, tl.int32)
    waiting = head + F
    sweeps = head
    while (waiting > 0) & (sweeps < most):
        sweeps += 1
        taken = tl.minimum(waiting, SWEEP)
        # 1. propose
        for start in range(0, taken, BLOCK_F):
            lane = start + tl.arange(0, BLOCK_F)
            live = lane < taken
            place = head + lane
            place = tl.where(place < F, place, place - F)
            row = tl.load(ring_ptr + place, mask=live, other=0, volatile=True)
            best = tl.full((BLOCK_F,), -HIGHEST, KEY)
            choice = tl.zeros_like(row) + E
            for first in range(0, E, BLOCK_E):
                e = first + tl.arange(0, BLOCK_E)
                inside = e < E
                at = scores_ptr + row.to(tl.int64)[:, None] * stride_sf + e.to(tl.int64)[None, :] * stride_se
                x = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)  # [F, E]
                key = _order_key(x.to(FLOAT), KEY, HIGHEST)
                bar = tl.load(bar_ptr + e, mask=inside, other=HIGHEST, volatile=True)
                bar_row = tl.load(bar_row_ptr + e, mask=inside, other=-1, volatile=True)
                above = (key > bar[None, :]) | ((key == bar[None, :]) & (row[:, None] < bar_row[None, :]))
                top = tl.max(tl.where(above, key, -HIGHEST), 1)
                where = tl.min(tl.where(above & (key == top[:, None]), e[None, :], E), 1)  # the first of equals
                choice = tl.where(top > best, where, choice)
                best = tl.maximum(top, best)
            placed = live & (choice < E)  # every row is, if the capacities sum to F
            slot = tl.atomic_add(count_ptr + choice, 1, mask=placed, sem="relaxed")
            slot += tl.load(begin_ptr + choice, mask=placed, other=0) + choice * SWEEP
            tl.store(list_row_ptr + slot, row, mask=placed)
            tl.store(list_key_ptr + slot, best, mask=placed)
            tl.store(expert_of_ptr + row, tl.where(placed, choice, -1).to(tl.int64), mask=live)
        head += taken
        head = tl.where(head < F, head, head - F)
        waiting -= taken
        tl.debug_barrier()
        # 2. the experts with too many, or just full and without a threshold yet
        visits = tl.full((), 0, tl.int32)
        for start in range(0, E, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            count = tl.load(count_ptr + e, mask=e < E, other=0, volatile=True)
            capacity = tl.load(capacity_ptr + e, mask=e < E, other=1)
            bar_row = tl.load(bar_row_ptr + e, mask=e < E, other=-1, volatile=True)
            full = (count > capacity) | ((count == capacity) & (bar_row == F))
            tl.store(visit_ptr + visits + tl.cumsum(full.to(tl.int32), 0) - 1, e, mask=full)
            visits += tl.sum(full.to(tl.int32), 0)
        tl.debug_barrier()
        # 3. they keep their best
        for start in range(0, visits, BLOCK_X):
            lane = start + tl.arange(0, BLOCK_X)
            active = lane < visits
            e = tl.load(visit_ptr + lane, mask=active, other=0, volatile=True)
            size = tl.load(count_ptr + e, mask=active, other=0, volatile=True)
            capacity = tl.load(capacity_ptr + e, mask=active, other=0)
            base = tl.load(begin_ptr + e, mask=active, other=0) + e * SWEEP
            longest = tl.max(size, 0)
            bar, last_row = _threshold(list_key_ptr, list_row_ptr, base, size, longest, capacity, F, KEY, HIGHEST, BLOCK_S)
            kept_before = tl.zeros_like(size)
            refused = size - capacity
            refused_before = tl.cumsum(refused, 0) - refused + waiting + head  # where in the ring
            lowest = tl.zeros_like(size).to(KEY) + HIGHEST
            lowest_row = tl.zeros_like(size) - 1
            for first in range(0, longest, BLOCK_S):
                s = first + tl.arange(0, BLOCK_S)
                inside = s[None, :] < size[:, None]  # [X, S]
                at = base[:, None] + s[None, :]
                key = tl.load(list_key_ptr + at, mask=inside, other=0, volatile=True)
                row = tl.load(list_row_ptr + at, mask=inside, other=0, volatile=True)
                keep = inside & ((key > bar[:, None]) | ((key == bar[:, None]) & (row <= last_row[:, None])))
                refuse = inside & (keep == 0)
                least = tl.min(tl.where(keep, key, HIGHEST), 1)
                least_row = tl.max(tl.where(keep & (key == least[:, None]), row, -1), 1)
                least_row = tl.where(least == lowest, tl.maximum(least_row, lowest_row), least_row)
                lowest_row = tl.where(least <= lowest, least_row, lowest_row)
                lowest = tl.minimum(lowest, least)
                tl.debug_barrier()  # all have read before the entries move to the front
                kept = keep.to(tl.int32)
                to = base[:, None] + kept_before[:, None] + tl.cumsum(kept, 1) - 1
                tl.store(list_key_ptr + to, key, mask=keep)
                tl.store(list_row_ptr + to, row, mask=keep)
                kept_before += tl.sum(kept, 1)
                gone = refuse.to(tl.int32)
                place = refused_before[:, None] + tl.cumsum(gone, 1) - 1
                place = tl.where(place < F, place, place - F)
                tl.store(ring_ptr + place, row, mask=refuse)
                refused_before += tl.sum(gone, 1)
            tl.store(count_ptr + e, capacity, mask=active)
            tl.store(bar_ptr + e, lowest, mask=active)
            tl.store(bar_row_ptr + e, lowest_row, mask=active)
            waiting += tl.sum(refused, 0)
        tl.debug_barrier()
    for start in range(0, waiting, 1024):  # whoever waits still has no place
        lane = start + tl.arange(0, 1024)
        place = head + lane
        place = tl.where(place < F, place, place - F)
        row = tl.load(ring_ptr + place, mask=lane < waiting, other=0, volatile=True)
        tl.store(expert_of_ptr + row, tl.full((1024,), -1, tl.int64), mask=lane < waiting)


def deferred_acceptance(scores: Tensor, capacity: Tensor, most: int | None = None) -> Tensor:
    """expert_of [L, F] int64 of scores [L, F, E], any strides, and capacity [L, E]. Capacities that do not fit are cut to what
    is left of F, and a row that then finds no place gets -1: wrong values on a GPU cannot be reported, but stay within bounds.
    After ``most`` sweeps (None: as many as there are pairs, which is never needed) who still waits gets -1: nothing hangs."""
    L, F, E = scores.shape
    device = scores.device
    expert_of = torch.empty((L, F), dtype=torch.int64, device=device)
    if L == 0:
        return expert_of
    tile, options = rounding_tile(E)
    limit = capacity.to(torch.int64).clamp(0, F)
    begin = (limit.cumsum(-1) - limit).clamp(max=F)
    limit = torch.minimum(limit, F - begin).to(torch.int32)
    double = compute_dtype(scores) == torch.float64
    key = torch.int64 if double else torch.int32
    entries = F + E * tile["SWEEP"]
    with device_guard(scores):
        _deferred_acceptance_kernel[(L,)](
            scores,
            limit,
            begin.to(torch.int32),
            expert_of,
            torch.empty((L, F), dtype=torch.int32, device=device),
            torch.empty((L, 3, E), dtype=torch.int32, device=device),
            torch.empty((L, E), dtype=key, device=device),
            torch.empty((L, entries), dtype=torch.int32, device=device),
            torch.empty((L, entries), dtype=key, device=device),
            F,
            E,
            min(F * E, 2**31 - 1) if most is None else most,
            *scores.stride(),
            KEY=tl.int64 if double else tl.int32,
            HIGHEST=2**63 - 1 if double else 2**31 - 1,
            **tile,
            **options,
        )
    return expert_of
