"""Padded experts: on a CPU in 16 bits, many experts in one batched product.

A 16-bit product on a CPU has a fixed cost that outweighs a few rows, and an expert has few. So a run of experts takes its rows
padded to the most that one of them has, goes through two batched products, and a token sums its K rows where they lie. A run is as
many experts as keep their rows in the cache. Cost: the padded rows, which ``worth_padding`` keeps near the S that are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ...._tiles import most_idle, most_padding, padded_experts
from ....dispatch import Slots


def run_lengths(slots: Slots, down_proj: Tensor) -> tuple[Tensor, int]:
    """(rows that every expert is padded to [E], experts a run), or (empty, 0) where padding would waste too much."""
    count = slots.offsets.diff().long()  # [E]
    E, H, s = down_proj.shape
    if E == 0 or down_proj.stride(0) < H * s:  # [H, E, s]: a batched product copies each expert's weights out first
        return count[:0], 0
    most = int(count.max())
    run = padded_experts(E, most)
    padded = functional.pad(count, (0, -E % run)).view(-1, run).amax(1).repeat_interleave(run)[:E]
    used, total, idle = int(slots.offsets[-1]), int(padded.sum()), int((count == 0).sum())
    limit = most_padding(down_proj.dtype)
    return (padded, run) if worth_padding(used, total, most, idle / E, s, limit) else (count[:0], 0)


def worth_padding(used: int, total: int, most: int, idle: float, width: int, limit: float) -> bool:
    """``used`` of the ``total`` padded rows hold a slot; the fullest expert has ``most``; a share ``idle`` of the experts, each of
    ``width`` neurons, has none, and its weights are read all the same. ``limit``: of total / used, beyond a few rows."""
    return used > 0 and idle <= most_idle(width) and (total <= limit * used or most <= 16)


def padded_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    slots: Slots,
    indices: Tensor,
    weights: Tensor,
    act: Callable[[Tensor], Tensor],
    padded: Tensor,
    run: int,
) -> Tensor:
    """x [T, H] -> [T, H]; ``padded`` and ``run`` from ``run_lengths``."""
    (T, K), E, H = indices.shape, gate_up_proj.shape[0], x.shape[1]
    used, total = int(slots.offsets[-1]), int(padded.sum())
    source = slots.source[:used]
    expert = indices.reshape(-1)[source].long()
    first = padded.cumsum(0) - padded  # [E]: where an expert's rows begin
    place = (first - slots.offsets[:-1])[expert] + torch.arange(used)  # of each slot
    token = torch.zeros(total, dtype=torch.int64)  # a padding row repeats some token, and nobody reads it
    token[place] = slots.token[:used]
    scale = None
    if not bool((weights == 1).all()):
        scale = torch.zeros(total, 1, dtype=torch.float32)
        scale[place, 0] = weights.reshape(-1)[source].float()
    ys = x.new_empty(total + 1, H)
    ys[total] = 0  # the row of an empty slot
    starts, lengths = first.tolist(), padded.tolist()
    for e in range(0, E, run):
        n, m = min(run, E - e), lengths[e]
        if m == 0:
            continue
        rows = slice(starts[e], starts[e] + n * m)
        xs = x.index_select(0, token[rows]).view(n, m, H)
        gate, up = torch.bmm(gate_up_proj[e : e + n], xs.transpose(1, 2)).chunk(2, 1)  # [n, s, m] each: the weights come first
        hidden = act(gate).mul_(up)
        if scale is not None:
            hidden = (hidden * scale[rows].view(n, 1, m)).to(x.dtype)
        torch.bmm(hidden.transpose(1, 2).contiguous(), down_proj[e : e + n].transpose(1, 2), out=ys[rows].view(n, m, H))
    slot_of = torch.full((T * K,), total)
    slot_of[source] = place
    return functional.embedding_bag(slot_of.view(T, K), ys, mode="sum")
