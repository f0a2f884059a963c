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

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ..._backend import device_guard
from ..._tiles import pack_tile, slots_tile
from .alignment import masked_hidden_backward
from .forward import token_sums
from .pointwise import activate, activate_derivative


@triton.jit
def _pack_rows_kernel(
    gate_ptr,  # [F, H]
    up_ptr,  # [F, H]
    order_ptr,  # [F]
    expert_of_ptr,  # [F]
    packed_ptr,  # [E, 2s, H] out
    H,
    s,
    stride_gf,
    stride_gh,
    stride_uf,
    stride_uh,
    BLOCK_H: tl.constexpr,
):
    """A row of gate and of up; NaN where an expert has more or fewer than s neurons, so that no wrong result passes for one."""
    position = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < H
    neuron = tl.load(order_ptr + position).to(tl.int64)
    e = position // s
    wrong = tl.load(expert_of_ptr + neuron) != e
    at = h.to(tl.int64)
    gate = tl.load(gate_ptr + neuron * stride_gf + at * stride_gh, mask=inside, other=0.0)
    up = tl.load(up_ptr + neuron * stride_uf + at * stride_uh, mask=inside, other=0.0)
    gate = tl.where(wrong, float("nan"), gate.to(tl.float32)).to(gate.dtype)
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
    BLOCK_F: tl.constexpr,
):
    """A program copies a row: its neurons lie anywhere in it, but together they are the row, which the cache keeps."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        neuron = tl.load(order_ptr + f, mask=f < F, other=0).to(tl.int64)
        x = tl.load(down_ptr + row * stride_dh + neuron * stride_df, mask=f < F, other=0.0)
        tl.store(packed_ptr + row * F + f, x, mask=f < F)


@triton.jit(do_not_specialize=["S", "E"])
def _slots_hidden_kernel(
    product_ptr,  # [T, E, 2s]
    d_ptr,  # [T, F] dhidden, or None
    indices_ptr,  # [T K]
    token_ptr,  # [S]
    source_ptr,  # [S]
    offsets_ptr,  # [E + 1]
    out_ptr,  # h [S, s] out; with d, dz [S, 2s]
    S,
    E,
    F,
    s,
    stride_dt,
    stride_df,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of empty slots, from offsets[E] on, are left as they are."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = p < tl.minimum(tl.load(offsets_ptr + E), S)
    inside = live[:, None] & (n < s)[None, :]
    slot = p.to(tl.int64)
    token = tl.load(token_ptr + slot, mask=live, other=0).to(tl.int64)
    source = tl.load(source_ptr + slot, mask=live, other=0).to(tl.int64)
    first = tl.load(indices_ptr + source, mask=live, other=0).to(tl.int64) * s  # the expert's first neuron
    gate_at = product_ptr + (token * 2 * F + 2 * first)[:, None] + n[None, :]
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + s, mask=inside, other=0.0).to(tl.float32)
    activated = activate(gate, ACTIVATION)
    if d_ptr is None:
        tl.store(out_ptr + slot[:, None] * s + n[None, :], (activated * up).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        d_at = d_ptr + (token * stride_dt + first * stride_df)[:, None] + n.to(tl.int64)[None, :] * stride_df
        d = tl.load(d_at, mask=inside, other=0.0).to(tl.float32)
        out = out_ptr + slot[:, None] * (2 * s) + n[None, :]
        tl.store(out, (d * up * activate_derivative(gate, ACTIVATION)).to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(out + s, (d * activated).to(out_ptr.dtype.element_ty), mask=inside)


def pack_rows(gate_proj: Tensor, up_proj: Tensor, order: Tensor, expert_of: Tensor, E: int) -> Tensor:
    """gate_up_proj [E, 2s, H] in the stored order."""
    F, H = gate_proj.shape
    packed = gate_proj.new_empty(E, 2 * (F // E), H)
    tile, options = pack_tile("rows", H)
    with device_guard(gate_proj):
        _pack_rows_kernel[F, triton.cdiv(H, tile["BLOCK_H"])](
            gate_proj,
            up_proj,
            order,
            expert_of.contiguous(),
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
    tile, options = pack_tile("columns", F)
    with device_guard(down_proj):
        _pack_columns_kernel[(H,)](down_proj, order, packed, F, *down_proj.stride(), **tile, **options)
    return packed


def _slots_hidden(
    product: Tensor, d: Tensor | None, indices: Tensor, token: Tensor, source: Tensor, offsets: Tensor, activation: str
) -> Tensor:
    """h [S, s], or with d [T, F] dz [S, 2s]."""
    S, E, F = token.numel(), offsets.numel() - 1, product.shape[1] // 2
    s = F // E
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
            F,
            s,
            *((0, 1) if d is None else d.stride()),
            ACTIVATION=activation,
            **tile,
            **options,
        )
    return out


def _by_expert(down: Tensor, E: int) -> Tensor:
    """[H, F] -> [E, s, H]"""
    return down.view(down.shape[0], E, -1).permute(1, 2, 0)


def forward(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    weights: Tensor | None,
    expert_of: Tensor,
    order: Tensor,
    indices: Tensor,
    token: Tensor,
    source: Tensor,
    offsets: Tensor,
    slot_of: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y [T, H] and the product [T, 2F] of the stored order."""
    E, F = offsets.numel() - 1, gate_proj.shape[0]
    product = functional.linear(x, pack_rows(gate_proj, up_proj, order, expert_of, E).view(2 * F, -1))
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
    expert_of: Tensor,
    order: Tensor,
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
    gate_up = pack_rows(gate_proj, up_proj, order, expert_of, E) if needs_x or product is None else None
    if product is None:
        assert x is not None
        assert gate_up is not None
        product = functional.linear(x, gate_up.view(2 * F, -1))
    d = dy @ pack_columns(down_proj, order)  # [T, F]
    _, _, dr, dplan = masked_hidden_backward(d, product, product, r, None, activation, False, needs_r, needs_plan)
    if needs_plan:
        dplan = torch.empty_like(dplan).index_copy_(0, order, dplan)
    dx = dy.new_empty(0)
    if needs_x and gate_up is not None:
        dz = _slots_hidden(product, d, indices, token, source, offsets, activation)
        del d, product
        dx = token_sums(dz, gate_up, weights, slot_of, offsets, None)
    return dx, dr, dplan
