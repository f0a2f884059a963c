# mypy: disable-error-code="no-untyped-def"
"""Dispatch's rows in Triton: out to their slots, and weighted sums of them back.

A token's row is read once and written to its K slots; a token's K slots are summed in the accumulator's dtype (float32, or float64
for float64 rows) in the order of j. A slot of at least offsets[E] is never read, and is written as zeros.

Cost: scatter moves (1 + K) rows a token, gather as many, its backward pass twice as many (once K less without dweights).
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard
from ..._tiles import row_tile


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
