"""How the experts are used in a step: what tells a routing that lives from one that collapsed into pruning."""

from __future__ import annotations

import torch
from torch import Tensor

from .module import AlignmentFFN


class ExpertLoads:
    """The loads of all layers over the passes of one step, on the device."""

    def __init__(self, layers: dict[str, AlignmentFFN]) -> None:
        self.layers = layers
        self.sizes = [layer.num_experts for layer in layers.values()]
        device = next(iter(layers.values())).router_weight.device
        self._even = torch.cat([torch.full((E,), float(E), device=device) for E in self.sizes])  # [sum of E] 1 / the even share
        self._sum: Tensor | None = None  # [sum of E]

    def begin(self) -> None:
        """A new step."""
        self._sum = None

    def observe(self, share: float) -> None:
        """Adds the pass just done, which is ``share`` of the step."""
        found = share * torch.cat([f.routing.load.float() for f in self.layers.values() if f.routing is not None])
        self._sum = found if self._sum is None else self._sum + found

    def sums(self) -> list[Tensor]:
        """What several ranks must add."""
        return [] if self._sum is None else [self._sum]

    def log(self) -> dict[str, Tensor]:
        """experts_in_use: the share of all experts that a token of the step visits. largest_load: of the most visited one, as a
        multiple of the even share, which is at most E / K."""
        assert self._sum is not None
        return {"experts_in_use": (self._sum > 0).float().mean(), "largest_load": (self._sum * self._even).max()}

    def by_layer(self) -> dict[str, Tensor] | None:
        """The loads [E] of the last step, each summing to 1; None before the first."""
        return None if self._sum is None else dict(zip(self.layers, self._sum.split(self.sizes), strict=True))
