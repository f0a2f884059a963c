"""The soft router of a layer, and how many experts each layer may use, learned: the layers share one budget.

k_l = 1 + (L kbar - L) softmax(eta)_l, clamped to [1, E - 1]
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import is_integer, is_number, require


class SoftRouter(NamedTuple):
    """Of one layer: k experts are expected a token, at most ``max_active`` of those with p > threshold are on."""

    k: float | Tensor
    temperature: float
    threshold: float
    max_active: int


def slots(k: float, cap: float, num_experts: int) -> int:
    """max_active = ceil(k cap), at most E."""
    return min(num_experts, math.ceil(k * cap - 1e-6))  # 1e-6: a k of 2.0000001 needs no slot more


class LayerBudgets(torch.nn.Module):
    """Expected experts a token of every layer, k [L], for ``route_soft_top_k``: they sum to L kbar while none is clamped.

    k_l = 1 + (L kbar - L) softmax(eta)_l, clamped to [1, E - 1]. At the start, eta = 0, every layer has kbar.

    Args:
        num_layers: L >= 1.
        mean_active: kbar in [1, E - 1], experts a token in the mean over the layers; need not be whole.
        num_experts: E >= 2.

    Raises:
        ValueError: a number outside its range.

    Gradient: to ``eta`` [L]; none through a clamped layer.

    Source: SoftMoE (arXiv 2606.17952).
    """

    def __init__(self, num_layers: int, mean_active: float, num_experts: int) -> None:
        super().__init__()
        for name, value, least in (("num_layers", num_layers, 1), ("num_experts", num_experts, 2)):
            whole = is_integer(value)
            require(whole and value >= least, name, repr(value), f"an integer of at least {least}")
        fits = is_number(mean_active) and 1 <= mean_active <= num_experts - 1
        require(fits, "mean_active", repr(mean_active), f"a number from 1 to E - 1 = {num_experts - 1}")
        self.num_layers, self.mean_active, self.num_experts = num_layers, float(mean_active), num_experts
        self.eta = torch.nn.Parameter(torch.zeros(num_layers))

    def forward(self) -> Tensor:
        """k [L] float32."""
        share = torch.softmax(self.eta.float(), 0)
        return (1 + self.num_layers * (self.mean_active - 1) * share).clamp(1, self.num_experts - 1)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}, mean_active={self.mean_active:g}, num_experts={self.num_experts}"
