"""FFNs under alignment that differ from the package's: what only comparisons need.

VariantFFN    some experts always on, weights by softmax, experts of unequal width
MaskedFFN     experts that may overlap: expert_of is a mask [F, E]
"""

from __future__ import annotations

import torch
from torch import Tensor

from dotmoe_kernels.alignment.module import AlignmentFFN
from dotmoe_kernels.experts import masked_ffn
from dotmoe_kernels.experts.activations import find_activation
from dotmoe_kernels.reference import Routing
from dotmoe_kernels.routing import route_top_k


class VariantFFN(AlignmentFFN):
    """``shared`` experts take every token; they come last in ``expert_of``, behind the num_experts that are routed."""

    shared = 0
    weighting = "unit"  # or "softmax": of the chosen experts' logits, times K, so that their mean is 1
    balanced = True
    bias_rate = 0.0  # of a step: how far an expert's bias moves, by which it is chosen and which has no gradient
    sharpness = 1.0  # the balance loss sees the softmax of the logits times this
    bias: Tensor | None = None  # [E]; stays when the training is over

    def set_shared(self, expert_of: Tensor, router_weight: Tensor, shared: int) -> None:
        """expert_of [F] in [0, E); router_weight [E - shared, H]; of the K experts a token, ``shared`` are those."""
        self.top_k -= shared
        self.shared, self.num_experts, self.expert_of = shared, len(router_weight), expert_of
        self.router_weight = torch.nn.Parameter(router_weight.float())

    def forward(self, hidden: Tensor) -> Tensor:
        if self.dense:
            return super().forward(hidden)
        assert self.expert_of is not None
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.nan_to_num(x.float() @ self.seen_weight().T)  # [T, E]
        unit = self.weighting == "unit"
        self.routing = route_top_k(logits, self.top_k, weights="unit" if unit else "renormalized", mask=self.mask)
        if self.bias_rate:
            self.routing = self._with_bias(logits, self.routing)
        if self.sharpness != 1:
            sharp = route_top_k(logits * self.sharpness, self.top_k, mask=self.mask)
            self.routing = self.routing._replace(balance_loss=sharp.balance_loss)
        indices, probs = self.routing.indices, self.routing.probs
        weights = None if unit else self.routing.weights * self.top_k
        if self.shared:
            always = torch.arange(self.num_experts, self.num_experts + self.shared, device=x.device)
            indices = torch.cat((indices, always.expand(len(x), -1)), 1)
            probs = torch.cat((probs, probs.new_ones(len(x), self.shared)), 1)
            if weights is not None:
                weights = torch.cat((weights, weights.new_ones(len(x), self.shared)), 1)
        y = masked_ffn(
            x,
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.expert_of,
            indices,
            plan=self.plan,
            probs=probs if unit else probs.detach(),
            weights=weights,
            activation=self.activation,
            balanced=self.balanced,
        )
        self._watch(y)
        return y.view(hidden.shape)

    def _with_bias(self, logits: Tensor, routing: Routing) -> Routing:
        """Another choice: by the logits and a bias, which a step of the training moves against the load of its batch."""
        bias = logits.new_zeros(self.num_experts) if self.bias is None else self.bias
        chosen = route_top_k(logits.detach() + bias, self.top_k, mask=self.mask)
        if torch.is_grad_enabled():
            self.bias = bias + self.bias_rate * torch.sign(chosen.load.mean() - chosen.load)
        return routing._replace(indices=chosen.indices, load=chosen.load)

    def _watch(self, y: Tensor) -> None:
        assert self.routing is not None
        finite = torch.isfinite(y.detach().sum() + self.routing.z_loss.detach())
        self.finite = finite if self.finite is None else self.finite & finite


class MaskedFFN(VariantFFN):
    """y = (U * (R_ste M_ste^T)) Wd^T for a mask M [F, E], which ``expert_of`` holds as bool; one expert a token."""

    share = 0.25  # of the neurons that a token visits, in the mean over layers and tokens

    def forward(self, hidden: Tensor) -> Tensor:
        if self.dense:
            return AlignmentFFN.forward(self, hidden)
        assert self.expert_of is not None
        x = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.nan_to_num(x.float() @ self.seen_weight().T)
        self.routing = route_top_k(logits, self.top_k, mask=self.mask)
        probs, mask = self.routing.probs, self.expert_of.float()
        chosen = torch.zeros_like(probs).scatter_(1, self.routing.indices, 1.0)
        chosen = chosen + (probs - probs.detach())
        if self.plan is not None:
            mask = mask + (self.plan - self.plan.detach())
        inner = find_activation(self.activation).forward(x @ self.gate_proj.T) * (x @ self.up_proj.T)  # [T, F]
        y = (inner * (chosen @ mask.T).to(inner.dtype)) @ self.down_proj.T
        self._watch(y)
        return y.view(hidden.shape)


def neurons(layer: AlignmentFFN) -> Tensor:
    """[E] neurons of every routed expert."""
    assert layer.expert_of is not None
    if layer.expert_of.dim() == 2:
        return layer.expert_of.sum(0)
    return torch.bincount(layer.expert_of, minlength=layer.num_experts)[: layer.num_experts]


def shared_neurons(layer: AlignmentFFN) -> int:
    """Those that every token visits."""
    if layer.expert_of is None or layer.expert_of.dim() == 2:
        return 0
    return int((layer.expert_of >= layer.num_experts).sum())
