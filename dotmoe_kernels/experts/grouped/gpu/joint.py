# mypy: disable-error-code="no-untyped-def"
"""The up product of the grouped path in Triton, gate and up in one tile: one product a step instead of two.

    h[p] = act(Gate_e x_t) * (Up_e x_t),  t = token[p],  p in [offsets[e], offsets[e + 1])

x [T, H]; gate_up_proj [E, 2s, H]; h [S, s]. A tile of the weights is [BLOCK_K, 2 BLOCK_N], BLOCK_N rows of gate and the same of up,
so that a tile of x is read from shared memory once for both; the sums [BLOCK_M, 2 BLOCK_N] are split where they lie. Which tile a
program takes stands in the table that the sort left (``dispatch/gpu/tiles.py``). Accumulated and activated in float32. The rows
before the activation are stored on demand, [S, 2s]. Rows of empty slots are left as they are and cost nothing. Cost: 4 S s H flops.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._backend import device_guard, product_options
from ...._tiles import GroupedTile
from ....dispatch.gpu.tiles import RowTiles, read_tile
from ...activations.gpu import activate


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@triton.jit
def _grouped_joint_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2s, H]
    token_ptr,  # [S]
    tiles_ptr,  # [tiles, 4]
    h_ptr,  # [S, s] out
    z_ptr,  # [S, 2s] out, or None
    H,
    s,
    columns,
    stride_xt,
    stride_xh,
    stride_ge,
    stride_gn,
    stride_gh,
    ACTIVATION: tl.constexpr,
    EVEN: tl.constexpr,  # H is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # of gate, and of up
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    expert, start, end, column = read_tile(tiles_ptr, tl.program_id(0), columns, BLOCK_M, GROUP_M)
    if expert < 0:
        return
    p = start + tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + tl.minimum(p, end - 1)).to(tl.int64)  # rows behind the last repeat it, and are not stored
    c = tl.arange(0, 2 * BLOCK_N)
    n = column * BLOCK_N + c % BLOCK_N
    row = tl.minimum(n, s - 1) + tl.where(c < BLOCK_N, 0, s)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xh
    w_at = gate_up_ptr + expert.to(tl.int64) * stride_ge
    w_at += row.to(tl.int64)[None, :] * stride_gn + k.to(tl.int64)[:, None] * stride_gh
    step_x = tl.full([], BLOCK_K, tl.int64) * stride_xh
    step_w = tl.full([], BLOCK_K, tl.int64) * stride_gh
    acc = tl.zeros([BLOCK_M, 2 * BLOCK_N], dtype=tl.float32)
    for first in range(0, H, BLOCK_K):
        if EVEN:
            x = tl.load(x_at)
            w = tl.load(w_at)
        else:
            inside = first + k < H
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            w = tl.load(w_at, mask=inside[:, None], other=0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
        x_at += step_x
        w_at += step_w
    slot = p.to(tl.int64)
    gate, up = halves(acc, BLOCK_M, 2 * BLOCK_N)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (p < end)[:, None] & (n < s)[None, :]
    if z_ptr is not None:
        z_at = z_ptr + slot[:, None] * (2 * s) + n[None, :]
        tl.store(z_at, gate.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(z_at + s, up.to(z_ptr.dtype.element_ty), mask=inside)
    h = activate(gate, ACTIVATION) * up
    tl.store(h_ptr + slot[:, None] * s + n[None, :], h.to(h_ptr.dtype.element_ty), mask=inside)


def joint_up_product(
    x: Tensor, gate_up: Tensor, token: Tensor, tiles: RowTiles, activation: str, h: Tensor, z: Tensor | None, tile: GroupedTile
) -> None:
    """Writes h [S, s] and, where it is given, z [S, 2s]; ``tile`` has the rows of ``tiles``."""
    H, s = gate_up.shape[2], gate_up.shape[1] // 2
    columns = triton.cdiv(s, tile.block["BLOCK_N"])
    with device_guard(x):
        _grouped_joint_up_kernel[(len(tiles.table) * columns,)](
            x,
            gate_up,
            token,
            tiles.table,
            h,
            z,
            H,
            s,
            columns,
            *x.stride(),
            *gate_up.stride(),
            ACTIVATION=activation,
            EVEN=H % tile.block["BLOCK_K"] == 0,
            **product_options(x),
            **(tile.block | {"GROUP_M": tiles.group_m}),
            **tile.options,
        )
