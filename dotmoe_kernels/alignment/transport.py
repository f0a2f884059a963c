"""Plans and assignments of all layers, once a step, warm-started from the step before.

The plan enters the layers as a leaf: a step of several micro-batches sums its gradient there, and one backward pass through
Sinkhorn carries the sum to the affinities. Of several ranks each does so for its part of the layers, and all get the results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..rounding import balanced_assignment
from ..transport import sinkhorn
from .config import AlignmentConfig
from .module import AlignmentFFN
from .ranks import Ranks


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
        self.ranks = Ranks()  # that share the layers
        self._plans: list[tuple[Tensor, list[AlignmentFFN]]] = []

    def refresh(self, tau: float, *, rounding: bool = True) -> dict[str, Tensor]:
        """New plans at ``tau``, and with ``rounding`` new assignments; returns what there is to log, on the device: nothing here
        waits for it."""
        self._plans = []
        names = ("sinkhorn_iters", "sinkhorn_error", *(("rounding_gap",) if rounding else ()))
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for shape, layers in self.groups.items():
            key, own = "x".join(map(str, shape)), self.ranks.own(layers)
            if own:
                for name, value in self._solve(key, own, tau, rounding).items():
                    found[name].append(value)
            if self.ranks.count > 1:
                self._gather(key, layers, own, rounding)
        self.tau = tau
        if not self.groups:
            return {}
        none = [torch.zeros((), device=self.ranks.device)]  # of a rank without a layer
        return self.ranks.most({name: torch.stack(values or none).max() for name, values in found.items()})

    def _solve(self, key: str, layers: list[AlignmentFFN], tau: float, rounding: bool) -> dict[str, Tensor]:
        """Of layers of one shape."""
        c = self.config
        affinity = torch.stack([layer.affinity for layer in layers])  # type: ignore[misc]  # [L, F, E]
        init = self.ranks.own(self.log_v[key]) * (self.tau / tau) if key in self.log_v else None
        plan, info = sinkhorn(affinity, tau=tau, num_iters=c.num_iters, tol=c.tol, init=init, backward=c.backward, return_info=True)
        self.log_v[key] = info.log_v
        for n, layer in enumerate(layers):
            layer.plan = plan[n].detach().requires_grad_()
        self._plans.append((plan, layers))
        found = {"sinkhorn_iters": info.num_iters.max(), "sinkhorn_error": info.error.max()}
        if rounding:
            scores = affinity.detach() / tau + info.log_u[..., None] + info.log_v[..., None, :]
            found["rounding_gap"] = self.assign(layers, scores)
        return found

    def _gather(self, key: str, layers: list[AlignmentFFN], own: list[AlignmentFFN], rounding: bool) -> None:
        """Plans, assignments and dual variables of ``layers`` from the ranks that made them."""
        affinity = layers[0].affinity
        assert affinity is not None
        F, E = affinity.shape

        def whole(parts: list[Tensor], empty: Tensor) -> Tensor:
            return self.ranks.gather(torch.stack(parts) if own else empty, len(layers))

        plans = whole([layer.plan.detach() for layer in own], affinity.new_zeros(0, F, E))  # type: ignore[union-attr]
        self.log_v[key] = self.ranks.gather(self.log_v[key] if own else affinity.new_zeros(0, E), len(layers))
        if rounding:
            none = torch.zeros(0, F, dtype=torch.int64, device=affinity.device)
            for layer, expert_of in zip(layers, whole([layer.expert_of for layer in own], none), strict=True):  # type: ignore[misc]
                layer.expert_of = expert_of
        for layer, plan in zip(layers, plans, strict=True):
            layer.plan = plan.detach().requires_grad_()

    def assign(self, layers: list[AlignmentFFN], scores: Tensor) -> Tensor:
        """Rounds the plans of ``layers``, whose logarithms are ``scores`` [L, F, E]; returns the largest gap []."""
        expert_of, gap = balanced_assignment(scores, return_gap=True)
        for n, layer in enumerate(layers):
            layer.expert_of = expert_of[n]
        return gap.max()

    def gradients(self) -> list[Tensor]:
        """Those that the plans of all layers collected, where several ranks must add them."""
        layers = [layer for group in self.groups.values() for layer in group]
        for layer in layers:
            assert layer.plan is not None
            layer.plan.grad = torch.zeros_like(layer.plan) if layer.plan.grad is None else layer.plan.grad
        return [layer.plan.grad for layer in layers]  # type: ignore[union-attr, misc]

    def backward(self) -> None:
        """Carries the gradient that the plans collected on to the affinities."""
        for plan, layers in self._plans:
            grads = [torch.zeros_like(layer.plan) if layer.plan.grad is None else layer.plan.grad for layer in layers]  # type: ignore[union-attr, arg-type]
            plan.backward(torch.stack(grads))
        self._plans = []
        if self.ranks.count == 1:
            return
        for layers in self.groups.values():
            own, like = self.ranks.own(layers), layers[0].affinity
            assert like is not None
            grads = [layer.affinity.grad for layer in own]
            found = self.ranks.gather(torch.stack(grads) if own else like.new_zeros(0, *like.shape), len(layers))
            for layer, gradient in zip(layers, found, strict=True):
                layer.affinity.grad = gradient  # type: ignore[union-attr]
