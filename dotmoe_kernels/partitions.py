"""The other assignments: what DOT-MoE is compared with, and may start from. Each gives exactly balanced experts and a router.

    random       a random permutation (LLaMA-MoE, arXiv 2406.16554)
    kmeans       balanced k-means on the neurons' gate and up weights (MoEfication, arXiv 2110.01786)
    activation   balanced k-means on when the neurons fire, router by least squares (in the manner of CMoE, arXiv 2502.04416)

A partition is (expert_of [F], router_weight [E, H]); random and kmeans have no router of their own and start from noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require
from .experts.activations import find_activation
from .rounding import balanced_assignment

PARTITIONS = ("random", "kmeans", "activation")


class Partition(NamedTuple):
    """expert_of [F] int64 and router_weight [E, H] float32."""

    expert_of: Tensor
    router_weight: Tensor


def noise_router(num_experts: int, hidden_size: int, generator: torch.Generator, *, std: float = 0.01) -> Tensor:
    """[E, H] float32 drawn N(0, std)."""
    return std * torch.randn(num_experts, hidden_size, generator=generator)


def balanced_kmeans(points: Tensor, num_clusters: int, generator: torch.Generator, *, max_iters: int = 20) -> Tensor:
    """cluster_of [F] int64 of points [F, D], clusters of equal size (the first F % E one larger).

    Lloyd's algorithm with the balanced greedy for the assignment; stops when nothing moves or the cost no longer falls.

    Raises:
        ValueError: more clusters than points.
    """
    F = points.shape[0]
    require(1 <= num_clusters <= F, "num_clusters", num_clusters, f"1 to F = {F}")
    points = points.float()
    centres = points[torch.randperm(F, generator=generator)[:num_clusters].to(points.device)]
    best, best_cost = None, float("inf")
    for _ in range(max_iters):
        # -|p - m|^2 but for |p|^2, which is the same for every cluster of a point yet sets the order in which points choose
        scores = 2 * points @ centres.T - centres.square().sum(1) - points.square().sum(1, keepdim=True)  # [F, E]
        cluster_of = balanced_assignment(scores)
        cost = -float(scores.gather(1, cluster_of[:, None]).double().sum())
        if best is not None and cost >= best_cost:
            break
        best, best_cost = cluster_of, cost
        sums = torch.zeros_like(centres).index_add_(0, cluster_of, points)
        centres = sums / torch.bincount(cluster_of, minlength=num_clusters)[:, None]
    if best is None:
        raise ValueError("points are not finite; allowed: finite values")
    return best


def random_partition(num_neurons: int, num_experts: int, hidden_size: int, generator: torch.Generator) -> Partition:
    """Every expert a random draw of F / E neurons."""
    order = torch.randperm(num_neurons, generator=generator)
    expert_of = torch.empty_like(order)
    sizes = torch.tensor([num_neurons // num_experts + (e < num_neurons % num_experts) for e in range(num_experts)])
    expert_of[order] = torch.repeat_interleave(sizes)
    return Partition(expert_of, noise_router(num_experts, hidden_size, generator))


def kmeans_partition(gate_proj: Tensor, up_proj: Tensor, num_experts: int, generator: torch.Generator) -> Partition:
    """Balanced k-means on the rows of gate_proj and up_proj [F, H], side by side and of unit length."""
    points = torch.cat((gate_proj, up_proj), 1).float()
    points = torch.nn.functional.normalize(points, dim=1)
    return Partition(balanced_kmeans(points, num_experts, generator), noise_router(num_experts, gate_proj.shape[1], generator))


def least_squares_router(x: Tensor, targets: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Wr [E, H] minimising |x Wr^T - targets|^2 + ridge |Wr|^2 tr(x^T x) / H, scaled to logits of unit variance.

    x [T, H] the FFN's inputs, targets [T, E] what each expert is worth to each token (centred per expert here)."""
    x, targets = x.double(), targets.double()
    targets = (targets - targets.mean(0)) / targets.std().clamp(min=1e-12)
    gram = x.T @ x
    gram += torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ targets).T  # [E, H]
    return (weight / (x @ weight.T).std().clamp(min=1e-12)).float()


def activation_partition(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    num_experts: int,
    activation: str,
    generator: torch.Generator,
) -> Partition:
    """Balanced k-means on the neurons' contributions over calibration tokens; the router regresses each expert's share.

    A neuron's contribution to a token is |U_tf| |Wd_f|, its part of the output's length. x [T, H] are inputs of the FFN."""
    hidden = find_activation(activation).forward(x @ gate_proj.T) * (x @ up_proj.T)  # [T, F]
    size = hidden.abs().float() * down_proj.float().norm(dim=0)
    points = torch.nn.functional.normalize(size.T, dim=1)  # [F, T]
    expert_of = balanced_kmeans(points, num_experts, generator)
    energy = torch.zeros(len(x), num_experts, device=x.device).index_add_(1, expert_of, size.square())  # [T, E]
    return Partition(expert_of, least_squares_router(x, energy.sqrt()))


def start_affinity(
    partition: Partition | None, shape: tuple[int, int], *, strength: float, std: float, generator: torch.Generator
) -> Tensor:
    """A [F, E] drawn N(0, std), plus ``strength`` at each neuron's expert of the partition."""
    affinity = std * torch.randn(*shape, generator=generator)
    if partition is not None:
        affinity[torch.arange(shape[0]), partition.expert_of.cpu()] += strength
    return affinity
