"""Other ways from the affinities to plans and assignments, for ``align``."""

from __future__ import annotations

import torch
from torch import Tensor

from dotmoe_kernels.alignment.transport import Transport

from .layers import MaskedFFN


class MaskTransport(Transport):
    """P = sigmoid((A - c) / tau), M = A > c with one c for all layers: the masks of all experts are as wide together as one
    budget allows, K / E of the neurons a token with every expert counted by its load.

    The budget is the share of neurons that a token visits in the MoE; ``MaskedFFN`` chooses one expert a token."""

    def refresh(self, tau: float, *, rounding: bool = True) -> dict[str, Tensor]:
        layers = [layer for group in self.groups.values() for layer in group]
        scores = [layer.affinity.detach() for layer in layers]  # type: ignore[union-attr]  # [F, E]
        loads = []
        for layer, score in zip(layers, scores, strict=True):
            E = score.shape[1]
            load = score.new_full((E,), 1 / E) if layer.routing is None else layer.routing.load.to(score)
            loads.append(load.expand_as(score))
        values, weights = (torch.cat([t.flatten() for t in part]) for part in (scores, loads))
        order = values.argsort(descending=True)
        spent = weights[order].cumsum(0)  # neurons a token visits in all layers when so many entries are on
        budget = sum(layer.share * len(layer.gate_proj) for layer in layers if isinstance(layer, MaskedFFN))
        last = int((spent <= budget).sum()) - 1
        cut = values[order[max(last, 0)]]
        self._plans = []
        for layer, score in zip(layers, scores, strict=True):
            assert layer.affinity is not None
            plan = torch.sigmoid((layer.affinity - cut) / tau)
            layer.expert_of = score >= cut
            layer.plan = plan.detach().requires_grad_()
            self._plans.append((plan[None], [layer]))
        self.tau = tau
        return {}
