# mypy: disable-error-code="no-untyped-def"
"""The grouped path in Triton, backward: the formulas of ``cpu.py`` over the expert-sorted slots.

    dh_p = Down_e^T dy_t (t = token[p]), h_p = act(g_p) * u_p;  dw_p = <h_p, dh_p>;  dDown_e = sum_p dy_t (w_p h_p)^T
    dz_p = (dg_p, du_p) = w_p (act'(g_p) u_p dh_p, act(g_p) dh_p);  dGateUp_e = sum_p dz_p x_t^T;  dx_t = sum_p GateUp_e^T dz_p

z = (g, u) and dz are [S, 2s], z from the forward pass. One kernel gathers the rows of dy while it loads them and goes from dh,
which is never stored, to dz, w h and dw; the weight gradients gather rows of x and dy in the same way. Accumulated
in float32, in a fixed order, without atomics. The rows [S, H] that are summed to dx are made some columns at a time, in a
workspace of bounded size. Rows of empty slots are neither read nor written. Cost: 12 S s H flops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import device_guard, product_options
from ..._tiles import GroupedTile, grouped_hidden_bwd_tile
from ...dispatch.gpu.tiles import most_row_tiles
from ..activations.gpu import activate, activate_derivative
from ..grouped.gpu.down import weight_gradient
from ..grouped.gpu.forward import token_sums
from ..grouped.gpu.joint import halves
from ..grouped.gpu.schedule import pick_tile
from ..grouped.gpu.up import block_of, up_product


@triton.jit
def _finish(dh, w, live, n, s, z_ptr, dz_ptr, h_ptr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr):
    """From dh [BLOCK_M, columns n], before the routing weights w, to dz and w h; gives the sum of h dh over the columns.

    Pointers are those of the first row: offsets within a tile fit 32 bits."""
    inside = live[:, None] & (n < s)[None, :]
    row = tl.arange(0, BLOCK_M)[:, None]
    z_at = row * (2 * s) + n[None, :]
    gate = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(z_ptr + s + z_at, mask=inside, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION)
    h = activated * up
    dw = tl.sum(h * dh, 1)
    if h_ptr is not None:
        tl.store(h_ptr + (row * s + n[None, :]), (h * w[:, None]).to(h_ptr.dtype.element_ty), mask=inside)
    if dz_ptr is not None:
        dh *= w[:, None]
        tl.store(dz_ptr + s + z_at, (activated * dh).to(dz_ptr.dtype.element_ty), mask=inside)
        dgate = activate_derivative(gate, ACTIVATION) * up * dh
        tl.store(dz_ptr + z_at, dgate.to(dz_ptr.dtype.element_ty), mask=inside)
    return dw


# columns: as the constant 1 it makes Triton 3.6 keep 27 registers more, and spill them
@triton.jit(do_not_specialize=["E", "pairs", "columns"])
def _grouped_hidden_bwd_kernel(
    dy_ptr,  # [T, H]
    down_ptr,  # [E, H, s]
    z_ptr,  # [S, 2s]: gate, then up
    token_ptr,  # [S]
    source_ptr,  # [S], read with weights
    offsets_ptr,  # [E + 1]
    weights_ptr,  # [T K] or None: 1
    dz_ptr,  # [S, 2s] out, or None
    h_ptr,  # [S, s] out, w h, or None
    dweights_ptr,  # [columns, T K] out, or None
    E,
    H,
    s,
    pairs,  # T K
    columns,
    stride_dt,
    stride_dh,
    stride_we,
    stride_wh,
    stride_ws,
    ACTIVATION: tl.constexpr,
    PRODUCT: tl.constexpr,  # dz or dweights is wanted, and so dh
    EVEN: tl.constexpr,  # H is a multiple of BLOCK_K
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
    expert, start, end, column = pick_tile(program, offsets_ptr, E, 0, columns, False, BLOCK_M, BLOCK_E, GROUP_M)
    if expert >= E:
        return
    p = start + tl.arange(0, BLOCK_M)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dh = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if PRODUCT:
        token = tl.load(token_ptr + tl.minimum(p, end - 1)).to(tl.int64)  # rows behind the last repeat it, and are not stored
        dy_at = dy_ptr + token[:, None] * stride_dt + k.to(tl.int64)[None, :] * stride_dh
        b_at = down_ptr + expert.to(tl.int64) * stride_we
        b_at += k.to(tl.int64)[:, None] * stride_wh + n.to(tl.int64)[None, :] * stride_ws
        step_dy = tl.full([], BLOCK_K, tl.int64) * stride_dh
        step_b = tl.full([], BLOCK_K, tl.int64) * stride_wh
        for first in range(0, H, BLOCK_K):
            inside = first + k < H
            if EVEN:
                dy = tl.load(dy_at)
            else:
                dy = tl.load(dy_at, mask=inside[None, :], other=0.0)
            if EVEN and EVEN_N:
                b = tl.load(b_at)
            elif EVEN:
                b = tl.load(b_at, mask=(n < s)[None, :], other=0.0)
            else:
                b = tl.load(b_at, mask=inside[:, None] & (n < s)[None, :], other=0.0)
            if UPCAST:
                dy, b = dy.to(tl.float32), b.to(tl.float32)
            dh = tl.dot(dy, b, dh, input_precision=PRECISION)
            dy_at += step_dy
            b_at += step_b
    live = p < end
    slot = p.to(tl.int64)
    w = tl.full([BLOCK_M], 1.0, tl.float32)
    if weights_ptr is not None:
        source = tl.load(source_ptr + slot, mask=live, other=0).to(tl.int64)
        w = tl.load(weights_ptr + source, mask=live, other=0.0).to(tl.float32)
    at = start.to(tl.int64) * s
    z_ptr += 2 * at
    if dz_ptr is not None:
        dz_ptr += 2 * at
    if h_ptr is not None:
        h_ptr += at
    low, high = halves(dh, BLOCK_M, BLOCK_N)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dw = _finish(low, w, live, n, s, z_ptr, dz_ptr, h_ptr, ACTIVATION, BLOCK_M)
    dw += _finish(high, w, live, n + BLOCK_N // 2, s, z_ptr, dz_ptr, h_ptr, ACTIVATION, BLOCK_M)
    if dweights_ptr is not None:
        tl.store(dweights_ptr + column.to(tl.int64) * pairs + source, dw.to(dweights_ptr.dtype.element_ty), mask=live)


def hidden_backward(
    dy: Tensor,
    down: Tensor,
    z: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    activation: str,
    *,
    needs_z: bool,
    needs_h: bool,
    needs_weights: bool,
    tile: GroupedTile | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dz [S, 2s], w h [S, s] and dweights [T, K], each only if needed. Rows from offsets[E] on are not written, dweights are 0.

    Several column tiles of an expert leave one part of dweights each, added up in their order."""
    (E, H, s), S = down.shape, token.numel()
    tile = tile or grouped_hidden_bwd_tile(S, E, s, dy.dtype)
    columns = triton.cdiv(s, tile.block["BLOCK_N"])
    dz = torch.empty_like(z) if needs_z else None
    h = z.new_empty(S, s) if needs_h else None
    dweights = None
    if needs_weights and weights is not None:
        dweights = weights.new_zeros((columns, S), dtype=weights.dtype if columns == 1 else torch.float32)
    with device_guard(dy):
        _grouped_hidden_bwd_kernel[(most_row_tiles(S, E, tile.block["BLOCK_M"]) * columns,)](
            dy,
            down,
            z,
            token,
            source,
            offsets,
            None if weights is None else weights.contiguous().view(-1),
            dz,
            h,
            dweights,
            E,
            H,
            s,
            S,
            columns,
            *dy.stride(),
            *down.stride(),
            ACTIVATION=activation,
            PRODUCT=needs_z or needs_weights,
            EVEN=H % tile.block["BLOCK_K"] == 0,
            EVEN_N=s % tile.block["BLOCK_N"] == 0,
            BLOCK_E=block_of(E),
            **product_options(dy),
            **tile.block,
            **tile.options,
        )
    if dweights is not None and weights is not None:
        dweights = dweights.view(weights.shape) if columns == 1 else dweights.sum(0).to(weights.dtype).view(weights.shape)
    return dz, h, dweights


