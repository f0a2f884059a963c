# mypy: disable-error-code="no-untyped-def"
"""Backward of the masked hidden layer in Triton: hidden = U * R[:, expert_of], U = act(gate) * up; d = dhidden = dY Wd.

    dgate = d R up act'(gate);  dup = d R act(gate);  dR_te = sum_{i in e} d_ti U_ti;  dP = (d * U)^T R [F, E]

One pass over (d, gate, up) writes dgate and dup and adds up dR: a program keeps the tokens of its tile, walks over its share of
the neurons, in their first order, and multiplies each tile of d * U with the one-hot rows of expert_of; the shares are added in
their order. dP is summed over the tokens instead, which no order of the same walk gives: a second pass forms d * U again, from
six bytes an element in 16 bits, and keeps no [T, F] product. Sums in float32; nothing depends on a race.
Cost: five passes over [T, F], and three more for dP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from ...._backend import device_guard, product_options
from ...._tiles import masked_splits, masked_tile
from ...activations.gpu import activate, activate_derivative


@triton.jit(do_not_specialize=["T"])
def _masked_hidden_bwd_kernel(
    d_ptr,  # [T, F]
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    r_ptr,  # [T, E]
    expert_of_ptr,  # [F]
    dgate_ptr,  # [T, F] out
    dup_ptr,  # [T, F] out
    dr_ptr,  # [SPLITS, T, E] out, float32
    T,
    F,
    E,
    share,  # neurons of a program
    stride_dt,
    stride_df,
    stride_gt,
    stride_gf,
    stride_ut,
    stride_uf,
    ACTIVATION: tl.constexpr,
    NEEDS_GATE: tl.constexpr,  # dgate and dup
    NEEDS_R: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, F)
    e = tl.arange(0, BLOCK_E)
    if NEEDS_R:
        dr = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for start in range(begin, end, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        at = f.to(tl.int64)[None, :]
        inside = (t < T)[:, None] & (f < end)[None, :]
        expert = tl.load(expert_of_ptr + f, mask=f < end, other=-1).to(tl.int32)
        d = tl.load(d_ptr + t[:, None] * stride_dt + at * stride_df, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + t[:, None] * stride_gt + at * stride_gf, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + t[:, None] * stride_ut + at * stride_uf, mask=inside, other=0.0).to(tl.float32)
        kind = d.dtype
        d = d.to(tl.float32)
        a = activate(gate, ACTIVATION)
        if NEEDS_R:
            product = (d * a * up).to(kind)
            one_hot = (expert[:, None] == e[None, :]).to(kind)  # [F, E]
            if UPCAST:
                product, one_hot = product.to(tl.float32), one_hot.to(tl.float32)
            dr = tl.dot(product, one_hot, dr, input_precision=PRECISION)
        if NEEDS_GATE:
            known = ((expert >= 0) & (expert < E))[None, :]  # a neuron of no expert is dropped
            r = tl.load(r_ptr + t[:, None] * E + expert[None, :], mask=inside & known, other=0.0).to(tl.float32)
            d *= r
            out = t[:, None] * F + at
            dup = tl.where(r != 0, d * a, 0.0)  # whatever a neuron of another expert gives
            tl.store(dup_ptr + out, dup.to(dup_ptr.dtype.element_ty), mask=inside)
            dgate = tl.where(r != 0, d * up * activate_derivative(gate, ACTIVATION), 0.0)
            tl.store(dgate_ptr + out, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if NEEDS_R:
        out = (split.to(tl.int64) * T + t)[:, None] * E + e[None, :]
        tl.store(dr_ptr + out, dr, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["T"])
def _plan_gradient_kernel(
    d_ptr,  # [T, F]
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    r_ptr,  # [T, C]
    dplan_ptr,  # [SPLITS, F, C] out, float32
    T,
    F,
    C,  # E, and columns of zeros, so that the rows of R are aligned
    share,  # tokens of a program
    stride_dt,
    stride_df,
    stride_gt,
    stride_gf,
    stride_ut,
    stride_uf,
    ACTIVATION: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    begin = split * share
    end = tl.minimum(begin + share, T)
    c = tl.arange(0, BLOCK_E)
    at = f.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_F, BLOCK_E], dtype=tl.float32)
    for start in range(begin, end, BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T)
        t = rows.to(tl.int64)[:, None]
        inside = (rows < end)[:, None] & (f < F)[None, :]
        d = tl.load(d_ptr + t * stride_dt + at * stride_df, mask=inside, other=0.0)
        gate = tl.load(gate_ptr + t * stride_gt + at * stride_gf, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + t * stride_ut + at * stride_uf, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(r_ptr + t * C + c[None, :], mask=(rows < end)[:, None] & (c < C)[None, :], other=0.0)
        product = (d.to(tl.float32) * activate(gate, ACTIVATION) * up).to(d.dtype)
        r = r.to(d.dtype)
        if UPCAST:
            product, r = product.to(tl.float32), r.to(tl.float32)
        acc = tl.dot(tl.trans(product), r, acc, input_precision=PRECISION)
    out = (split.to(tl.int64) * F + f)[:, None] * C + c[None, :]
    tl.store(dplan_ptr + out, acc, mask=(f < F)[:, None] & (c < C)[None, :])


def aligned_columns(r: Tensor) -> Tensor:
    """With columns of zeros up to a multiple of 16, whose rows a kernel loads in wide pieces."""
    return functional.pad(r, (0, -r.shape[1] % 16))


def masked_hidden_backward(
    d: Tensor,
    gate: Tensor,
    up: Tensor,
    r: Tensor,
    expert_of: Tensor,
    activation: str,
    needs_gate: bool,
    needs_r: bool,
    needs_plan: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dgate, dup [T, F], dR [T, E] and dP [F, E] in float32; empty where not needed."""
    (T, F), E = gate.shape, r.shape[1]
    new = gate.new_empty
    dgate, dup = (new((T, F) if needs_gate else 0) for _ in range(2))
    dr, dplan = new(0, dtype=torch.float32), new(0, dtype=torch.float32)
    if T == 0 or F == 0 or E == 0:
        dr = new((T, E), dtype=torch.float32).zero_() if needs_r else dr
        return dgate, dup, dr, new((F, E), dtype=torch.float32).zero_() if needs_plan else dplan
    r, expert_of, strides = r.contiguous(), expert_of.contiguous(), (*d.stride(), *gate.stride(), *up.stride())
    product = product_options(gate)
    narrow = gate.element_size() > 2
    with device_guard(gate):
        if needs_gate or needs_r:
            tile, options = masked_tile("backward", F, E, narrow)
            splits, share = masked_splits(T, F, tile["BLOCK_T"], tile["BLOCK_F"])
            partial = new((splits, T, E), dtype=torch.float32) if needs_r else None
            _masked_hidden_bwd_kernel[(triton.cdiv(T, tile["BLOCK_T"]), splits)](
                d,
                gate,
                up,
                r,
                expert_of,
                dgate,
                dup,
                partial,
                T,
                F,
                E,
                share,
                *strides,
                ACTIVATION=activation,
                NEEDS_GATE=needs_gate,
                NEEDS_R=needs_r,
                **product,
                **tile,
                **options,
            )
            dr = partial.sum(0) if partial is not None else dr
        if needs_plan:
            tile, options = masked_tile("plan", F, E, narrow)
            splits, share = masked_splits(F, T, tile["BLOCK_F"], tile["BLOCK_T"])
            r = aligned_columns(r)
            partial = new((splits, F, r.shape[1]), dtype=torch.float32)
            _plan_gradient_kernel[(triton.cdiv(F, tile["BLOCK_F"]), splits)](
                d, gate, up, r, partial, T, F, r.shape[1], share, *strides, ACTIVATION=activation, **product, **tile, **options
            )
            dplan = partial.sum(0)[:, :E].contiguous()
    return dgate, dup, dr, dplan
