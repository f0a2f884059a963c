"""Decode in PyTorch: gate and up of the chosen experts, then one weighted sum of rows of the down projection.

    h_n = act(gate_n) up_n w,  n the neurons of the chosen experts;  y_t = sum_n h_tn Down_n,  Down [F, H] a neuron a row

The rows of Down are read where they lie and added up in float32, for all tokens in one call of ``embedding_bag``: a product an
expert would cost a call each, and in 16 bits more for the call than for its bytes. In 32 bits wide experts take
products all the same, and so does a ``down_proj`` that is not stored by neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...._checks import compute_dtype
from ...._tiles import decodes_each, gathers_experts, sums_rows
from ....dispatch import sort_slots
from ...activations import find_activation
from ...grouped.cpu.products import segments


def _hidden_of_one(x: Tensor, gate_up_proj: Tensor, experts: list[int]) -> Tensor:
    """x [H] -> gate and up [n, 2s] of these experts."""
    n, (_, width, H) = len(experts), gate_up_proj.shape
    if gathers_experts(n * width * H, x.dtype, x.device.type):
        return torch.mv(gate_up_proj.index_select(0, torch.tensor(experts, device=x.device)).view(n * width, H), x).view(n, width)
    hidden = x.new_empty(n, width)
    for row, e in zip(hidden.unbind(), experts, strict=True):
        torch.mv(gate_up_proj[e], x, out=row)
    return hidden


def _sum_rows(h: Tensor, down_proj: Tensor, experts: Tensor, starts: Tensor) -> Tensor:
    """h [n, s] of these experts [n], the slots of a token one after the other from ``starts`` [T] on -> y [T, H]."""
    E, H, s = down_proj.shape
    rows = (experts[:, None] * s + torch.arange(s, device=h.device)).view(-1)
    return _add_rows(h, down_proj, rows, starts * s)


def _add_rows(h: Tensor, down_proj: Tensor, rows: Tensor, starts: Tensor) -> Tensor:
    """h [n, s], the weights of these rows [n s] of Down; the rows of a token from ``starts`` [T] on -> y [T, H]."""
    E, H, s = down_proj.shape
    weight = down_proj.transpose(1, 2).reshape(E * s, H)  # no copy: stored so
    return torch.embedding_bag(weight, rows, starts, False, 0, False, h.reshape(-1))[0]  # the sum of a bag


def _one_token(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """x [H], indices and weights [K] -> y [1, H]; Down a neuron a row."""
    E, H, s = down_proj.shape
    experts = indices.tolist()
    wanted = [] if weights is None else weights.tolist()
    if not experts or max(experts) >= E or min(experts) < 0:  # empty slots
        places = [j for j, e in enumerate(experts) if 0 <= e < E]
        experts = [experts[j] for j in places]
        wanted = [wanted[j] for j in places] if wanted else []
    if not experts:
        return x.new_zeros(1, H)
    gate, up = _hidden_of_one(x, gate_up_proj, experts).chunk(2, -1)  # [n, s] each
    h = act(gate).mul_(up)
    if any(w != 1 for w in wanted):
        h = (h * torch.tensor(wanted, dtype=compute_dtype(x), device=x.device)[:, None]).to(x.dtype)
    if not sums_rows(len(experts), H * s, x.dtype):
        y = x.new_zeros(H)
        for e, h_e in zip(experts, h.unbind(), strict=True):
            y.addmv_(down_proj[e], h_e)
        return y[None]
    rows = torch.from_numpy((np.array(experts)[:, None] * s + np.arange(s)).reshape(-1)).to(x.device)
    return _add_rows(h, down_proj, rows, torch.zeros(1, dtype=torch.int64, device=x.device))


def decode_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there."""
    act, wide = find_activation(activation).forward, compute_dtype(x)
    (E, H, s), T = down_proj.shape, len(x)
    by_neuron = down_proj.transpose(1, 2).is_contiguous()
    if by_neuron and T == 1:
        return _one_token(x[0], gate_up_proj, down_proj, indices[0], None if weights is None else weights[0], act)
    if by_neuron and T and decodes_each(T, E, s, indices.shape[1], H, x.dtype):
        each = [None] * T if weights is None else weights.unbind()
        tokens = zip(x.unbind(), indices.unbind(), each, strict=True)
        return torch.cat([_one_token(row, gate_up_proj, down_proj, chosen, w, act) for row, chosen, w in tokens])
    slots = sort_slots(indices, E)
    runs = segments(slots.offsets)
    used = runs[-1][2] if runs else 0
    token, source = slots.token[:used], slots.source[:used]
    xs, hidden = x.index_select(0, token), x.new_empty(used, gate_up_proj.shape[1])
    for e, start, end in runs:
        torch.mm(xs[start:end], gate_up_proj[e].T, out=hidden[start:end])
    gate, up = hidden.chunk(2, -1)  # [S, s] each
    h = act(gate).mul_(up)
    if weights is not None:
        h = (h * weights.reshape(-1)[source][:, None]).to(x.dtype)
    if by_neuron and used:
        order = torch.argsort(source)  # back to the tokens' order
        starts = torch.bincount(token, minlength=T).cumsum(0)
        experts = indices.reshape(-1)[source[order]].long()
        return _sum_rows(h[order], down_proj, experts, starts - starts.diff(prepend=starts.new_zeros(1)))
    y = x.new_zeros(x.shape, dtype=wide)
    for e, start, end in runs:
        y.index_add_(0, token[start:end], (h[start:end] @ down_proj[e].T).to(wide))
    return y.to(x.dtype)
