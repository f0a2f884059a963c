"""The grouped path in PyTorch, without a gradient: three ways, by dtype and by the rows of an expert.

products   one product an expert, and its gradients
runs       16 bits: which experts share a batched product, every expert's rows padded to a common number
padded     16 bits: the routed FFN in such runs

With matrix units an expert's product takes so little that its call counts: the runs are the cheapest there are, unless the masked
path's dense product costs less still.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ...._checks import compute_dtype
from ...._tiles import expert_by_expert, has_matrix_units, in_batches, product_rows
from ....dispatch import Slots, fits_bags, gather_tokens, sort_slots, sum_bags
from ....permutation import has_dense_view
from ...activations import find_activation
from ...masked.cpu.dense import view_ffn
from .padded import padded_ffn
from .products import multiply, segments
from .runs import Run, best_runs, even_runs


def _expert_by_expert(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, slots: Slots, weights: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """Each expert from its tokens' rows to their sums while they are in the cache; the [S, H] rows never exist as a whole."""
    y = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device)
    w = weights.reshape(-1)[slots.source][:, None].to(y.dtype)  # [S, 1]
    token = functional.pad(slots.token, (0, len(slots.token)))  # behind an expert's rows others fill up, which nobody reads
    for e, start, end in segments(slots.offsets):
        filled = token[start : start + product_rows(end - start, x)]
        gate, up = (x.index_select(0, filled) @ gate_up_proj[e].T).chunk(2, -1)  # [n or more, s] each
        rows = (act(gate).mul_(up) @ down_proj[e].T)[: end - start]
        y.index_add_(0, token[start:end], rows.to(y.dtype) * w[start:end])
    return y.to(x.dtype)


def grouped_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there."""
    E = gate_up_proj.shape[0]
    slots, act = sort_slots(indices, E), find_activation(activation).forward
    if weights is None:
        weights = torch.ones(indices.shape, dtype=torch.float32, device=x.device)
    if in_batches(x) and E * indices.numel() * x.shape[1] > 0:
        if has_matrix_units(x.dtype):
            view = has_dense_view(down_proj) and gate_up_proj.is_contiguous()
            runs = best_runs(slots.offsets, down_proj, len(x) if view else 0)
            if runs[0] == Run(0, E, len(x), span=True):
                return view_ffn(x, gate_up_proj, down_proj, indices, weights, activation)
        else:
            runs = even_runs(slots.offsets, down_proj)
        if runs:
            return padded_ffn(x, gate_up_proj, down_proj, slots, indices, weights, act, runs)
    if x.device.type == "cpu" and expert_by_expert(x.dtype, indices.numel(), E):
        return _expert_by_expert(x, gate_up_proj, down_proj, slots, weights, act)
    xs = x.index_select(0, slots.token)
    gate, up = multiply(xs, gate_up_proj.transpose(1, 2), slots.offsets).chunk(2, -1)  # [S, s] each
    ys = multiply(act(gate).mul_(up), down_proj.transpose(1, 2), slots.offsets)
    if indices.numel() > 0 and fits_bags(ys, weights):
        return sum_bags(ys, weights, slots.source, int(slots.offsets[-1]), len(x))
    return gather_tokens(ys, slots, weights)
