"""The soft router while it is being aligned: one budget of active experts that the layers share, and a temperature that falls.

    k_l = 1 + (L kbar - L) softmax(eta)_l, clamped to [1, E - 1]

As the plan does, k_l enters its layer as a leaf: the micro-batches of a step sum their gradients there, and one backward pass
carries the sum to eta.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import require
from ..routing.budgets import LayerBudgets, SoftRouter, slots
from .config import AlignmentConfig
from .module import AlignmentFFN


class BudgetState(NamedTuple):
    """What the soft routers ended with."""

    k: list[float]
    temperature: float

    def log(self) -> dict[str, float]:
        return {"router_temperature": self.temperature, "k_min": min(self.k), "k_max": max(self.k)}


class SoftRouting:
    """eta and the temperature of the layers, once a step."""

    def __init__(self, layers: dict[str, AlignmentFFN], config: AlignmentConfig) -> None:
        self.config, self.layers = config, list(layers.values())
        first = self.layers[0]
        alike = all((f.router, f.top_k, f.num_experts) == (first.router, first.top_k, first.num_experts) for f in self.layers)
        require(alike, "layers", "with different routers, top_k or num_experts", "one topology and router for every layer")
        require(first.num_experts >= 2, "num_experts", first.num_experts, "at least 2 with the soft router")
        self.budgets = LayerBudgets(len(layers), first.top_k, first.num_experts).to(first.router_weight.device)
        self.active: Tensor | None = None  # [L] mean of the active experts a token of this step
        self._k: Tensor | None = None

    def refresh(self, step: int) -> BudgetState:
        """New budgets and temperature for that step (0-based). Waits for the device: the budgets set the number of slots."""
        c = self.config
        self._k, self.active = self.budgets(), None
        state = BudgetState(self._k.detach().tolist(), c.router_temperature(step))
        for n, layer in enumerate(self.layers):
            k = self._k[n].detach().requires_grad_()
            layer.soft = SoftRouter(k, state.temperature, c.threshold, slots(state.k[n], c.cap, layer.num_experts))
        return state

    def observe(self, weight: float) -> None:
        """Counts the active experts of the pass just done, which is that share of the step."""
        found = [(f.routing.indices < f.num_experts).sum(-1).float().mean() for f in self.layers if f.routing is not None]
        active = weight * torch.stack(found)
        self.active = active if self.active is None else self.active + active

    def sums(self) -> list[Tensor]:
        """What several ranks must add: the gradients of the budgets, and the active experts."""
        assert self.active is not None
        for layer in self.layers:
            k = layer.soft.k  # type: ignore[union-attr]
            k.grad = torch.zeros_like(k) if k.grad is None else k.grad  # type: ignore[union-attr, arg-type]
        return [self.active, *(f.soft.k.grad for f in self.layers)]  # type: ignore[union-attr, list-item]

    def backward(self) -> None:
        """Carries the gradient that the budgets collected on to eta."""
        assert self._k is not None
        grads = [f.soft.k.grad for f in self.layers]  # type: ignore[union-attr]
        self._k.backward(torch.stack([torch.zeros_like(self._k[0]) if g is None else g for g in grads]))

    def log(self) -> dict[str, Tensor]:
        """What there is to log of the passes of the step, on the device."""
        assert self.active is not None
        return {"mean_active": self.active.mean()}
