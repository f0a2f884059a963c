"""Runs of experts: which of them go into one batched product, on a CPU in 16 bits.

A 16-bit product has a fixed cost that outweighs a few rows; a batched one has it once, but all its experts take as many rows as the
fullest, zeros or anything behind their own. Two rules:

    even_runs     runs of equal length, where experts have about as many rows: without matrix units
    best_runs     the cheapest partition of the experts into runs of 1, 2, 4, ...: with them; and into spans, of which every token
                  visits so many experts that they are one dense product with a mask

Few lengths and few numbers of rows (``product_rows``) keep the number of different products small: each is compiled once.
"""

from __future__ import annotations

from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...._tiles import batched_call, batches_experts, dense_rows, most_idle, most_padding, padded_experts, product_rows


class Run(NamedTuple):
    """Experts ``first`` to ``first + experts``, of ``rows`` rows each; of a ``span``, one row a token for all of them."""

    first: int
    experts: int
    rows: int
    span: bool = False


def even_runs(offsets: Tensor, down_proj: Tensor) -> list[Run]:
    """Empty where padding would waste too much. offsets: [E + 1]."""
    counts, (E, H, s) = offsets.diff().tolist(), down_proj.shape
    if E == 0 or down_proj.stride(0) < H * s:  # [H, E, s]: a batched product copies each expert's weights out first
        return []
    most = max(counts)
    length = padded_experts(E, product_rows(most, down_proj))
    parts = [(e, counts[e : e + length]) for e in range(0, E, length)]
    runs = [Run(e, len(part), product_rows(max(part), down_proj)) for e, part in parts]
    used, total, idle = sum(counts), sum(run.experts * run.rows for run in runs), counts.count(0)
    return runs if worth_padding(used, total, most, idle / E, s, most_padding()) else []


def worth_padding(used: int, total: int, most: int, idle: float, width: int, limit: float) -> bool:
    """``used`` of the ``total`` padded rows hold a slot; the fullest expert has ``most``; a share ``idle`` of the experts, each of
    ``width`` neurons, has none, and its weights are read all the same. ``limit``: of total / used, beyond a few rows."""
    return used > 0 and idle <= most_idle(width) and (total <= limit * used or most <= 16)


def best_runs(offsets: Tensor, down_proj: Tensor, tokens: int = 0) -> list[Run]:
    """Those of the least cost, counted in rows. offsets: [E + 1]; tokens: of a span, 0: without spans."""
    E, H, s = down_proj.shape
    call = batched_call(H * s, down_proj.dtype)
    apart = down_proj.stride(0) >= H * s  # else a batched product copies each expert's weights out first
    rows = [product_rows(end - start, down_proj) for start, end in pairwise(offsets.tolist())]
    most = [rows]  # [k][e]: of the 2^k experts from e on
    while apart and 2 ** len(most) <= E:
        half = 2 ** (len(most) - 1)
        most.append([max(pair) for pair in zip(most[-1], most[-1][half:], strict=False)])
    costs, lengths = [0.0] * (E + 1), [1] * E  # of the experts from e on; of the run that begins with e, 0: of a span
    wide = dense_rows(tokens) if tokens else inf  # of an expert in a span
    opened = [inf] * E + [0.0]  # of the experts from e on, the first of them in a span that an earlier one began
    for e in range(E - 1, -1, -1):
        least = costs[e + 1] + (call + rows[e] if rows[e] else 0)
        for k in range(1, len(most)):
            length = 1 << k
            if e + length > E or not batches_experts(length, most[k][e]):
                break
            cost = costs[e + length] + (call + length * most[k][e] if most[k][e] else 0)
            if cost < least:
                least, lengths[e] = cost, length
        inside = wide + min(opened[e + 1], costs[e + 1])
        if call + inside < least:
            least, lengths[e] = call + inside, 0
        costs[e], opened[e] = least, inside
    runs, e = [], 0
    while e < E:
        length, span = lengths[e], lengths[e] == 0
        if span:
            length = 1
            while e + length < E and opened[e + length] <= costs[e + length]:
                length += 1
        runs.append(Run(e, length, tokens if span else max(rows[e : e + length]), span))
        e += length
    return runs


class Layout(NamedTuple):
    """Where slots lie in the padded rows; one in a span lies nowhere, at ``total``."""

    total: int
    place: Tensor  # [S'] of the slots in use, as they are sorted

    def spread(self, values: Tensor, fill: int) -> Tensor:
        """values [S or S'] of the slots -> [total], ``fill`` between them."""
        out = values.new_full((self.total + 1,), fill)
        out[self.place] = values[: len(self.place)]
        return out[:-1]

    def slot_of(self, source: Tensor) -> Tensor:
        """source [S] of ``Slots`` -> [S]: the row of a routed pair; total: of an empty slot."""
        out = source.new_full(source.shape, self.total)
        out[source[: len(self.place)]] = self.place
        return out


def lay_out(offsets: Tensor, runs: list[Run]) -> Layout:
    """Run after run, a span's rows too."""
    bounds, first, starts = offsets.numpy(), 0, list[int]()
    for run in runs:
        starts += [-1 if run.span else first + n * run.rows for n in range(run.experts)]
        first += run.rows * (1 if run.span else run.experts)
    begin, counts = np.array(starts, dtype=np.int64), np.diff(bounds)
    place = np.repeat(begin - bounds[:-1], counts) + np.arange(bounds[-1])
    place[np.repeat(begin < 0, counts)] = first
    return Layout(first, torch.from_numpy(place))


def batched(run: Run, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [experts * rows, M], the experts of b [E, M, N] -> [experts * rows, N]"""
    n, m = run.experts, run.rows
    out = a.new_empty(n * m, b.shape[2]) if out is None else out
    b = b[run.first : run.first + n]
    if n == 1:  # a batch of one takes another way, which is two to four times slower
        return torch.mm(a, b[0], out=out)
    torch.bmm(a.view(n, m, -1), b, out=out.view(n, m, -1))
    return out
