# mypy: disable-error-code="no-untyped-def"
"""Grouped products in Triton with the weights at rest: an expert's columns stay on the chip while its rows pass.

    out[p] = a[p] B_e,  p in [offsets[e], offsets[e + 1])

a [S, Kdim], B [E, Kdim, N] of any strides, out [S, N]; rows from offsets[E] on are not written. A program holds BLOCK_N columns of
one expert, all Kdim of them, and walks over every SHARE-th tile of BLOCK_M rows: thin experts have so few steps along Kdim that a
program of a single tile would begin and end for as long as it multiplies. The loop over rows is the one that is pipelined. All Kdim
in one product, accumulated in float32. Cost: 2 S Kdim N flops.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._backend import device_guard, product_options
from ...._tiles import GroupedTile


@triton.jit
def _grouped_stationary_kernel(
    a_ptr,  # [S, Kdim]
    b_ptr,  # [E, Kdim, N]
    offsets_ptr,  # [E + 1]
    out_ptr,  # [S, N]
    Kdim,
    N,
    stride_as,
    stride_ak,
    stride_be,
    stride_bk,
    stride_bn,
    stride_os,
    EVEN: tl.constexpr,  # Kdim is BLOCK_K
    EVEN_N: tl.constexpr,  # N is a multiple of BLOCK_N
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # all Kdim
    SHARE: tl.constexpr,  # programs that share an expert's rows
    STAGES: tl.constexpr,
):
    """Grid (columns * SHARE, E)."""
    expert = tl.program_id(1)
    begin = tl.load(offsets_ptr + expert).to(tl.int32)
    end = tl.load(offsets_ptr + expert + 1).to(tl.int32)
    begin += tl.program_id(0) % SHARE * BLOCK_M
    if begin >= end:
        return
    n = tl.program_id(0) // SHARE * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    b_at = b_ptr + expert.to(tl.int64) * stride_be
    b_at += k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    if EVEN and EVEN_N:
        b = tl.load(b_at)
    else:
        b = tl.load(b_at, mask=(k < Kdim)[:, None] & (n < N)[None, :], other=0.0)
    if UPCAST:
        b = b.to(tl.float32)
    a_at = a_ptr + k.to(tl.int64)[None, :] * stride_ak
    for start in tl.range(begin, end, BLOCK_M * SHARE, num_stages=STAGES):
        p = start + tl.arange(0, BLOCK_M)
        row = tl.minimum(p, end - 1).to(tl.int64)  # rows behind the last repeat it, and are not stored
        if EVEN:
            a = tl.load(a_at + row[:, None] * stride_as)
        else:
            a = tl.load(a_at + row[:, None] * stride_as, mask=(k < Kdim)[None, :], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
        out = tl.dot(a, b, input_precision=PRECISION).to(out_ptr.dtype.element_ty)
        out_at = out_ptr + p.to(tl.int64)[:, None] * stride_os + n[None, :]
        if EVEN_N:
            tl.store(out_at, out, mask=(p < end)[:, None])
        else:
            tl.store(out_at, out, mask=(p < end)[:, None] & (n < N)[None, :])


def stationary_product(a: Tensor, b: Tensor, offsets: Tensor, out: Tensor, tile: GroupedTile) -> None:
    """Writes out [S, N], the rows below offsets[E]; Kdim fits the tile."""
    E, Kdim, N = b.shape
    block = tile.block
    with device_guard(a):
        _grouped_stationary_kernel[triton.cdiv(N, block["BLOCK_N"]) * block["SHARE"], E](
            a,
            b,
            offsets,
            out,
            Kdim,
            N,
            *a.stride(),
            *b.stride(),
            out.stride(0),
            EVEN=Kdim == block["BLOCK_K"],
            EVEN_N=N % block["BLOCK_N"] == 0,
            **product_options(a),
            **block,
            **tile.options,
        )
