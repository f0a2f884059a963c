"""Decode experts: a few tokens, no sort; every chosen expert's weights are read once and no others. For T up to about 16.

    y_t = sum over the chosen experts e of w_te Down_e (act(Gate_e x_t) * (Up_e x_t))

Bound by the bytes of the chosen experts' weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import compute_dtype
from .activations import find_activation


def decode_ffn(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor, activation: str) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there."""
    act = find_activation(activation).forward
    E, T = gate_up_proj.shape[0], x.shape[0]
    y = x.new_zeros(T, x.shape[1], dtype=compute_dtype(x))
    chosen: dict[int, list[tuple[int, int]]] = {}
    for t, row in enumerate(indices.tolist()):
        for j, e in enumerate(row):
            if e < E:
                chosen.setdefault(e, []).append((t, j))
    for e in sorted(chosen):
        pairs = chosen[e]
        if T == 1:
            rows, w = x, weights[:, [j for _, j in pairs]].sum(1)
        else:
            tokens = torch.tensor([t for t, _ in pairs], device=x.device)
            rows, w = x[tokens], weights[tokens, [j for _, j in pairs]]
        gate, up = (rows @ gate_up_proj[e].T).chunk(2, -1)  # [n, s] each
        out = (act(gate) * up) @ down_proj[e].T * w[:, None].to(x.dtype)  # [n, H]
        y = y + out if T == 1 else y.index_add(0, tokens, out.to(y.dtype))
    return y.to(x.dtype)