def forward(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor | None,
    token: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    keep: bool,
    workspace: int | None,
) -> tuple[Tensor, Tensor]:
    """y [T, H] and, if ``keep``, z [S, 2s], else empty."""
    (T, H), (E, width), S = x.shape, gate_up.shape[:2], token.numel()
    if S * E * width * H == 0:
        return x.new_zeros(T, H), x.new_zeros((S, width) if keep else 0)
    h, z = up_product(x, gate_up, token, offsets, activation, keep=keep)
    y = token_sums(h, down.transpose(1, 2), weights, slot_of, offsets, workspace)
    return y, x.new_empty(0) if z is None else z


def _contiguous_rows(x: Tensor) -> Tensor:
    """Rows that are read once a slot are worth a copy that makes their loads wide."""
    return x if x.stride(-1) == 1 else x.contiguous()


def backward(
    dy: Tensor,
    x: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor | None,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    z: Tensor | None,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
    workspace: int | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dgate_up, ddown, dweights, each only where ``needs`` says so. z None: computed again. x: read for z and dgate_up."""
    (E, width, H), S = gate_up.shape, token.numel()
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    if S * E * width * H == 0:
        likes = (dy, gate_up, down, weights)
        dx, dgate_up, ddown, dw = (torch.zeros_like(t) if n and t is not None else None for n, t in zip(needs, likes, strict=True))
        return None if dx is None else dx.contiguous(), dgate_up, ddown, None if dw is None else dw.contiguous()
    dy, x = _contiguous_rows(dy), None if x is None else _contiguous_rows(x)
    if z is None and x is not None:
        _, z = up_product(x, gate_up, token, offsets, activation, keep=True)
    if z is None:
        raise ValueError("z is None without x; allowed: one of them")
    needs_z = needs_x or needs_gate_up
    found = hidden_backward(
        dy, down, z, token, source, offsets, weights, activation, needs_z=needs_z, needs_h=needs_down, needs_weights=needs_weights
    )
    dz, h, dweights = found
    del z, found
    dx = dgate_up = ddown = None
    if h is not None:
        ddown = weight_gradient(h, dy, offsets, down.transpose(1, 2), token).transpose(1, 2)
        del h
    if needs_gate_up and dz is not None and x is not None:
        dgate_up = weight_gradient(dz, x, offsets, gate_up, token)
    if needs_x and dz is not None:
        dx = token_sums(dz, gate_up, None, slot_of, offsets, workspace)
    return dx, dgate_up, ddown, dweights
