"""Decode in PyTorch: the chosen experts one after the other; for one token two products of a vector each."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._checks import compute_dtype
from ..activations import find_activation


def decode_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there."""
    act = find_activation(activation).forward
    E, T = gate_up_proj.shape[0], x.shape[0]
    y = x.new_zeros(T, x.shape[1], dtype=compute_dtype(x))
    chosen: dict[int, list[tuple[int, int]]] = {}
    for t, row in enumerate(indices.tolist()):
        for j, e in enumerate(row):
            if 0 <= e < E:
                chosen.setdefault(e, []).append((t, j))
    if not chosen:
        return y.to(x.dtype)
    if T == 1:
        experts = sorted(chosen)
        hidden = x.new_empty(len(experts), gate_up_proj.shape[1])
        for n, e in enumerate(experts):
            torch.mv(gate_up_proj[e], x[0], out=hidden[n])
        gate, up = hidden.chunk(2, -1)  # [n, s] each
        products = act(gate).mul_(up)
        rows = x.new_empty(len(experts), x.shape[1])
        for n, e in enumerate(experts):
            torch.mv(down_proj[e], products[n], out=rows[n])
        if weights is None:
            w = torch.tensor([len(chosen[e]) for e in experts], dtype=y.dtype, device=x.device)
        else:
            w = torch.stack([weights[0, [j for _, j in chosen[e]]].sum() for e in experts]).to(y.dtype)
        return (w @ rows.to(y.dtype))[None].to(x.dtype)
    for e in sorted(chosen):
        tokens, places = (torch.tensor(column, device=x.device) for column in zip(*chosen[e], strict=True))
        gate, up = (x[tokens] @ gate_up_proj[e].T).chunk(2, -1)
        out = act(gate).mul_(up) @ down_proj[e].T  # [n, H]
        rows = out.to(y.dtype)
        y.index_add_(0, tokens, rows if weights is None else rows * weights[tokens, places][:, None].to(y.dtype))
    return y.to(x.dtype)
