# mypy: disable-error-code="no-untyped-def"
"""Decode in Triton: few tokens, no sort. Every weight of a chosen expert is read once, no weight of another.

    hidden[e, t] = w_te act(Gate_e x_t) * (Up_e x_t),  w_te = sum_j weights_tj [indices_tj = e]
    y_t = sum over the chosen experts e, in their order, of Down_e hidden[e, t]

(1) A program takes BLOCK_S neurons of one expert, finds in the indices [T, K] who chose it, and returns at once if nobody did;
all T tokens are one tile. Few pairs: a program a pair, of which the first of its expert works; many: a program an expert. One
more program lists the chosen experts in ascending order. (2) A program takes BLOCK_H columns of y and an equal share of the
chosen experts' neurons, in steps of BLOCK_K, and leaves its sums in float32. (3) The shares are added up in their order: no sum
depends on a race, and none on the number of experts that are not chosen. For one token both products are sums of vectors: a tile
of matrix units would be 15/16 padding, and loads are all that counts.

Cost: 6 s H bytes an expert chosen in 16 bits; scratch of 4 SPLITS T H bytes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import MOST_PLANS, Launch, aligned, device_guard, product_options
from ..._tiles import MOST_DECODE_TOKENS, decode_tile
from ..activations.gpu import activate


@triton.jit
def _routing_of(
    expert,
    indices_ptr,  # [T, K]
    weights_ptr,  # [T, K] or None: 1
    T,
    K,
    stride_it,
    stride_ik,
    stride_wt,
    stride_wk,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """Each token's weight for ``expert`` [BLOCK_T], how often it chose it, and the first pair t K + j that names it (or T K)."""
    t = tl.arange(0, BLOCK_T)
    weight = tl.zeros([BLOCK_T], dtype=tl.float32)
    count = tl.zeros([BLOCK_T], dtype=tl.int32)
    first = tl.zeros([BLOCK_T], dtype=tl.int32) + T * K
    for start in range(0, K, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        inside = (t < T)[:, None] & (j < K)[None, :]
        at = t.to(tl.int64)[:, None] * stride_it + j.to(tl.int64)[None, :] * stride_ik
        chosen = inside & (tl.load(indices_ptr + at, mask=inside, other=-1) == expert)
        if weights_ptr is not None:
            at = t.to(tl.int64)[:, None] * stride_wt + j.to(tl.int64)[None, :] * stride_wk
            weight += tl.sum(tl.where(chosen, tl.load(weights_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0), 1)
        count += tl.sum(chosen.to(tl.int32), 1)
        first = tl.minimum(first, tl.min(tl.where(chosen, t[:, None] * K + j[None, :], T * K), 1))
    if weights_ptr is None:
        weight = count.to(tl.float32)
    return weight, count, tl.min(first, 0)


@triton.jit
def _list_chosen(indices_ptr, list_ptr, T, K, E, stride_it, stride_ik, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """list [E + 1]: how many experts were chosen, then which, ascending."""
    count = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, T * K, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        t = pair // K
        at = t.to(tl.int64) * stride_it + (pair - t * K).to(tl.int64) * stride_ik
        e = tl.load(indices_ptr + at, mask=pair < T * K, other=-1)
        used = (e >= 0) & (e < E)
        count += tl.histogram(tl.where(used, e, 0).to(tl.int32), BLOCK_E, mask=used)
    chosen = (count > 0).to(tl.int32)
    place = tl.cumsum(chosen, 0)
    tl.store(list_ptr + place, tl.arange(0, BLOCK_E), mask=chosen != 0)
    tl.store(list_ptr, tl.sum(chosen, 0))


@triton.jit(do_not_specialize=["T", "K"])
def _decode_up_kernel(
    x_ptr,  # [T, H]
    gate_up_ptr,  # [E, 2s, H]
    indices_ptr,  # [T, K]
    weights_ptr,  # [T, K] or None: 1
    hidden_ptr,  # [E, T, s] out, of the chosen experts
    list_ptr,  # [E + 1] out
    T,
    H,
    E,
    s,
    K,
    stride_xt,
    stride_xh,
    stride_ge,
    stride_gn,
    stride_gh,
    stride_it,
    stride_ik,
    stride_wt,
    stride_wk,
    ACTIVATION: tl.constexpr,
    BY_PAIR: tl.constexpr,  # a program a pair, otherwise an expert
    UPCAST: tl.constexpr,  # the interpreter has no product in 16 bits
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,  # of H at a time
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        _list_chosen(indices_ptr, list_ptr, T, K, E, stride_it, stride_ik, BLOCK_E, BLOCK_P)
        return
    tiles = tl.cdiv(s, BLOCK_S)
    place = (program - 1) // tiles
    tile = program - 1 - place * tiles
    if BY_PAIR:
        token = place // K
        pair_ptr = indices_ptr + token.to(tl.int64) * stride_it + (place - token * K).to(tl.int64) * stride_ik
        index = tl.load(pair_ptr)
        if (index < 0) | (index >= E):
            return
        expert = index.to(tl.int32)
    else:
        expert = place
    weight, count, first = _routing_of(
        expert, indices_ptr, weights_ptr, T, K, stride_it, stride_ik, stride_wt, stride_wk, BLOCK_T, BLOCK_J
    )
    if BY_PAIR:
        if first != place:
            return
    else:
        if first == T * K:
            return
    t = tl.arange(0, BLOCK_T)
    n = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.where(n < s, n, 0).to(tl.int64)  # rows beyond the last read the first one's, and are not stored
    k = tl.arange(0, BLOCK_K)
    gate_ptr = gate_up_ptr + expert.to(tl.int64) * stride_ge + row[:, None] * stride_gn  # [S, 1]
    up_ptr = gate_ptr + tl.full((), 1, tl.int64) * s * stride_gn
    if BLOCK_T == 1:
        gate_sum = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)
        up_sum = tl.zeros([BLOCK_S, BLOCK_K], dtype=tl.float32)
        for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            h = start + k
            at = h.to(tl.int64)
            inside = h < H
            x = tl.load(x_ptr + at * stride_xh, mask=inside, other=0.0).to(tl.float32)  # [K]
            gate = tl.load(gate_ptr + at[None, :] * stride_gh, mask=inside[None, :], other=0.0)  # [S, K]
            up = tl.load(up_ptr + at[None, :] * stride_gh, mask=inside[None, :], other=0.0)
            gate_sum += gate.to(tl.float32) * x[None, :]
            up_sum += up.to(tl.float32) * x[None, :]
        gate = tl.sum(gate_sum, 1)[None, :]  # [1, S]
        up = tl.sum(up_sum, 1)[None, :]
    else:
        x_row_ptr = x_ptr + t.to(tl.int64)[:, None] * stride_xt
        gate = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
        up = tl.zeros([BLOCK_T, BLOCK_S], dtype=tl.float32)
        for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
            h = start + k
            at = h.to(tl.int64)
            inside = h < H
            x = tl.load(x_row_ptr + at[None, :] * stride_xh, mask=(t < T)[:, None] & inside[None, :], other=0.0)  # [T, K]
            g = tl.load(gate_ptr + at[None, :] * stride_gh, mask=inside[None, :], other=0.0)  # [S, K]
            u = tl.load(up_ptr + at[None, :] * stride_gh, mask=inside[None, :], other=0.0)
            if UPCAST:
                x, g, u = x.to(tl.float32), g.to(tl.float32), u.to(tl.float32)
            gate = tl.dot(x, tl.trans(g), gate, input_precision=PRECISION)
            up = tl.dot(x, tl.trans(u), up, input_precision=PRECISION)
    # a token without this expert gets 0 whatever its sums are
    hidden = tl.where((count > 0)[:, None], activate(gate, ACTIVATION) * up * weight[:, None], 0.0)
    at = (expert.to(tl.int64) * T + t)[:, None] * s + n[None, :]
    tl.store(hidden_ptr + at, hidden.to(hidden_ptr.dtype.element_ty), mask=(t < T)[:, None] & (n < s)[None, :])


@triton.jit(do_not_specialize=["T"])
def _decode_down_kernel(
    hidden_ptr,  # [E, T, s]
    down_ptr,  # [E, H, s], any strides
    list_ptr,  # [E + 1]
    partial_ptr,  # [SPLITS, T, H] out, float32
    T,
    H,
    s,
    stride_de,
    stride_dh,
    stride_ds,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,  # neurons at a time
    STAGES: tl.constexpr,
):
    split = tl.program_id(1)
    steps = tl.cdiv(s, BLOCK_K)  # an expert's
    total = tl.load(list_ptr) * steps
    share = tl.cdiv(total, tl.num_programs(1))
    begin = split * share
    end = tl.minimum(begin + share, total)
    t = tl.arange(0, BLOCK_T)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    column = down_ptr + h.to(tl.int64)[None, :] * stride_dh
    if BLOCK_T == 1:
        sums = tl.zeros([BLOCK_K, BLOCK_H], dtype=tl.float32)
    else:
        acc = tl.zeros([BLOCK_T, BLOCK_H], dtype=tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        place = step // steps
        expert = tl.load(list_ptr + 1 + place).to(tl.int64)
        k = (step - place * steps) * BLOCK_K + tl.arange(0, BLOCK_K)
        down_at = column + expert * stride_de + k.to(tl.int64)[:, None] * stride_ds
        down = tl.load(down_at, mask=(k < s)[:, None] & (h < H)[None, :], other=0.0)  # [K, H]
        if BLOCK_T == 1:
            hidden = tl.load(hidden_ptr + expert * s + k, mask=k < s, other=0.0).to(tl.float32)  # [K]
            sums += hidden[:, None] * down.to(tl.float32)
        else:
            at = (expert * T + t)[:, None] * s + k[None, :]
            hidden = tl.load(hidden_ptr + at, mask=(t < T)[:, None] & (k < s)[None, :], other=0.0)  # [T, K]
            if UPCAST:
                hidden, down = hidden.to(tl.float32), down.to(tl.float32)
            acc = tl.dot(hidden, down, acc, input_precision=PRECISION)
    if BLOCK_T == 1:
        acc = tl.sum(sums, 0)[None, :]
    at = (split.to(tl.int64) * T + t)[:, None] * H + h[None, :]
    tl.store(partial_ptr + at, acc, mask=(t < T)[:, None] & (h < H)[None, :])


@triton.jit
def _decode_sum_kernel(partial_ptr, y_ptr, numel, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """y = the sum of partial [SPLITS, numel] in its order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * numel + at, mask=at < numel, other=0.0)
    tl.store(y_ptr + at, total.to(y_ptr.dtype.element_ty), mask=at < numel)


class _Plan(NamedTuple):
    up: Launch
    down: Launch
    add: Launch
    hidden: tuple[int, int, int]
    partial: tuple[int, int, int]


@lru_cache(maxsize=MOST_PLANS)
def _plan(
    tokens: tuple[int, ...],
    experts: tuple[int, ...],
    K: int,
    strides: tuple[int, ...],
    itemsize: int,
    activation: str,
    product: tuple[tuple[str, object], ...],
    keep: bool,
    *types: object,
) -> _Plan:
    """Of x [T, H], gate_up [E, 2s, H] and K; strides of x, gate_up, indices, weights and down; ``types``: whatever else a kernel
    is compiled for."""
    (T, H), (E, width, _) = tokens, experts
    s, precision = width // 2, dict(product)
    tile = decode_tile(T, H, E, s, K, itemsize)
    up = {"ACTIVATION": activation, "BY_PAIR": T * K < E, **precision, **tile.up}
    return _Plan(
        Launch(
            _decode_up_kernel,
            (1 + min(T * K, E) * triton.cdiv(s, tile.up["BLOCK_S"]),),
            (T, H, E, s, K, *strides[:-3]),
            up,
            tile.up_options,
            keep=keep,
        ),
        Launch(
            _decode_down_kernel,
            (triton.cdiv(H, tile.down["BLOCK_H"]), tile.splits),
            (T, H, s, *strides[-3:]),
            {**precision, **tile.down},
            tile.down_options,
            keep=keep,
        ),
        Launch(
            _decode_sum_kernel,
            (triton.cdiv(T * H, 256),),
            (T * H,),
            {"SPLITS": tile.splits, "BLOCK": 256},
            {"num_warps": 2},
            keep=keep,
        ),
        (E, T, s),
        (tile.splits, T, H),
    )


def _decode(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor | None, activation: str, y: Tensor) -> None:
    """Writes y [T, H] of at most MOST_DECODE_TOKENS tokens."""
    by_slot = (0, 0) if weights is None else weights.stride()
    plan = _plan(
        x.shape,
        gate_up.shape,
        indices.shape[1],
        (*x.stride(), *gate_up.stride(), *indices.stride(), *by_slot, *down.stride()),
        x.element_size(),
        activation,
        tuple(product_options(x).items()),
        aligned(x, gate_up, down, indices, weights, y),
        *(x.device, x.dtype, gate_up.dtype, down.dtype, indices.dtype, None if weights is None else weights.dtype),
    )
    hidden = torch.empty(*plan.hidden, dtype=x.dtype, device=x.device)
    chosen = torch.empty(plan.hidden[0] + 1, dtype=torch.int32, device=x.device)
    partial = torch.empty(*plan.partial, dtype=torch.float32, device=x.device)
    plan.up(x, gate_up, indices, weights, hidden, chosen)
    plan.down(hidden, down, chosen, partial)
    plan.add(partial, y)


def decode_ffn(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor | None, activation: str) -> Tensor:
    """x [T, H] -> y [T, H]; more than MOST_DECODE_TOKENS tokens in parts, each of which reads its experts anew."""
    T, H = x.shape
    y = torch.empty(T, H, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if indices.shape[1] == 0 or gate_up.shape[0] == 0 or gate_up.shape[1] == 0:
        return y.zero_()
    with device_guard(x):
        if T <= MOST_DECODE_TOKENS:
            _decode(x, gate_up, down, indices, weights, activation, y)
            return y
        for start in range(0, T, MOST_DECODE_TOKENS):
            part = slice(start, start + MOST_DECODE_TOKENS)
            _decode(x[part], gate_up, down, indices[part], None if weights is None else weights[part], activation, y[part])
    return y
