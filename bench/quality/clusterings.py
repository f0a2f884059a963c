"""Assignments of other papers, from their definitions: each fills a layer that is in the model already.

A function takes (layer, inputs [T, H] of the dense FFN, generator) and sets expert_of, the router and what is always on. All are
exactly balanced: E experts of F / E neurons, K of them a token, those always on among the K.

    coactivation    balanced partition of the co-activation graph (MoEfication, arXiv 2110.01786, section 3.2)
    by_rate         always on: the neurons that are most often among a token's strongest; the rest clustered by when they are
                    (CMoE, arXiv 2502.04416)
    by_importance   always on: the neurons of the largest first-order effect on the loss (LLaMA-MoE-v2, arXiv 2411.15708)
    by_gate         balanced k-means on gate activations, router = mean gate vector, always on: the neurons whose gate varies least,
                    a share that each layer sets for itself (ExpertWeaver)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dotmoe_kernels.experts.activations import find_activation
from dotmoe_kernels.models.surgery import DenseFFN
from dotmoe_kernels.partitions import balanced_kmeans, least_squares_router

from .layers import VariantFFN

STRONGEST = 0.1  # of the neurons are a token's active ones; SiLU leaves none at zero
_SEGMENTS = 32  # parts of the calibration text, over which a gate's mean varies or not
_VARIES = 0.5  # coefficient of variation from which on it does
_SHARED_RANGE = 0.7, 0.5  # ExpertWeaver: the share always on is 0.7 - 0.5 r


def hidden_size(layer: VariantFFN, x: Tensor) -> Tensor:
    """[T, F] |U_tf| |Wd_f|: a neuron's part in the output's length."""
    inner = find_activation(layer.activation).forward(x @ layer.gate_proj.T) * (x @ layer.up_proj.T)
    return inner.abs().float() * layer.down_proj.float().norm(dim=0)


def strongest(size: Tensor, share: float = STRONGEST) -> Tensor:
    """[T, F] 0 or 1: the neurons that are among the ``share`` strongest of their token."""
    count = max(1, round(share * size.shape[1]))
    return torch.zeros_like(size).scatter_(1, size.topk(count, dim=1).indices, 1.0)


def expert_energy(size: Tensor, expert_of: Tensor, num_experts: int) -> Tensor:
    """[T, E] the length of what each expert contributes, interference aside."""
    energy = torch.zeros(len(size), num_experts, device=size.device)
    return energy.index_add_(1, expert_of, size.square()).sqrt()


def inside(weights: Tensor, cluster_of: Tensor) -> float:
    """Weight of the edges whose ends share a cluster, each counted from both."""
    return float(weights[cluster_of[:, None] == cluster_of[None]].sum())


def refine(weights: Tensor, cluster_of: Tensor, num_clusters: int, *, swaps: int) -> Tensor:
    """Exchanges in the manner of Kernighan and Lin, of equal clusters: of every two clusters the neuron of each that is drawn most
    to the other; the pair whose swap gains most weight inside clusters is taken, until none gains."""
    F, E = len(weights), num_clusters
    cluster_of = cluster_of.clone()
    to = weights @ nn.functional.one_hot(cluster_of, E).to(weights.dtype)  # [F, E] weight from a neuron to a cluster
    least = 1e-6 * float(to.max())
    for _ in range(swaps):
        members = cluster_of.argsort(stable=True).view(E, F // E)
        drawn = (to - to.gather(1, cluster_of[:, None]))[members]  # [E, s, E]
        best, place = drawn.max(1)  # [E, E] of a cluster to another
        who = members.gather(1, place)  # [E, E]
        gain = (best + best.T - 2 * weights[who, who.T]).fill_diagonal_(0)
        a, b = divmod(int(gain.argmax()), E)
        if float(gain[a, b]) <= least:
            break
        i, j = int(who[a, b]), int(who[b, a])
        step = weights[:, j] - weights[:, i]
        to[:, a] += step
        to[:, b] -= step
        cluster_of[i], cluster_of[j] = b, a
    return cluster_of


def balanced_cut(weights: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """cluster_of [F] of a graph [F, F]: equal clusters that keep much of the weight inside. Balanced k-means on the leading
    eigenvectors of the normalised graph, then exchanges."""
    weights = weights.double().clone()
    weights.fill_diagonal_(0)
    scale = weights.sum(1).clamp(min=1e-12).rsqrt()
    vectors = torch.linalg.eigh(scale[:, None] * weights * scale[None]).eigenvectors[:, -num_clusters:]
    points = nn.functional.normalize(vectors, dim=1)
    start = balanced_kmeans(points, num_clusters, generator)
    return refine(weights, start, num_clusters, swaps=len(weights))


def coactivation(layer: VariantFFN, x: Tensor, generator: torch.Generator) -> None:
    size = hidden_size(layer, x)
    active = strongest(size)
    layer.expert_of = balanced_cut(active.T @ active, layer.num_experts, generator)
    energy = expert_energy(size, layer.expert_of, layer.num_experts)
    layer.router_weight = nn.Parameter(least_squares_router(x.float(), energy))


def _share_and_cluster(layer: VariantFFN, order: Tensor, points: Tensor, shared: int, generator: torch.Generator) -> Tensor:
    """expert_of [F]: the first of ``order`` are the ``shared`` experts, which come last; the rest clustered by points [F, D]."""
    F, E = len(order), layer.num_experts
    width, routed = F // E, E - shared
    always, rest = order[: shared * width], order[shared * width :].sort().values
    expert_of = torch.empty(F, dtype=torch.int64, device=order.device)
    expert_of[always] = routed + torch.arange(len(always), device=order.device) // width
    expert_of[rest] = balanced_kmeans(points[rest], routed, generator)
    return expert_of


def _set_shared(layer: VariantFFN, x: Tensor, size: Tensor, expert_of: Tensor, shared: int) -> None:
    energy = expert_energy(size, expert_of, layer.num_experts)[:, : layer.num_experts - shared]
    layer.set_shared(expert_of, least_squares_router(x.float(), energy), shared)


def by_rate(layer: VariantFFN, x: Tensor, generator: torch.Generator) -> None:
    size = hidden_size(layer, x)
    active = strongest(size)  # [T, F]
    order = active.mean(0).argsort(descending=True, stable=True)
    points = nn.functional.normalize(active.T, dim=1)
    shared = layer.top_k // 2
    _set_shared(layer, x, size, _share_and_cluster(layer, order, points, shared, generator), shared)


def by_importance(layer: VariantFFN, x: Tensor, generator: torch.Generator, importance: Tensor) -> None:
    """importance [F], see ``first_order_effect``."""
    size = hidden_size(layer, x)
    order = importance.argsort(descending=True, stable=True)
    points = nn.functional.normalize(size.T, dim=1)
    shared = layer.top_k // 2
    _set_shared(layer, x, size, _share_and_cluster(layer, order, points, shared, generator), shared)


def by_gate(layer: VariantFFN, x: Tensor, generator: torch.Generator) -> None:
    gate = find_activation(layer.activation).forward(x @ layer.gate_proj.T).abs().float()  # [T, F]
    means = torch.stack([part.mean(0) for part in gate.chunk(_SEGMENTS)])  # [S, F]
    variation = means.std(0) / means.mean(0).clamp(min=1e-12)
    top, slope = _SHARED_RANGE
    share = top - slope * float((variation > _VARIES).float().mean())
    shared = min(layer.top_k - 1, round(share * layer.top_k))
    points = nn.functional.normalize(gate.T, dim=1)
    expert_of = _share_and_cluster(layer, variation.argsort(stable=True), points, shared, generator)
    routed = layer.num_experts - shared
    sums = torch.zeros(layer.num_experts, x.shape[1], device=x.device).index_add_(0, expert_of, layer.gate_proj.float())
    router = sums[:routed] * layer.num_experts / len(expert_of)
    spread = (x.float() @ router.T).std().clamp(min=1e-12)
    layer.set_shared(expert_of, router / spread, shared)


def first_order_effect(model: nn.Module, ffns: dict[str, DenseFFN], tokens: Tensor, *, batch_size: int = 4) -> dict[str, Tensor]:
    """[F] by layer: mean over tokens of |U_tf dL/dU_tf|, for the language-model loss L of the dense model on tokens [N, S]."""
    kept: dict[str, Tensor] = {}
    effect: dict[str, Tensor] = {}

    def watch(name: str, down: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            args[0].retain_grad()
            kept[name] = args[0]

        return down.register_forward_pre_hook(keep)

    handles = [watch(name, ffn.module.get_submodule(ffn.children[2])) for name, ffn in ffns.items()]
    embed = model.get_input_embeddings()  # type: ignore[operator]
    try:
        for batch in tokens.split(batch_size):
            with torch.no_grad():
                states = embed(batch)
            model(inputs_embeds=states.requires_grad_(), labels=batch, use_cache=False).loss.backward()
            for name, inner in kept.items():
                assert inner.grad is not None
                found = (inner.detach() * inner.grad).abs().float().flatten(0, -2).sum(0)
                effect[name] = effect.get(name, 0) + found
            kept.clear()
    finally:
        for handle in handles:
            handle.remove()
    return effect
