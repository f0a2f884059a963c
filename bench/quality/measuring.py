"""What a model is worth on held-out documents: their negative log-likelihoods, and what its routing does there."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dotmoe_kernels.alignment.module import AlignmentFFN
from dotmoe_kernels.evaluation import RoutingCounts, unused_experts
from dotmoe_kernels.models.block import moe_blocks

from .layers import neurons, shared_neurons
from .settings import Held

_BATCH = 8


class _Counts(RoutingCounts):
    """Of the layers of an alignment, or of a converted model's blocks: valid tokens alone."""

    def __init__(self, model: nn.Module, layers: dict[str, AlignmentFFN]) -> None:
        super().__init__()
        self.layers = layers
        self.gates = {} if layers else {name: block.gate for name, block in moe_blocks(model).items()}
        self.chosen: dict[str, Tensor] = {}  # [T, K] in the last pass
        for name, gate in self.gates.items():
            gate.register_forward_hook(partial(self._keep, name))

    def _keep(self, name: str, gate: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self.chosen[name] = output[2]

    def observe(self, valid: Tensor) -> None:
        for name, layer in self.layers.items():
            assert layer.routing is not None
            self.add(name, layer.routing.indices[valid], layer.num_experts)
        for name, gate in self.gates.items():
            self.add(name, self.chosen[name][valid], gate.num_experts)

    def topologies(self) -> dict[str, tuple[int, int]]:
        """(E, K) by layer."""
        return {name: (one.num_experts, one.top_k) for name, one in (self.layers or self.gates).items()}


@torch.no_grad()
def score_documents(model: nn.Module, layers: dict[str, AlignmentFFN], held: Held) -> tuple[Tensor, Tensor, _Counts]:
    """(nll [D] in nats, tokens [D], the routing) of the held-out documents. The model is not used otherwise afterwards."""
    nll, counted = torch.zeros(len(held.names), dtype=torch.float64), torch.zeros(len(held.names), dtype=torch.int64)
    counts, device = _Counts(model, layers), next(model.parameters()).device
    for tokens, valid, document in zip(*(part.split(_BATCH) for part in held[:3]), strict=True):
        tokens, valid = tokens.to(device), valid.to(device)
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        losses = losses.view(len(tokens), -1).double() * valid[:, 1:]
        nll.index_add_(0, document, losses.sum(1).cpu())
        counted.index_add_(0, document, valid[:, 1:].sum(1).cpu())
        counts.observe(valid.flatten())
    return nll, counted, counts


def active_parameters(model: nn.Module, layers: dict[str, AlignmentFFN], zeroed: list[Tensor], counts: RoutingCounts) -> int:
    """Those a token touches, in the mean over the held-out tokens: of an expert its own width, of a pruned weight nothing."""
    affinities = {id(layer.affinity) for layer in layers.values()}
    sparse = {id(weight) for weight in zeroed}
    total = 0
    for parameter in model.parameters():
        if id(parameter) not in affinities:
            total += int(parameter.count_nonzero()) if id(parameter) in sparse else parameter.numel()
    for name, layer in layers.items():
        slots = counts.slots[name].double().cpu()
        tokens = float(counts.active[name].sum())
        width = float((slots * neurons(layer).cpu()).sum()) / max(tokens, 1) + shared_neurons(layer)
        total += round(3 * layer.gate_proj.shape[1] * width)
    if not layers:
        for name, block in moe_blocks(model).items():
            experts = sum(p.numel() for p in block.experts.parameters())
            total -= experts - round(experts * counts.mean_active()[name] / block.experts.num_experts)
    return total


def measure(model: nn.Module, layers: dict[str, AlignmentFFN], zeroed: list[Tensor], held: Held) -> dict[str, Any]:
    """The figures of a result."""
    nll, tokens, counts = score_documents(model, layers, held)
    value = float(nll.sum() / tokens.sum())
    found: dict[str, Any] = {
        "perplexity": math.exp(value) if value < 700 else math.inf,
        "nll": [round(v, 6) for v in nll.tolist()],
        "tokens": tokens.tolist(),
        "active_parameters": active_parameters(model, layers, zeroed, counts),
    }
    topologies = counts.topologies()
    if topologies:
        information = counts.mutual_information()
        most = {name: math.log(E / K) for name, (E, K) in topologies.items()}
        used = [float((slots > 0).double().mean()) for slots in counts.slots.values()]
        found |= {
            "unused": sum(unused_experts(counts.slots).values()),
            "experts_in_use": sum(used) / len(used),
            "mutual_information": sum(information.values()) / len(information),
            "most_information": sum(most.values()) / len(most),
            "mean_active": sum(counts.mean_active().values()) / len(topologies),
        }
    return found
