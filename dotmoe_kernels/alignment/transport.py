"""Plans and assignments of all layers, once a step, warm-started from the step before.

The plan enters the layers as a leaf: a step of several micro-batches sums its gradient there, and one backward pass through
Sinkhorn carries the sum to the affinities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounding import balanced_assignment
from ..transport import sinkhorn
from .config import AlignmentConfig
from .module import AlignmentFFN


class Transport:
    """The Sinkhorn state of the layers that learn their assignment; those of one shape go in one batch."""

    def __init__(self, layers: dict[str, AlignmentFFN], config: AlignmentConfig) -> None:
        self.config = config
        self.groups: dict[tuple[int, ...], list[AlignmentFFN]] = {}
        for layer in layers.values():
            if layer.affinity is not None:
                self.groups.setdefault(tuple(layer.affinity.shape), []).append(layer)
        self.log_v: dict[str, Tensor] = {}  # [L, E] by shape, at temperature `tau`
        self.tau = config.tau_start
        self._plans: list[tuple[Tensor, list[AlignmentFFN]]] = []

    def refresh(self, tau: float, *, rounding: bool = True) -> dict[str, Tensor]:
        """New plans at ``tau``, and with ``rounding`` new assignments; returns what there is to log, on the device: nothing here
        waits for it."""
        c, self._plans = self.config, []
        iterations, errors, gaps = [], [], []
        for shape, layers in self.groups.items():
            affinity = torch.stack([layer.affinity for layer in layers])  # type: ignore[misc]  # [L, F, E]
            key = "x".join(map(str, shape))
            init = self.log_v[key] * (self.tau / tau) if key in self.log_v else None
            plan, info = sinkhorn(
                affinity, tau=tau, num_iters=c.num_iters, tol=c.tol, init=init, backward=c.backward, return_info=True
            )
            self.log_v[key] = info.log_v
            for n, layer in enumerate(layers):
                layer.plan = plan[n].detach().requires_grad_()
            self._plans.append((plan, layers))
            iterations.append(info.num_iters.max())
            errors.append(info.error.max())
            if rounding:
                gaps.append(self.assign(layers, affinity.detach() / tau + info.log_u[..., None] + info.log_v[..., None, :]))
        self.tau = tau
        if not self._plans:
            return {}
        found = {"sinkhorn_iters": iterations, "sinkhorn_error": errors, "rounding_gap": gaps}
        return {name: torch.stack(values).max() for name, values in found.items() if values}

    def assign(self, layers: list[AlignmentFFN], scores: Tensor) -> Tensor:
        """Rounds the plans of ``layers``, whose logarithms are ``scores`` [L, F, E]; returns the largest gap []."""
        expert_of, gap = balanced_assignment(scores, return_gap=True)
        for n, layer in enumerate(layers):
            layer.expert_of = expert_of[n]
        return gap.max()

    def backward(self) -> None:
        """Carries the gradient that the plans collected on to the affinities."""
        for plan, layers in self._plans:
            grads = [torch.zeros_like(layer.plan) if layer.plan.grad is None else layer.plan.grad for layer in layers]  # type: ignore[union-attr, arg-type]
            plan.backward(torch.stack(grads))
        self._plans = []
