"""The routed FFN where a gradient is needed, in PyTorch: both passes, of which none keeps the [S, H] rows.

    h_p = act(g_p) * u_p, (g_p, u_p) = GateUp_e x_t;  y_t = sum over the slots p of t of w_p Down_e h_p

Kept for the backward pass: x [T, H], the routing, and (g, u) [S, 2s]; with ``recompute`` only x and the routing. Backward, with
dh_p = Down_e^T dy_t before the routing weight, so that dw needs no rows Down_e h_p (as in SonicMoE, arXiv 2512.14080):

    dw_p = <h_p, dh_p>;  dDown_e = sum_p dy_t (w_p h_p)^T;  (dg_p, du_p) = w_p (act'(g_p) u_p dh_p, act(g_p) dh_p)
    dGateUp_e = sum_p (dg_p, du_p) x_t^T;  dx_t = sum_p GateUp_e^T (dg_p, du_p)

y, dx and dw are summed in float32, and what lies between two products is rounded once. Cost: 6 S s H flops forward; backward
12 S s H, 6 less with frozen experts, 4 more with ``recompute``. ``forward`` and ``backward`` take a run of experts at a time, whose
rows stay in the cache, on any device; on a CPU in 16 bits each run is a batched product (``grouped/cpu/runs.py``), and torch sums
a token's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..._checks import compute_dtype
from ..._tiles import in_batches
from ..activations import find_activation
from ..grouped.cpu.runs import Run, batched, best_runs, lay_out

_FEW = 16  # rows of an expert up to which the gradient of its weights costs its memory, not its products
_CACHED = 2**21  # bytes of the rows [n, H] of a run of experts: several such lie in a core's cache


class Needs(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    gate_up_proj: bool
    down_proj: bool
    weights: bool


class _Run(NamedTuple):
    """Some experts, one after the other."""

    experts: slice
    rows: slice
    counts: list[int]  # rows of each
    batch: Run | None = None  # of one batched product

    def pad(self, a: Tensor, most: int) -> Tensor:
        """[n, M] -> [experts, most, M], zeros behind each expert's rows."""
        place = [e * most + row for e, count in enumerate(self.counts) for row in range(count)]
        padded = a.new_zeros(len(self.counts) * most, a.shape[1])
        padded[torch.tensor(place, dtype=torch.int64)] = a
        return padded.view(len(self.counts), most, a.shape[1])


class _Slots(NamedTuple):
    """The slots in the order in which they are worked on."""

    x: Tensor  # [T, H]; with rows between the slots [T + 1, H], the last 0: theirs
    token: Tensor  # [n]
    source: Tensor  # [n]; T K: of a row between the slots
    w: Tensor  # [n, 1] routing weights in the dtype of the sums
    runs: list[_Run]
    bags: Tensor | None = None  # [T, K] the row of each slot, n: of an empty one; where torch sums them


def _slots(x: Tensor, down_proj: Tensor, weights: Tensor, source: Tensor, offsets: Tensor) -> _Slots:
    wide, flat, K = compute_dtype(x), weights.reshape(-1), max(weights.shape[1], 1)
    if not in_batches(x) or weights.numel() * x.shape[1] * len(down_proj) == 0:
        return _Slots(x, _token(source, K), source, flat[source][:, None].to(wide), list(_runs(offsets, x)))
    batches, runs, end = best_runs(offsets, down_proj), [], 0
    for batch in batches:
        start, end = end, end + batch.experts * batch.rows
        experts = slice(batch.first, batch.first + batch.experts)
        runs.append(_Run(experts, slice(start, end), [batch.rows] * batch.experts, batch))
    layout = lay_out(offsets, batches)
    bags = layout.slot_of(source).view(weights.shape)
    source = layout.spread(source, flat.numel())
    w = functional.pad(flat.to(wide), (0, 1))[source][:, None]
    return _Slots(functional.pad(x, (0, 0, 0, 1)), _token(source, K), source, w, runs, bags)


class _Sums:
    """Rows of slots summed by token."""

    def __init__(self, slots: _Slots, x: Tensor) -> None:
        self.slots, self.total = slots, torch.zeros(x.shape, dtype=slots.w.dtype, device=x.device)

    def add(self, run: _Run, a: Tensor, b: Tensor, w: Tensor | None = None) -> None:
        """``_products`` of a and b, times w [n, 1]."""
        rows = _products(run, a, b).to(self.total.dtype)
        self.total.index_add_(0, self.slots.token[run.rows], rows if w is None else rows.mul_(w))

    def found(self) -> Tensor:
        """[T, H]"""
        return self.total


class _Bags(_Sums):
    """The same of 16-bit rows: kept, and summed in one pass. Their w is in ``a`` already."""

    def __init__(self, slots: _Slots, bags: Tensor, x: Tensor) -> None:
        self.slots, self.bags, self.rows = slots, bags, x.new_empty(len(slots.token) + 1, x.shape[1])

    def add(self, run: _Run, a: Tensor, b: Tensor, w: Tensor | None = None) -> None:
        _products(run, a, b, self.rows[run.rows])

    def found(self) -> Tensor:
        self.rows[-1] = 0  # of the empty slots
        return functional.embedding_bag(self.bags, self.rows, mode="sum")


def _sums(slots: _Slots, x: Tensor) -> _Sums:
    return _Sums(slots, x) if slots.bags is None else _Bags(slots, slots.bags, x)


def _token(source: Tensor, K: int) -> Tensor:
    return torch.div(source, K, rounding_mode="floor")


