"""Other ways from the affinities to plans and assignments, for ``align``."""

from __future__ import annotations

import torch
from torch import Tensor

from dotmoe_kernels.alignment.module import AlignmentFFN
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


class RowSoftmax(Transport):
    """P = softmax(A / tau) by row: no transport; the rounding alone keeps the capacity."""

    def refresh(self, tau: float, *, rounding: bool = True) -> dict[str, Tensor]:
        self._plans, gaps = [], []
        for layers in self.groups.values():
            scores = torch.stack([layer.affinity for layer in layers]) / tau  # type: ignore[misc]  # [L, F, E]
            plan = scores.softmax(-1)
            for n, layer in enumerate(layers):
                layer.plan = plan[n].detach().requires_grad_()
            self._plans.append((plan, layers))
            if rounding:
                gaps.append(self.assign(layers, scores.detach()))
        self.tau = tau
        return {"rounding_gap": torch.stack(gaps).max()} if gaps else {}


class NoCapacity(RowSoftmax):
    """A neuron goes to its favourite expert; experts are as wide as they come."""

    def assign(self, layers: list[AlignmentFFN], scores: Tensor) -> Tensor:
        for n, layer in enumerate(layers):
            layer.expert_of = scores[n].argmax(-1)
        return scores.new_zeros(())


class OptimalRounding(Transport):
    """The balanced assignment of the largest sum of scores, instead of the greedy's."""

    def assign(self, layers: list[AlignmentFFN], scores: Tensor) -> Tensor:
        gaps = []
        for layer, of_layer in zip(layers, scores, strict=True):
            layer.expert_of = optimal_assignment(of_layer)
            kept = of_layer.gather(1, layer.expert_of[:, None])[:, 0]
            gaps.append((of_layer.amax(1) - kept).sum())
        return torch.stack(gaps).max()


def optimal_assignment(scores: Tensor) -> Tensor:
    """expert_of [F] of scores [F, E], F / E neurons each, of the largest sum: an assignment problem whose columns are the places.

    Raises:
        ImportError: scipy is needed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("optimal rounding needs scipy: pip install 'dotmoe_kernels[bench]'") from None
    F, E = scores.shape
    places = torch.arange(E).repeat_interleave(F // E)  # [F]
    _, chosen = linear_sum_assignment(scores.detach().double().cpu()[:, places].numpy(), maximize=True)
    return places[torch.from_numpy(chosen)].to(scores.device)
