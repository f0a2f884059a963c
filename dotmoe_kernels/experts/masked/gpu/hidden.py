# mypy: disable-error-code="no-untyped-def"
"""The masked hidden layer in Triton, for batches whose experts' union is everything, and for alignment.

    R_te = sum_j weights_tj [indices_tj = e];  hidden_ti = act(gate_ti) * up_ti * R_t,expert(i)

One pass over gate and up, after the dense up product: in the neurons' first order with expert_of [F] (alignment), or in the stored
order, where the rows of gate_up_proj.view(2F, H) alternate gate and up by expert and expert(i) = i // s (the routed FFN): there
what the mask drops is not read. Float32 in between. Cost: one read of gate and up, one write; R stays in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...._backend import device_guard, product_options
from ...._tiles import mask_tile, masked_tile, masked_up_tile
from ...activations.gpu import activate


@triton.jit(do_not_specialize=["T", "K"])
def _expert_mask_kernel(
    indices_ptr,  # [T, K]
    weights_ptr,  # [T, K] or None: 1
    r_ptr,  # [T, E] out
    T,
    K,
    E,
    stride_it,
    stride_ik,
    stride_wt,
    stride_wk,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A token's weights are added in the order of j; an index outside [0, E) is an empty slot."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    r = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    indices_ptr += t * stride_it
    if weights_ptr is not None:
        weights_ptr += t * stride_wt
    for _ in range(0, K):
        chosen = tl.load(indices_ptr, mask=t < T, other=-1)[:, None] == e[None, :]
        indices_ptr += stride_ik
        if weights_ptr is not None:
            w = tl.load(weights_ptr, mask=t < T, other=0.0).to(tl.float32)
            weights_ptr += stride_wk
            r += tl.where(chosen, w[:, None], 0.0)
        else:
            r += chosen.to(tl.float32)
    tl.store(r_ptr + t[:, None] * E + e[None, :], r.to(r_ptr.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _masked_hidden_kernel(
    gate_ptr,  # [T, F], or the product [T, 2F] of the stored order
    up_ptr,  # [T, F], or the same
    r_ptr,  # [T, E]
    expert_of_ptr,  # [F], or None: the stored order
    hidden_ptr,  # [T, F] out
    T,
    F,
    E,
    s,
    stride_gt,
    stride_gf,
    stride_ut,
    stride_uf,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    if expert_of_ptr is None:
        tiles = tl.cdiv(s, BLOCK_F)  # of one expert, so that a row of the tile is read whole or not at all
        e = tl.program_id(1) // tiles
        n = (tl.program_id(1) - e * tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
        f = e * s + n
        inside = (t < T)[:, None] & (n < s)[None, :]
        at_gate = (e * s + f).to(tl.int64)
        at_up = at_gate + s
        r = tl.load(r_ptr + t * E + e, mask=t < T, other=0.0).to(tl.float32)[:, None]
        read = (t < T)[:, None] & (r != 0) & (n < s)[None, :]
    else:
        f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = (t < T)[:, None] & (f < F)[None, :]
        e = tl.load(expert_of_ptr + f, mask=f < F, other=0).to(tl.int32)
        at_gate = f.to(tl.int64)
        at_up = at_gate
        known = ((e >= 0) & (e < E))[None, :]  # a neuron of no expert is dropped
        r = tl.load(r_ptr + t[:, None] * E + e[None, :], mask=inside & known, other=0.0).to(tl.float32)
        read = inside
    gate = tl.load(gate_ptr + t[:, None] * stride_gt + at_gate[None, :] * stride_gf, mask=read, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + t[:, None] * stride_ut + at_up[None, :] * stride_uf, mask=read, other=0.0).to(tl.float32)
    hidden = tl.where(r != 0, activate(gate, ACTIVATION) * up * r, 0.0)  # whatever a neuron of another expert gives
    tl.store(hidden_ptr + t[:, None] * F + f[None, :], hidden.to(hidden_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _masked_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2s, H]
    r_ptr,  # [T, E]
    hidden_ptr,  # [T, F] out
    T,
    H,
    E,
    s,
    stride_xt,
    stride_xh,
    stride_ge,
    stride_gn,
    stride_gh,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The up product with the mask in its epilogue: the products of tokens that all avoid the expert are left out."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # neighbours share the weights
    t = rows.to(tl.int64)
    tiles = tl.cdiv(s, BLOCK_S)
    e = tl.program_id(1) // tiles
    n = (tl.program_id(1) - e * tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    r = tl.load(r_ptr + t * E + e, mask=rows < T, other=0.0).to(tl.float32)
    end = tl.where(tl.max((r != 0).to(tl.int32), 0) > 0, H, 0)
    k = tl.arange(0, BLOCK_K)
    x_row = x_ptr + tl.where(rows < T, t, 0)[:, None] * stride_xt
    gate_row = gate_up_ptr + e.to(tl.int64) * stride_ge + tl.where(n < s, n, 0).to(tl.int64)[None, :] * stride_gn
    up_row = gate_row + tl.full((), 1, tl.int64) * s * stride_gn
    gate = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    up = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
    for start in range(0, end, BLOCK_K):
        at = (start + k).to(tl.int64)
        inside = start + k < H
        x = tl.load(x_row + at[None, :] * stride_xh, mask=inside[None, :], other=0.0)  # [T, K]
        g = tl.load(gate_row + at[:, None] * stride_gh, mask=inside[:, None], other=0.0)  # [K, S]
        u = tl.load(up_row + at[:, None] * stride_gh, mask=inside[:, None], other=0.0)
        if UPCAST:
            x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
        gate = tl.dot(x, g, gate, input_precision=PRECISION)
        up = tl.dot(x, u, up, input_precision=PRECISION)
    hidden = tl.where((r != 0)[:, None], activate(gate, ACTIVATION) * up * r[:, None], 0.0)
    out = hidden_ptr + t[:, None] * (tl.full((), 1, tl.int64) * E * s) + (e * s + n)[None, :]
    tl.store(out, hidden.to(hidden_ptr.dtype.element_ty), mask=(rows < T)[:, None] & (n < s)[None, :])


def expert_mask(indices: Tensor, weights: Tensor | None, E: int, dtype: torch.dtype) -> Tensor:
    """R [T, E]"""
    T, K = indices.shape
    r = torch.empty((T, E), dtype=dtype, device=indices.device)
    if r.numel() == 0:
        return r
    tile, options = mask_tile(E)
    with device_guard(indices):
        _expert_mask_kernel[(triton.cdiv(T, tile["BLOCK_T"]), triton.cdiv(E, tile["BLOCK_E"]))](
            indices,
            weights,
            r,
            T,
            K,
            E,
            *indices.stride(),
            *((0, 0) if weights is None else weights.stride()),
            **tile,
            **options,
        )
    return r


def masked_hidden(gate: Tensor, up: Tensor, r: Tensor, expert_of: Tensor | None, activation: str) -> Tensor:
    """gate, up [T, F] and expert_of [F]; or, without it, twice the product [T, 2F] of the stored order -> hidden [T, F]."""
    T, E = r.shape
    F = gate.shape[1] // (2 if expert_of is None else 1)
    hidden = torch.empty((T, F), dtype=gate.dtype, device=gate.device)
    if hidden.numel() == 0:
        return hidden
    s = max(F // E, 1)
    tile, options = masked_tile("hidden", F if expert_of is not None else s)
    columns = triton.cdiv(F, tile["BLOCK_F"]) if expert_of is not None else E * triton.cdiv(s, tile["BLOCK_F"])
    with device_guard(gate):
        _masked_hidden_kernel[(triton.cdiv(T, tile["BLOCK_T"]), columns)](
            gate,
            up,
            r.contiguous(),
            None if expert_of is None else expert_of.contiguous(),
            hidden,
            T,
            F,
            E,
            s,
            *gate.stride(),
            *up.stride(),
            ACTIVATION=activation,
            **tile,
            **options,
        )
    return hidden


def masked_up(x: Tensor, gate_up: Tensor, r: Tensor, activation: str) -> Tensor:
    """x [T, H], gate_up [E, 2s, H], R [T, E] -> hidden [T, F], without the product [T, 2F] in memory."""
    (T, H), (E, width) = x.shape, gate_up.shape[:2]
    s = width // 2
    hidden = torch.empty((T, E * s), dtype=x.dtype, device=x.device)
    if hidden.numel() == 0:
        return hidden
    tile, options = masked_up_tile(T, s)
    with device_guard(x):
        _masked_up_kernel[(triton.cdiv(T, tile["BLOCK_T"]), E * triton.cdiv(s, tile["BLOCK_S"]))](
            x,
            gate_up,
            r.contiguous(),
            hidden,
            T,
            H,
            E,
            s,
            *x.stride(),
            *gate_up.stride(),
            ACTIVATION=activation,
            **product_options(x),
            **tile,
            **options,
        )
    return hidden
