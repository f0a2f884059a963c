"""Padded experts: on a CPU in 16 bits, the experts of a run (``runs.py``) in one batched product.

A run takes its rows padded to the most that one of its experts has, goes through two products, and a token sums its K rows where
they lie. Cost: the padded rows, which the choice of the runs keeps near the S that are used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ...._tiles import weights_first
from ....dispatch import Slots
from ...masked.cpu.dense import Chosen, chosen_experts, token_rows
from .runs import Run, batched, lay_out


def padded_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    slots: Slots,
    indices: Tensor,
    weights: Tensor,
    act: Callable[[Tensor], Tensor],
    runs: list[Run],
) -> Tensor:
    """x [T, H] -> [T, H]"""
    layout, (T, K) = lay_out(slots.offsets, runs), indices.shape
    total = layout.total
    token = layout.spread(slots.token, 0)  # a padding row repeats some token, and nobody reads it
    scale = None
    if not bool((weights == 1).all()):
        scale = layout.spread(weights.reshape(-1)[slots.source].float(), 0)
    ys = x.new_empty(total + 1, x.shape[1])
    ys[total] = 0  # the row of an empty slot
    start, chosen, bags = 0, None, [layout.slot_of(slots.source).view(T, K)]
    for run in runs:
        rows = slice(start, start + run.rows * (1 if run.span else run.experts))
        start = rows.stop
        if run.span:
            chosen = chosen or chosen_experts(indices, None if scale is None else weights, len(down_proj), x.dtype)
            experts = slice(run.first, run.first + run.experts)
            mask = Chosen(chosen.on[experts], None if chosen.r is None else chosen.r[experts])
            token_rows(x, gate_up_proj[experts], down_proj[experts], mask, act, ys[rows])
            bags.append(torch.arange(rows.start, rows.stop)[:, None])
        elif run.rows:
            xs = x.index_select(0, token[rows])
            ways = _turned if weights_first(run.experts, run.rows, x.dtype) else _straight
            ways(run, xs, gate_up_proj, down_proj.transpose(1, 2), None if scale is None else scale[rows], act, ys[rows])
    return functional.embedding_bag(torch.cat(bags, 1), ys, mode="sum")


_Scale = Tensor | None  # [n] float32


def _straight(run: Run, xs: Tensor, up: Tensor, down: Tensor, scale: _Scale, act: Callable[[Tensor], Tensor], out: Tensor) -> None:
    """xs [n, H] -> out [n, H]; up [E, 2s, H], down [E, s, H]."""
    gate, value = batched(run, xs, up.transpose(1, 2)).chunk(2, -1)  # [n, s] each
    hidden = act(gate).mul_(value)
    if scale is not None:
        hidden = (hidden * scale[:, None]).to(xs.dtype)
    batched(run, hidden, down, out)


def _turned(run: Run, xs: Tensor, up: Tensor, down: Tensor, scale: _Scale, act: Callable[[Tensor], Tensor], out: Tensor) -> None:
    """The same with the weights first."""
    n, m = run.experts, run.rows
    experts = slice(run.first, run.first + n)
    gate, value = torch.bmm(up[experts], xs.view(n, m, -1).transpose(1, 2)).chunk(2, 1)  # [experts, s, rows] each
    hidden = act(gate).mul_(value)
    if scale is not None:
        hidden = (hidden * scale.view(n, 1, m)).to(xs.dtype)
    torch.bmm(hidden.transpose(1, 2).contiguous(), down[experts], out=out.view(n, m, -1))