def _runs(offsets: Tensor, x: Tensor) -> Iterator[_Run]:
    """All experts, as many at a time as have their rows [n, H] in the cache together, at least one: what lies between two products
    is done for all of them at once, since an operation on the few rows of one expert would be nearly all overhead."""
    most = _CACHED // max(x.shape[1] * x.element_size(), 1)
    bounds = offsets.tolist()
    first = 0
    for e in range(1, len(bounds)):
        if e == len(bounds) - 1 or bounds[e + 1] - bounds[first] > most:
            counts = [end - start for start, end in pairwise(bounds[first : e + 1])]
            yield _Run(slice(first, e), slice(bounds[first], bounds[e]), counts)
            first = e


def _products(run: _Run, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [n, M], an expert's rows times b[e] [M, N] -> [n, N]"""
    if run.batch is not None:
        return batched(run.batch, a, b, out)
    out = a.new_empty(len(a), b.shape[2]) if out is None else out
    for rows, weight, target in zip(a.split(run.counts), b[run.experts].unbind(), out.split(run.counts), strict=True):
        torch.mm(rows, weight, out=target)
    return out


def _weight_products(run: _Run, a: Tensor, b: Tensor, out: Tensor) -> None:
    """out[e] [M, N] = a^T b of an expert's rows, 0 without rows; in place: a few rows' copy would take longer than the product."""
    if out.stride(1) == 1:  # [E, M, N] stored as [E, N, M]
        a, b, out = b, a, out.transpose(1, 2)
    most = max(run.counts)
    if len(run.counts) > 1 and run.batch is not None:
        left, right = (t.view(len(run.counts), most, -1) for t in (a, b))
        torch.bmm(left.transpose(1, 2), right, out=out[run.experts])
        return
    if 1 <= most <= _FEW and len(run.counts) > 1 and out.device.type == "cpu" and out.dtype == torch.float32:
        # threads share experts: within one, most of the time goes into touching fresh memory, which one thread would do alone
        torch.bmm(run.pad(a, most).transpose(1, 2), run.pad(b, most), out=out[run.experts])
        return
    for left, right, target in zip(a.T.split(run.counts, 1), b.split(run.counts), out[run.experts].unbind(), strict=True):
        torch.mm(left, right, out=target)


def forward(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    source: Tensor,
    offsets: Tensor,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """-> y [T, H] and, if ``keep``, (g, u) [S, 2s], whose rows beyond offsets[E] hold nothing. source, offsets: of ``Slots``."""
    act = find_activation(activation).forward
    slots = _slots(x, down_proj, weights, source, offsets)
    y = _sums(slots, x)
    kept = x.new_empty(len(slots.token), gate_up_proj.shape[1]) if keep else None
    for run in slots.runs:
        xs, w = slots.x.index_select(0, slots.token[run.rows]), slots.w[run.rows]
        hidden = _products(run, xs, gate_up_proj.transpose(1, 2), None if kept is None else kept[run.rows])
        gate, up = hidden.to(w.dtype).chunk(2, -1)  # [n, s] each
        h = act(gate).mul_(up)
        y.add(run, (h if slots.bags is None else h.mul_(w)).to(x.dtype), down_proj.transpose(1, 2), w)
    return y.found().to(x.dtype), kept


def backward(
    dy: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor,
    source: Tensor,
    offsets: Tensor,
    kept: Tensor | None,
    activation: str,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """-> dx, dgate_up_proj, ddown_proj (in the strides of the weights) and dweights, None where not needed."""
    act, T = find_activation(activation), len(x)
    slots = _slots(x, down_proj, weights, source, offsets)
    x, token, source, w, runs, _ = slots
    dy = functional.pad(dy, (0, 0, 0, len(x) - T)) if len(x) > T else dy
    dx = _sums(slots, dy[:T]) if needs.x else None
    dgate_up = torch.empty_like(gate_up_proj) if needs.gate_up_proj else None
    ddown = torch.empty_like(down_proj) if needs.down_proj else None
    dw = torch.zeros(weights.numel() + 1, dtype=w.dtype, device=x.device) if needs.weights else None
    for run in runs:
        here, scale = token[run.rows], w[run.rows]  # [n], [n, 1]
        xs = x.index_select(0, here) if dgate_up is not None or kept is None else None
        hidden = _products(run, xs, gate_up_proj.transpose(1, 2)) if kept is None else kept[run.rows]  # type: ignore[arg-type]
        gate, up = hidden.to(w.dtype).chunk(2, -1)  # [n, s] each
        activated = act.forward(gate)
        h = activated * up
        dys = dy.index_select(0, here)  # [n, H]
        if ddown is not None:
            _weight_products(run, dys, (h * scale).to(x.dtype), ddown)
        if dx is None and dgate_up is None and dw is None:
            continue
        dh = _products(run, dys, down_proj).to(w.dtype)
        if dw is not None:
            dw[source[run.rows]] = (dh * h).sum(1)
        if dx is None and dgate_up is None:
            continue
        dh.mul_(scale)
        dhidden = torch.cat((act.backward(dh * up, gate), dh.mul_(activated)), -1).to(x.dtype)  # [n, 2s]
        if dgate_up is not None:
            _weight_products(run, dhidden, xs, dgate_up)  # type: ignore[arg-type]
        if dx is not None:
            dx.add(run, dhidden, gate_up_proj)
    return (
        None if dx is None else dx.found().to(x.dtype),
        dgate_up,
        ddown,
        None if dw is None else dw[:-1].view(weights.shape).to(weights.dtype),
    )
