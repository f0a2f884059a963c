# mypy: disable-error-code="no-untyped-def"
"""Grouped products in Triton: the down product of the grouped path, ``grouped_mm``, and the gradient to its second factor.

    out[p] = a[p] B_e,  p in [offsets[e], offsets[e + 1])          dB_e = sum_p a[p]^T grad[p]

a [S, Kdim], B [E, Kdim, N] and grad [S, N] of any strides, out [S, N], dB in the storage of B. Accumulated in float32, each
expert's rows in their order. Rows of ``out`` from offsets[E] on are zeroed where asked, else left as they are. On demand
weights[source[p]] out[p] is added to y[token[p]] in float32 by atomics, whose order, and so the last bits, vary from call to call,
and the rows of grad are gathered while they are loaded: grad[token[p]].
Cost: 2 S Kdim N flops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._backend import device_guard, product_options
from ...._tiles import GroupedTile, before_hopper, grouped_mm_tile, grouped_stationary_tile, grouped_weight_tile
from ....dispatch.gpu.tiles import RowTiles, most_row_tiles, read_tile
from .schedule import pick_tile
from .stationary import stationary_product
from .up import block_of


@triton.jit(do_not_specialize=["S", "E"])
def _grouped_mm_kernel(
    a_ptr,  # [S, Kdim]
    b_ptr,  # [E, Kdim, N]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [S, N], or y [T, N] float32
    token_ptr,  # [S], read where ATOMIC
    source_ptr,  # [S], read with weights
    weights_ptr,  # [T K] or None: 1
    tiles_ptr,  # [tiles, 4], or None: a program finds its tile among the offsets
    S,
    E,
    Kdim,
    N,
    columns,
    stride_as,
    stride_ak,
    stride_be,
    stride_bk,
    stride_bn,
    stride_os,
    ZERO: tl.constexpr,  # rows from offsets[E] on
    ATOMIC: tl.constexpr,
    EVEN: tl.constexpr,  # Kdim is a multiple of BLOCK_K
    EVEN_N: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program = tl.program_id(0)
    if tiles_ptr is not None:
        group, start, end, column = read_tile(tiles_ptr, program, columns, BLOCK_M, GROUP_M)
        if group < 0:
            return
    else:
        group, start, end, column = pick_tile(program, offsets_ptr, E, S, columns, ZERO, BLOCK_M, BLOCK_E, GROUP_M)
        if group > E or (group == E and not ZERO):
            return
    p = start + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    slot = tl.minimum(p, end - 1).to(tl.int64)  # rows behind the last repeat it, and are not stored
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    a_at = a_ptr + slot[:, None] * stride_as + k.to(tl.int64)[None, :] * stride_ak
    expert = tl.minimum(group, E - 1).to(tl.int64)
    b_at = b_ptr + expert * stride_be + k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    step_a = tl.full([], BLOCK_K, tl.int64) * stride_ak
    step_b = tl.full([], BLOCK_K, tl.int64) * stride_bk
    for first in range(0, tl.where(group < E, Kdim, 0), BLOCK_K):
        inside = first + k < Kdim
        if EVEN:
            a = tl.load(a_at)
        else:
            a = tl.load(a_at, mask=inside[None, :], other=0.0)
        if EVEN and EVEN_N:
            b = tl.load(b_at)
        elif EVEN:
            b = tl.load(b_at, mask=(n < N)[None, :], other=0.0)
        else:
            b = tl.load(b_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_at += step_a
        b_at += step_b
    inside = (p < end)[:, None] & (n < N)[None, :]
    if weights_ptr is not None:
        source = tl.load(source_ptr + slot)
        acc *= tl.load(weights_ptr + source).to(tl.float32)[:, None]
    if ATOMIC:
        token = tl.load(token_ptr + slot).to(tl.int64)
        tl.atomic_add(out_ptr + token[:, None] * stride_os + n[None, :], acc, mask=inside, sem="relaxed")
    else:
        tl.store(out_ptr + p.to(tl.int64)[:, None] * stride_os + n[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _grouped_weight_kernel(
    a_ptr,  # [S, Kdim]
    grad_ptr,  # [S, N], or [T, N] with token
    token_ptr,  # [S], or None: row p of grad is its own
    offsets_ptr,  # [E + 1]
    db_ptr,  # [E, Kdim, N]
    Kdim,
    N,
    stride_as,
    stride_ak,
    stride_gs,
    stride_gn,
    stride_be,
    stride_bk,
    stride_bn,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """A tile [BLOCK_K, BLOCK_N] of one expert's dB; the tile of an expert without rows is zero."""
    across = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    expert = tl.program_id(1)
    k = (tile // across) * BLOCK_K + tl.arange(0, BLOCK_K)
    n = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offsets_ptr + expert).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    r = tl.arange(0, BLOCK_S)
    row = begin.to(tl.int64) + r
    a_at = a_ptr + row[None, :] * stride_as + k.to(tl.int64)[:, None] * stride_ak
    g_at = grad_ptr + row[:, None] * stride_gs + n.to(tl.int64)[None, :] * stride_gn
    step_a = tl.full([], BLOCK_S, tl.int64) * stride_as
    step_g = tl.full([], BLOCK_S, tl.int64) * stride_gs
    acc = tl.zeros([BLOCK_K, BLOCK_N], dtype=tl.float32)
    for first in range(begin, end, BLOCK_S):
        inside = first + r < end
        a = tl.load(a_at, mask=inside[None, :] & (k < Kdim)[:, None], other=0.0)  # [BLOCK_K, BLOCK_S]
        if token_ptr is not None:
            token = tl.load(token_ptr + first + r, mask=inside, other=0).to(tl.int64)
            g_at = grad_ptr + token[:, None] * stride_gs + n.to(tl.int64)[None, :] * stride_gn
        g = tl.load(g_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        if UPCAST:
            a, g = a.to(tl.float32), g.to(tl.float32)
        acc = tl.dot(a, g, acc, input_precision=PRECISION)
        a_at += step_a
        if token_ptr is None:
            g_at += step_g
    at = db_ptr + expert.to(tl.int64) * stride_be + k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    tl.store(at, acc.to(db_ptr.dtype.element_ty), mask=(k < Kdim)[:, None] & (n < N)[None, :])


def _launch(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    out: Tensor,
    tile: GroupedTile | None,
    zero: bool = False,
    token: Tensor | None = None,
    source: Tensor | None = None,
    weights: Tensor | None = None,
    tiles: RowTiles | None = None,
) -> None:
    S, (E, Kdim, N) = a.shape[0], b.shape
    if S * N == 0:
        return
    if E * Kdim == 0:
        out.zero_()
        return
    tile = tile or grouped_mm_tile(S, E, Kdim, N, a.dtype)
    block = tile.block if tiles is None else tile.block | {"BLOCK_M": tiles.block_m, "GROUP_M": tiles.group_m}
    columns = triton.cdiv(N, block["BLOCK_N"])
    row_tiles = most_row_tiles(S, E + zero, block["BLOCK_M"]) if tiles is None else len(tiles.table)
    with device_guard(a):
        _grouped_mm_kernel[(row_tiles * columns,)](
            a,
            b,
            offsets,
            out,
            token,
            source,
            None if weights is None else weights.contiguous().view(-1),
            None if tiles is None else tiles.table,
            S,
            E,
            Kdim,
            N,
            columns,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            ZERO=zero,
            ATOMIC=token is not None,
            EVEN=Kdim % block["BLOCK_K"] == 0,
            EVEN_N=N % block["BLOCK_N"] == 0,
            BLOCK_E=block_of(E),
            **product_options(a),
            **block,
            **tile.options,
        )


def grouped_product(
    a: Tensor,
    b: Tensor,
    offsets: Tensor,
    *,
    zero: bool = True,
    tile: GroupedTile | None = None,
    form: str = "tiles",
    tiles: RowTiles | None = None,
) -> Tensor:
    """out [S, N]; its rows from offsets[E] on are zero, or not written.

    form: "tiles" finds its tiles, "table" reads them from ``tiles``, which it needs; "stationary" keeps an expert's columns on the
    chip (``stationary.py``). The last two do not zero."""
    S, (E, Kdim, N) = a.shape[0], b.shape
    out = a.new_empty(S, N)
    if form == "stationary" and not zero and S * N * E * Kdim > 0:
        tile = tile or grouped_stationary_tile(S, E, Kdim, N, a.dtype, early=before_hopper(a.device))
        stationary_product(a, b, offsets.contiguous(), out, tile)
    else:
        _launch(a, b, offsets.contiguous(), out, tile, zero, tiles=None if zero or form == "tiles" else tiles)
    return out


def add_product(h: Tensor, down: Tensor, offsets: Tensor, y: Tensor, token: Tensor, source: Tensor, weights: Tensor | None) -> None:
    """y [T, H] float32 += each slot's weighted row, by atomics."""
    _launch(h, down.transpose(1, 2), offsets, y, None, False, token, source, weights)


def weight_gradient(a: Tensor, grad: Tensor, offsets: Tensor, like: Tensor, token: Tensor | None = None) -> Tensor:
    """dB [E, Kdim, N] in the storage of ``like``. With ``token`` [S] the rows of grad are grad[token]."""
    E, Kdim, N = like.shape
    db = torch.empty_like(like)
    if db.numel() == 0:
        return db
    block, options = grouped_weight_tile(a.dtype, gathered=token is not None)
    with device_guard(a):
        _grouped_weight_kernel[triton.cdiv(Kdim, block["BLOCK_K"]) * triton.cdiv(N, block["BLOCK_N"]), E](
            a,
            grad,
            token,
            offsets.contiguous(),
            db,
            Kdim,
            N,
            *a.stride(),
            *grad.stride(),
            *db.stride(),
            **product_options(a),
            **block,
            **options,
        )
    return db
