"""Grouped products in PyTorch: one an expert, or torch's own where it takes them; and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ...._tiles import product_rows


def segments(offsets: Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows."""
    bounds = offsets.tolist()
    return [(e, bounds[e], bounds[e + 1]) for e in range(len(bounds) - 1) if bounds[e + 1] > bounds[e]]


def _filled(rows: Tensor) -> Tensor:
    """rows [n, M] -> [``product_rows``, M], zeros behind them."""
    more = product_rows(len(rows), rows) - len(rows)
    return functional.pad(rows, (0, 0, 0, more)) if more else rows


def _fits_torch(a: Tensor, b: Tensor) -> bool:
    """Whether torch's grouped product takes these: on a CPU in float32 (in 16 bits it would compile a kernel an expert), rows in
    steps of 16 bytes, one of the last two strides 1."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or not hasattr(functional, "grouped_mm"):
        return False
    step = 16 // a.element_size()
    lined_up = all(t.stride(-1) == 1 and t.stride(-2) % step == 0 for t in (a, b if b.stride(-1) == 1 else b.transpose(-1, -2)))
    return lined_up and a.numel() > 0 and b.shape[2] % step == 0 and a.data_ptr() % 16 == 0 and b.data_ptr() % 16 == 0


def multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """out[rows of e] = a[rows of e] @ b[e]; rows beyond the last offset are zero."""
    if _fits_torch(a, b):
        out = functional.grouped_mm(a, b, offs=offsets[1:].to(torch.int32))
        out[int(offsets[-1]) :] = 0
        return out
    out = a.new_empty(a.shape[0], b.shape[2])
    end = 0
    for e, start, end in segments(offsets):
        last = start + product_rows(end - start, a)
        if last <= len(a):  # the rows of the next experts fill up, and are overwritten in their turn
            torch.mm(a[start:last], b[e], out=out[start:last])
        else:
            out[start:end] = torch.mm(_filled(a[start:end]), b[e])[: end - start]
    out[end:] = 0
    return out


def multiply_backward(
    grad: Tensor, a: Tensor | None, b: Tensor, offsets: Tensor, needs_a: bool, needs_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(da, db) of ``multiply``, each only if needed; ``a`` is None where db is not."""
    grad = grad.contiguous()
    da = multiply(grad, b.transpose(1, 2), offsets) if needs_a else None
    if not needs_b or a is None:
        return da, None
    db = torch.zeros_like(b)  # keeps the strides of b
    for e, start, end in segments(offsets):
        db[e] = _filled(a[start:end]).T @ _filled(grad[start:end])
    return da, db
