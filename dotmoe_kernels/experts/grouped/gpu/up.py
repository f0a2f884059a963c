# mypy: disable-error-code="no-untyped-def"
"""The up product of the grouped path in Triton: token rows are gathered while they are loaded.

    h[p] = act(Gate_e x_t) * (Up_e x_t),  t = token[p],  p in [offsets[e], offsets[e + 1])

x [T, H]; gate_up_proj [E, 2s, H], both halves of a tile at once; h [S, s], or with weights at the places of the dense hidden
[T, E s]. Accumulated and activated in float32. The gate and up rows before the activation are stored on demand, [S, 2s], for a
backward pass. Rows of empty slots are left as they are and cost nothing. Cost: 4 S s H flops.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...._backend import device_guard, product_options
from ...._tiles import GroupedTile, before_hopper, grouped_up_tile
from ....dispatch.gpu.tiles import RowTiles, most_row_tiles
from ...activations.gpu import activate
from .joint import joint_up_product
from .schedule import pick_tile


def block_of(E: int) -> int:
    """BLOCK_E of ``pick_tile``."""
    return max(16, triton.next_power_of_2(E + 1))


@triton.jit(do_not_specialize=["E"])
def _grouped_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2s, H]
    token_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    source_ptr,  # [S], read with weights
    weights_ptr,  # [T K] or None: 1
    h_ptr,  # [S, s] or [T, E s] out
    z_ptr,  # [S, 2s] out, or None
    E,
    H,
    s,
    columns,
    stride_xt,
    stride_xh,
    stride_ge,
    stride_gn,
    stride_gh,
    stride_hr,
    stride_he,
    ACTIVATION: tl.constexpr,
    DENSE: tl.constexpr,  # rows of h are tokens
    EVEN: tl.constexpr,  # H is a multiple of BLOCK_K
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program = tl.program_id(0)
    expert, start, end, column = pick_tile(program, offsets_ptr, E, 0, columns, False, BLOCK_M, BLOCK_E, GROUP_M)
    if expert >= E:
        return
    p = start + tl.arange(0, BLOCK_M)
    token = tl.load(token_ptr + tl.minimum(p, end - 1)).to(tl.int64)  # rows behind the last repeat it, and are not stored
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * stride_xt + k.to(tl.int64)[None, :] * stride_xh
    row = tl.minimum(n, s - 1).to(tl.int64)
    at = gate_up_ptr + expert.to(tl.int64) * stride_ge + k.to(tl.int64)[:, None] * stride_gh
    g_at = at + row[None, :] * stride_gn
    u_at = at + (row + s)[None, :] * stride_gn
    step_x = tl.full([], BLOCK_K, tl.int64) * stride_xh
    step_g = tl.full([], BLOCK_K, tl.int64) * stride_gh
    gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, H, BLOCK_K):
        if EVEN:
            x = tl.load(x_at)
            g = tl.load(g_at)
            u = tl.load(u_at)
        else:
            inside = first + k < H
            x = tl.load(x_at, mask=inside[None, :], other=0.0)
            g = tl.load(g_at, mask=inside[:, None], other=0.0)
            u = tl.load(u_at, mask=inside[:, None], other=0.0)
        if UPCAST:
            x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
        gate = tl.dot(x, g, gate, input_precision=PRECISION)
        up = tl.dot(x, u, up, input_precision=PRECISION)
        x_at += step_x
        g_at += step_g
        u_at += step_g
    inside = (p < end)[:, None] & (n < s)[None, :]
    slot = p.to(tl.int64)
    if z_ptr is not None:
        z_at = z_ptr + slot[:, None] * (2 * s) + n[None, :]
        tl.store(z_at, gate.to(z_ptr.dtype.element_ty), mask=inside)
        tl.store(z_at + s, up.to(z_ptr.dtype.element_ty), mask=inside)
    h = activate(gate, ACTIVATION) * up
    if weights_ptr is not None:
        source = tl.load(source_ptr + slot, mask=p < end, other=0)
        h *= tl.load(weights_ptr + source, mask=p < end, other=0.0).to(tl.float32)[:, None]
    place = token if DENSE else slot
    h_at = h_ptr + place[:, None] * stride_hr + expert.to(tl.int64) * stride_he + n[None, :]
    tl.store(h_at, h.to(h_ptr.dtype.element_ty), mask=inside)


def up_product(
    x: Tensor,
    gate_up: Tensor,
    token: Tensor,
    offsets: Tensor,
    activation: str,
    *,
    keep: bool = False,
    dense: bool = False,
    source: Tensor | None = None,
    weights: Tensor | None = None,
    tile: GroupedTile | None = None,
    tiles: RowTiles | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h [S, s] and, where ``keep``, the rows before the activation [S, 2s]: gate, then up. Rows from offsets[E] on are not written.

    dense: h is [T, E s], zero where a token did not choose the expert; a token must not name an expert twice. tiles: those of the
    same rows a tile, for gate and up in one product (``joint.py``; neither dense nor weights)."""
    (E, width, H), S = gate_up.shape, token.numel()
    s = width // 2
    h = x.new_zeros(x.shape[0], E * s) if dense else x.new_empty(S, s)
    z = x.new_empty(S, width) if keep else None
    if S * s * E == 0:
        return h, z
    tile = tile or grouped_up_tile(S, E, s, x.dtype, keep=keep, early=before_hopper(x.device))
    if tiles is not None:
        joint_up_product(x, gate_up, token, tiles, activation, h, z, tile)
        return h, z
    columns = triton.cdiv(s, tile.block["BLOCK_N"])
    with device_guard(x):
        _grouped_up_kernel[(most_row_tiles(S, E, tile.block["BLOCK_M"]) * columns,)](
            x,
            gate_up,
            token,
            offsets,
            source,
            None if weights is None else weights.contiguous().view(-1),
            h,
            z,
            E,
            H,
            s,
            columns,
            *x.stride(),
            *gate_up.stride(),
            h.stride(0),
            s if dense else 0,
            ACTIVATION=activation,
            DENSE=dense,
            EVEN=H % tile.block["BLOCK_K"] == 0,
            BLOCK_E=block_of(E),
            **product_options(x),
            **tile.block,
            **tile.options,
        )
    return h, z
