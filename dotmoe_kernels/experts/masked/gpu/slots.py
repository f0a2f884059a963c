# mypy: disable-error-code="no-untyped-def"
"""``masked_ffn`` in Triton where every expert has s = F / E neurons and the weights are frozen: no product with the mask's zeros.

The straight-through gradients need gate, up and dhidden = dY Wd of every neuron and token: three dense products. What stands behind
the mask is the routed FFN's, so it takes the routed FFN's kernels. The weights are copied in the order of their experts; a slot p
of token t and expert e then reads its s neurons of gate, up and dhidden as one piece of a row:

    h[p] = act(gate) * up [S, s];  y_t = sum_p w_p Down_e h[p]
    dz[p] = (d up act'(gate), d act(gate)) [S, 2s];  dx_t = sum_p w_p GateUp_e^T dz[p];  d = dhidden before its weight

Routing weights are applied in float32, with the sums. Cost in products of [T, H] x [H, F]: 3 + 3 K / E instead of six; the rows
[S, H] of both sums are written and read, and the weights are copied once in either pass.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ...._backend import device_guard, product_options
from ...._tiles import columns_tile, masked_splits, masked_tile, row_tile, slots_tile
from ...activations.gpu import activate, activate_derivative
from ...grouped.gpu.forward import token_sums
from .gradients import aligned_columns


@triton.jit
def _pack_rows_kernel(
    gate_ptr,  # [F, H]
    up_ptr,  # [F, H]
    order_ptr,  # [F]
    starts_ptr,  # [E + 1] where the experts start in the order
    packed_ptr,  # [E, 2s, H] out
    H,
    s,
    stride_gf,
    stride_gh,
    stride_uf,
    stride_uh,
    BLOCK_H: tl.constexpr,
):
    """A row of gate and of up. An expert of other than s neurons, or not at its place, gets NaN, so that no wrong result passes for
    one; in up, since what relu makes of NaN is 0."""
    position = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    neuron = tl.load(order_ptr + position).to(tl.int64)
    e = position // s
    wrong = (tl.load(starts_ptr + e) != e * s) | (tl.load(starts_ptr + e + 1) != (e + 1) * s)
    at = h.to(tl.int64)
    gate = tl.load(gate_ptr + neuron * stride_gf + at * stride_gh, mask=inside, other=0.0)
    up = tl.load(up_ptr + neuron * stride_uf + at * stride_uh, mask=inside, other=0.0)
    up = tl.where(wrong, float("nan"), up.to(tl.float32)).to(up.dtype)
    out = packed_ptr + (position + e * s).to(tl.int64) * H + h
    tl.store(out, gate, mask=inside)
    tl.store(out + tl.full((), 1, tl.int64) * s * H, up, mask=inside)


@triton.jit
def _pack_columns_kernel(
    down_ptr,  # [H, F]
    order_ptr,  # [F]
    packed_ptr,  # [H, F] out
    F,
    stride_dh,
    stride_df,
    WHOLE: tl.constexpr,  # BLOCK_F >= F
    BLOCK_F: tl.constexpr,
):
    """A program copies a row. It is read as it lies and ordered on the chip, where it fits; else its neurons are read from anywhere
    in it, which together are the row, and the cache keeps it."""
    row = tl.program_id(0).to(tl.int64)
    down_ptr += row * stride_dh
    packed_ptr += row * F
    f = tl.arange(0, BLOCK_F)
    if WHOLE:
        x = tl.load(down_ptr + f.to(tl.int64) * stride_df, mask=f < F, other=0.0)
        neuron = tl.load(order_ptr + f, mask=f < F, other=0)
        tl.store(packed_ptr + f, tl.gather(x, neuron, 0), mask=f < F)
    else:
        for start in range(0, F, BLOCK_F):
            neuron = tl.load(order_ptr + start + f, mask=start + f < F, other=0).to(tl.int64)
            x = tl.load(down_ptr + neuron * stride_df, mask=start + f < F, other=0.0)
            tl.store(packed_ptr + start + f, x, mask=start + f < F)


@triton.jit(do_not_specialize=["S", "E"])
def _slots_hidden_kernel(
    product_ptr,  # [T, E, 2s]
    d_ptr,  # [T, E, s] dhidden, or None
    indices_ptr,  # [T K]
    token_ptr,  # [S]
    source_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    out_ptr,  # h [S, s] out; with d, dz [S, 2s]
    S,
    E,
    s,
    UNIT: tl.constexpr,  # divides s
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of empty slots, from offsets[E] on, are left as they are."""
    s = s // UNIT * UNIT  # so that the compiler knows
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = p < tl.minimum(tl.load(offsets_ptr + E), S)
    inside = live[:, None] & (n < s)[None, :]
    slot = p.to(tl.int64)
    token = tl.load(token_ptr + slot, mask=live, other=0).to(tl.int64)
    source = tl.load(source_ptr + slot, mask=live, other=0).to(tl.int64)
    first = (token * E + tl.load(indices_ptr + source, mask=live, other=0)) * s  # of the expert's neurons
    gate_at = product_ptr + (2 * first)[:, None] + n[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + s, mask=inside, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION)
    if d_ptr is None:
        tl.store(out_ptr + slot[:, None] * s + n[None, :], (activated * up).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        d = tl.load(d_ptr + first[:, None] + n[None, :], mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + slot[:, None] * (2 * s) + n[None, :]
        tl.store(out, (d * up * activate_derivative(gate, ACTIVATION)).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + s, (d * activated).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _slots_soft_kernel(
    product_ptr,  # [T, E, 2s]
    d_ptr,  # [T, E, s] dhidden
    r_ptr,  # [T, C], C >= E columns, read with dplan
    dplan_ptr,  # [SPLITS, F, C] out, float32, or None
    dr_ptr,  # [tiles, T, E] out, float32, or None
    T,
    E,
    C,
    s,
    share,  # tokens of a program
    UNIT: tl.constexpr,  # divides s
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The straight-through gradients, from one pass over d * U: dP = (d * U)^T R, and dR, the sums over an expert's neurons.

    A program keeps neurons of one expert and walks over its share of the tokens."""
    s = s // UNIT * UNIT  # so that the compiler knows
    tiles = tl.cdiv(s, BLOCK_F)
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) - expert * tiles
    n = tile * BLOCK_F + tl.arange(0, BLOCK_F)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, T)
    c = tl.arange(0, BLOCK_E)
    if dplan_ptr is not None:
        acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        t = rows.to(tl.int64)
        inside = (rows < end)[:, None] & (n < s)[None, :]
        first = ((t * E + expert) * s)[:, None]
        d = tl.load(d_ptr + first + n[None, :], mask=inside, other=0.0)
        gate = tl.load(product_ptr + 2 * first + n[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(product_ptr + 2 * first + s + n[None, :], mask=inside, other=0.0).to(tl.float32)
        product = d.to(tl.float32) * activate(gate, ACTIVATION) * up
        if dr_ptr is not None:
            tl.store(dr_ptr + (tile.to(tl.int64) * T + t) * E + expert, tl.sum(product, 1), mask=rows < end)
        if dplan_ptr is not None:
            r = tl.load(r_ptr + t[:, None] * C + c[None, :], mask=(rows < end)[:, None] & (c < C)[None, :], other=0.0)
            product, r = product.to(d.dtype), r.to(d.dtype)
            if UPCAST:
                product, r = product.to(tl.float32), r.to(tl.float32)
            acc = tl.dot(tl.trans(product), r, acc, input_precision=PRECISION)
    if dplan_ptr is not None:
        row = (tl.program_id(1).to(tl.int64) * E + expert) * s + n
        tl.store(dplan_ptr + row[:, None] * C + c[None, :], acc, mask=(n < s)[:, None] & (c < C)[None, :])


def pack_rows(gate_proj: Tensor, up_proj: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """gate_up_proj [E, 2s, H] in the stored order."""
    (F, H), E = gate_proj.shape, starts.numel() - 1
    packed = gate_proj.new_empty(E, 2 * (F // E), H)
    tile, options = row_tile(H, gate_proj.dtype)
    with device_guard(gate_proj):
        _pack_rows_kernel[F, triton.cdiv(H, tile["BLOCK_H"])](
            gate_proj,
            up_proj,
            order,
            starts,
            packed,
            H,
            F // E,
            *gate_proj.stride(),
            *up_proj.stride(),
            **tile,
            **options,
        )
    return packed


def pack_columns(down_proj: Tensor, order: Tensor) -> Tensor:
    """down_proj [H, F] in the stored order."""
    H, F = down_proj.shape
    packed = down_proj.new_empty(H, F)
    tile, options = columns_tile(F, down_proj.element_size())
    with device_guard(down_proj):
        _pack_columns_kernel[(H,)](down_proj, order, packed, F, *down_proj.stride(), **tile, **options)
    return packed


def _unit(s: int) -> int:
    """Of the width of an expert: 8 numbers are as wide as a load."""
    return math.gcd(s, 8)


def _slots_hidden(
    product: Tensor, d: Tensor | None, indices: Tensor, token: Tensor, source: Tensor, offsets: Tensor, activation: str
) -> Tensor:
    """h [S, s], or with d [T, F] dz [S, 2s]."""
    S, E = token.numel(), offsets.numel() - 1
    s = product.shape[1] // (2 * E)
    out = product.new_empty(S, s if d is None else 2 * s)
    tile, options = slots_tile(s)
    with device_guard(product):
        _slots_hidden_kernel[triton.cdiv(S, tile["BLOCK_P"]), triton.cdiv(s, tile["BLOCK_N"])](
            product,
            d,
            indices.contiguous(),
            token,
            source,
            offsets,
            out,
            S,
            E,
            s,
            UNIT=_unit(s),
            ACTIVATION=activation,
            **tile,
            **options,
        )
    return out


def _soft_gradients(
    product: Tensor, d: Tensor, r: Tensor, activation: str, needs_r: bool, needs_plan: bool
) -> tuple[Tensor, Tensor]:
    """dR [T, E] and dP [F, E] of the stored order, in float32; empty where not needed."""
    (T, E), F, new = r.shape, d.shape[1], d.new_empty
    s, columns = F // E, aligned_columns(r) if needs_plan else r
    tile, options = masked_tile("plan", s, E, d.element_size() > 2)
    tiles = triton.cdiv(s, tile["BLOCK_F"])
    splits, share = masked_splits(E * tiles * tile["BLOCK_F"], T, tile["BLOCK_F"], tile["BLOCK_T"])
    dr = new((tiles, T, E), dtype=torch.float32) if needs_r else None
    dplan = new((splits, F, columns.shape[1]), dtype=torch.float32) if needs_plan else None
    with device_guard(d):
        _slots_soft_kernel[E * tiles, splits](
            product,
            d,
            columns.contiguous(),
            dplan,
            dr,
            T,
            E,
            columns.shape[1],
            s,
            share,
            UNIT=_unit(s),
            ACTIVATION=activation,
            **product_options(d),
            **tile,
            **options,
        )
    dr = new(0, dtype=torch.float32) if dr is None else dr.sum(0)
    return dr, new(0, dtype=torch.float32) if dplan is None else dplan.sum(0)[:, :E]


def _by_expert(down: Tensor, E: int) -> Tensor:
    """[H, F] -> [E, s, H]"""
    return down.view(down.shape[0], E, -1).permute(1, 2, 0)


def forward(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y [T, H] and the product [T, 2F] of the stored order."""
    E, F = offsets.numel() - 1, gate_proj.shape[0]
    product = functional.linear(x, pack_rows(gate_proj, up_proj, order, starts).view(2 * F, -1))
    h = _slots_hidden(product, None, indices, token, source, offsets, activation)
    return token_sums(h, _by_expert(pack_columns(down_proj, order), E), weights, slot_of, offsets, None), product


def backward(
    dy: Tensor,
    x: Tensor | None,
    product: Tensor | None,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    r: Tensor,
    weights: Tensor | None,
    order: Tensor,
    starts: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
    needs_x: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, H], dR [T, E] and dP [F, E] in float32; empty where not needed. product None: computed again from x."""
    E, F = offsets.numel() - 1, gate_proj.shape[0]
    gate_up = pack_rows(gate_proj, up_proj, order, starts) if needs_x or product is None else None
    if product is None:
        assert x is not None
        assert gate_up is not None
        product = functional.linear(x, gate_up.view(2 * F, -1))
    d = dy @ pack_columns(down_proj, order)  # [T, F]
    dx, dr, dplan = dy.new_empty(0), *(dy.new_empty(0, dtype=torch.float32) for _ in range(2))
    if needs_r or needs_plan:
        dr, dplan = _soft_gradients(product, d, r, activation, needs_r, needs_plan)
    if needs_plan:
        dplan = dplan.new_empty(F, E).index_copy_(0, order.long(), dplan)
    if needs_x and gate_up is not None:
        dz = _slots_hidden(product, d, indices, token, source, offsets, activation)
        del d, product
        dx = token_sums(dz, gate_up, weights, slot_of, offsets, None)
    return dx, dr, dplan
