"""What a report measures of a converted model: weights by expert, and on text the load, the co-routing, perplexity at several K."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..evaluation import collect_load, perplexity
from ..models.block import DotMoeBlock, all_experts, moe_blocks
from ..models.counts import count_parameters


class Point(NamedTuple):
    """Perplexity at a number of experts a token; ``label`` says which."""

    label: str
    active: int  # parameters
    perplexity: float


@torch.no_grad()
def expert_norms(block: DotMoeBlock) -> tuple[Tensor, Tensor]:
    """Of one layer, by expert: the mean size |gate| |up| |down| of its neurons [E] in float32, and the norm of its router's row."""
    gate, up = block.experts.gate_up_proj.detach().unflatten(1, (2, -1)).unbind(1)  # [E, s, H] each
    down = block.experts.down_rows.detach()
    sizes = torch.stack([w.float().norm(dim=-1) for w in (gate, up, down)]).prod(0)  # [E, s]
    return sizes.mean(1).cpu(), block.gate.weight.detach().float().norm(dim=-1).cpu()


def experts_of_neurons(block: DotMoeBlock) -> Tensor:
    """[F] the expert of each neuron of the dense FFN."""
    order = block.neuron_order.cpu()
    expert_of = torch.empty_like(order)
    expert_of[order] = torch.arange(order.numel()) // block.experts.expert_size
    return expert_of


@contextmanager
def collect_pairs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside, counts by layer how many tokens visit both of two experts: [E, E], on the diagonal an expert's tokens."""
    pairs: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, num_experts: int) -> Any:
        def count(module: nn.Module, args: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            visited = torch.zeros(len(output[2]), num_experts + 1, device=output[2].device)  # of an empty slot the last
            visited.scatter_(1, output[2].long(), 1.0)
            found = (visited.T @ visited)[:num_experts, :num_experts].cpu().double()
            pairs[name] = pairs[name] + found if name in pairs else found

        return count

    try:
        for name, block in moe_blocks(model).items():
            handles.append(block.gate.register_forward_hook(watch(name, block.gate.num_experts)))
        yield pairs
    finally:
        for handle in handles:
            handle.remove()


def lift(pairs: Tensor) -> Tensor:
    """Of counts [E, E]: how much more often two experts serve the same token than if each were chosen by itself, a ratio; NaN where
    an expert has no token, and on the diagonal."""
    tokens = pairs.diagonal()
    # sum over e' of pairs[e, e'] is an expert's tokens times the experts of each, so that the mean of the ratio is 1
    others = pairs - torch.diag(tokens)
    expected = tokens[:, None] * tokens[None, :]
    expected.fill_diagonal_(0.0)
    scaled = expected * (others.sum() / expected.sum().clamp(min=1e-300))
    return torch.where(scaled > 0, others / scaled, torch.nan)


def _numbers_of_experts(E: int, K: int) -> list[int]:
    return sorted({k for k in (K // 4, K // 2, K, 2 * K, 4 * K) if 1 <= k < E} | {K})


@contextmanager
def _top_k(model: nn.Module, K: int) -> Iterator[None]:
    gates = [block.gate for block in moe_blocks(model).values()]
    before = [gate.top_k for gate in gates]
    try:
        for gate in gates:
            gate.top_k = K
        yield
    finally:
        for gate, k in zip(gates, before, strict=True):
            gate.top_k = k


class Measured(NamedTuple):
    """On tokens, of a converted model as it is saved."""

    tokens: int
    load: dict[str, Tensor]  # [E] by layer, shares of the slots
    pairs: dict[str, Tensor]  # [E, E] by layer
    points: list[Point]  # by the number of experts, every expert last


def measure(model: Any, tokens: Tensor, *, batch_size: int = 4) -> Measured:
    """Load and co-routing at the model's own K, and perplexity at a quarter to four times it and with every expert.

    Args:
        model: a converted model.
        tokens: [N, S] int64.
        batch_size: sequences a pass.
    """
    with collect_load(model) as counts, collect_pairs(model) as pairs:
        own = perplexity(model, tokens, batch_size=batch_size)
    total, active = count_parameters(model, counts.mean_active())
    E, K = model.config.num_experts, model.config.num_experts_per_tok
    points = [Point(f"K {K}", active, own)]
    if model.config.router == "top_k":
        for k in _numbers_of_experts(E, K):
            if k != K:
                with _top_k(model, k), collect_load(model) as seen:
                    value = perplexity(model, tokens, batch_size=batch_size)
                points.append(Point(f"K {k}", count_parameters(model, seen.mean_active())[1], value))
    else:
        points = [Point("soft router", active, own)]
    with all_experts(model):
        points.append(Point(f"every expert ({E})", total, perplexity(model, tokens, batch_size=batch_size)))
    return Measured(tokens.numel(), counts(), pairs, sorted(points, key=lambda point: point.active))
