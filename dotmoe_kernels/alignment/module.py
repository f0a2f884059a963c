"""One FFN while it is being aligned: the frozen dense weights, a router that trains, and the assignment of this step.

The teacher is the same module with every expert on, which is the dense FFN; ``dense`` switches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .._checks import require_shape
from ..experts import masked_ffn
from ..experts.activations import find_activation
from ..reference import Routing
from ..routing import route_soft, route_top_k
from ..routing.budgets import SoftRouter

_CENTRE_TOKENS = 2048  # that the mean input is taken of


class AlignmentFFN(nn.Module):
    """Stands in for a dense gated FFN: act(x Wg^T) * (x Wu^T) masked by the routed experts, times Wd^T (eq. 4).

    Args:
        gate_proj, up_proj: [F, H]; down_proj: [H, F]; taken over, frozen.
        router_weight: [E, H] float32, trains.
        top_k: K.
        activation: an ACT2FN name.
        affinity: [F, E] float32, trains; None for a fixed assignment.
        expert_of: [F] int64; the fixed assignment, or the one that the affinity starts from; F / E neurons an expert where E
            divides F.
        router: "top_k", or "soft", which ``soft`` then sets the budget of, step by step.
    """

    def __init__(
        self,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        *,
        router_weight: Tensor,
        top_k: int,
        activation: str,
        affinity: Tensor | None = None,
        expert_of: Tensor | None = None,
        router: str = "top_k",
    ) -> None:
        super().__init__()
        F, E = gate_proj.shape[0], router_weight.shape[0]
        self.gate_proj, self.up_proj, self.down_proj = gate_proj.detach(), up_proj.detach(), down_proj.detach()
        self.router_weight = nn.Parameter(router_weight.float())
        self.affinity = None if affinity is None else nn.Parameter(affinity.float())
        if affinity is not None:
            require_shape(affinity, "affinity", (F, E), "[F, E]")
        self.top_k, self.num_experts, self.activation, self.router = top_k, E, activation, router
        self.soft: SoftRouter | None = None  # of this step; k is a leaf that collects the gradient
        self.expert_of = expert_of
        self.centre: Tensor | None = None  # [H] of length 1: the direction of the inputs that the router does not see
        self.plan: Tensor | None = None  # [F, E] of this step, a leaf that collects the gradient
        self.mask: Tensor | None = None  # [T] valid tokens of this batch
        self.dense = False
        self.routing: Routing | None = None  # of the last sparse pass
        self.finite: Tensor | None = None  # [] of the sparse passes since it was set to None
        self.inputs: list[Tensor] | None = None  # the inputs [T, H] of dense passes, while they are collected

    def seen_weight(self) -> Tensor:
        """[E, H] the router as it acts: W, or W - (W c) c^T with a centre c."""
        if self.centre is None:
            return self.router_weight
        return self.router_weight - torch.outer(self.router_weight @ self.centre, self.centre)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        x = hidden.reshape(-1, hidden.shape[-1])
        if self.dense:
            if self.inputs is not None:
                self.inputs.append(x)
            inner = find_activation(self.activation).forward(x @ self.gate_proj.T)  # [T, F]
            up = x @ self.up_proj.T
            inner = inner * up if inner.requires_grad else inner.mul_(up)
            return (inner @ self.down_proj.T).view(hidden.shape)
        assert self.expert_of is not None
        with torch.autocast(x.device.type, enabled=False):
            # a NaN goes on to the loss through x; there the step and the layer are named
            logits = torch.nan_to_num(x.float() @ self.seen_weight().T)  # [T, E]
            if self.router == "soft":
                assert self.soft is not None
                self.routing = route_soft(logits, self.soft, mask=self.mask)
            else:
                self.routing = route_top_k(logits, self.top_k, mask=self.mask)
        soft = self.router == "soft"  # its weights carry the gradient of the router, and probs only the number of experts
        y = masked_ffn(
            x,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.expert_of,
            self.routing.indices,
            plan=self.plan,
            probs=self.routing.probs.detach() if soft else self.routing.probs,
            weights=self.routing.weights if soft else None,
            activation=self.activation,
            balanced=len(self.gate_proj) % self.num_experts == 0,
        )
        finite = torch.isfinite(y.detach().sum() + self.routing.z_loss.detach())
        self.finite = finite if self.finite is None else self.finite & finite
        return y.view(hidden.shape)


@contextmanager
def all_experts(layers: dict[str, AlignmentFFN]) -> Iterator[None]:
    """Inside, every layer is the dense FFN: the teacher."""
    for layer in layers.values():
        layer.dense = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.dense = False


@torch.no_grad()
def collect_inputs(model: nn.Module, layers: dict[str, AlignmentFFN], tokens: Tensor, *, batch_size: int = 4) -> dict[str, Tensor]:
    """The inputs [T, H] of every FFN for the tokens [N, S] in the dense model."""
    for layer in layers.values():
        layer.inputs = []
    try:
        with all_experts(layers):
            for batch in tokens.split(batch_size):
                model(input_ids=batch, use_cache=False)
        return {name: torch.cat(layer.inputs or []) for name, layer in layers.items()}
    finally:
        for layer in layers.values():
            layer.inputs = None


@contextmanager
def centred_routers(model: nn.Module, layers: dict[str, AlignmentFFN], data: Tensor) -> Iterator[None]:
    """Inside, no router sees the direction of its FFN's mean input in the dense model, at the beginning of ``data`` [N, S];
    afterwards the weights are those that acted.

    That one vector is much of every input of a trained model: through it a router sends all tokens to the same experts."""
    rows = data[: -(-_CENTRE_TOKENS // data.shape[1])].long().to(next(iter(layers.values())).router_weight.device)
    for name, inputs in collect_inputs(model, layers, rows).items():
        layers[name].centre = nn.functional.normalize(inputs.float().mean(0), dim=0)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.router_weight.data = layer.seen_weight().detach()
            layer.centre = None
