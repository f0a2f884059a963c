"""The other assignments: what DOT-MoE is compared with, and may start from. Each gives exactly balanced experts and a router.

    random       a random permutation (LLaMA-MoE, arXiv 2406.16554)
    kmeans       balanced k-means on the neurons' gate and up weights (MoEfication, arXiv 2110.01786)
    activation   balanced k-means on when the neurons fire, router by least squares (in the manner of CMoE, arXiv 2502.04416)
    shared       the neurons that matter to every token in experts that every token visits, the rest as in activation (in the
                 manner of CMoE and LLaMA-MoE-v2, arXiv 2411.15708)

A partition is (expert_of [F], router_weight [E, H]); random and kmeans have no router of their own and start from noise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require
from .experts.activations import find_activation
from .rounding import balanced_assignment

PARTITIONS = ("random", "kmeans", "activation", "shared")
CALIBRATED = ("activation", "shared")  # those that need inputs of the FFN
_ALWAYS = 4.0  # logit of the experts that every token visits, where those of the others have variance 1


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


def _sizes(num_neurons: int, num_experts: int) -> list[int]:
    """F / E neurons an expert, the first F % E one more."""
    return [num_neurons // num_experts + (e < num_neurons % num_experts) for e in range(num_experts)]


def random_partition(num_neurons: int, num_experts: int, hidden_size: int, generator: torch.Generator) -> Partition:
    """Every expert a random draw of F / E neurons."""
    order = torch.randperm(num_neurons, generator=generator)
    expert_of = torch.empty_like(order)
    expert_of[order] = torch.repeat_interleave(torch.tensor(_sizes(num_neurons, num_experts)))
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


def constant_direction(x: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """c [H] in float64 with x c as near to 1 for all inputs x [T, H] as a ridge of the size of ``least_squares_router``'s allows.

    The inputs of a trained model's FFN share a large part: along c a router without a bias has one."""
    x = x.double()
    gram = x.T @ x
    gram += torch.eye(len(gram), dtype=gram.dtype, device=gram.device) * (ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, x.sum(0))


def _contributions(x: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, activation: str) -> Tensor:
    """|U_tf| |Wd_f| [T, F]: a neuron's part of the output's length for a token."""
    hidden = find_activation(activation).forward(x @ gate_proj.T) * (x @ up_proj.T)
    return hidden.abs().float() * down_proj.float().norm(dim=0)


def _energy(size: Tensor, expert_of: Tensor, num_experts: int) -> Tensor:
    """[T, E]: the squared contributions [T, F] summed by expert."""
    return torch.zeros(len(size), num_experts, device=size.device).index_add_(1, expert_of, size.square())


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
    size = _contributions(x, gate_proj, up_proj, down_proj, activation)
    points = torch.nn.functional.normalize(size.T, dim=1)  # [F, T]
    expert_of = balanced_kmeans(points, num_experts, generator)
    return Partition(expert_of, least_squares_router(x, _energy(size, expert_of, num_experts).sqrt()))


def shared_partition(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    num_experts: int,
    activation: str,
    generator: torch.Generator,
    *,
    shared: int,
) -> Partition:
    """``activation_partition`` of all neurons but those of the largest mean square contribution, which fill the first ``shared``
    experts; for these the router has a logit near 4 whatever the token, above the others' of variance 1.

    Nothing marks an expert as shared: its row of the router is an ordinary one, and may be trained to choose.

    Raises:
        ValueError: ``shared`` outside [0, E - 1].
    """
    F, E = gate_proj.shape[0], num_experts
    require(0 <= shared < E, "shared", shared, f"0 to E - 1 = {E - 1}")
    size = _contributions(x, gate_proj, up_proj, down_proj, activation)
    filled = torch.repeat_interleave(torch.tensor(_sizes(F, E)[:shared], dtype=torch.int64)).to(gate_proj.device)
    first = len(filled)
    order = size.square().mean(0).argsort(descending=True, stable=True)  # [F]
    rest = order[first:].sort().values
    expert_of = torch.empty_like(order)
    expert_of[order[:first]] = filled
    points = torch.nn.functional.normalize(size[:, rest].T, dim=1)
    expert_of[rest] = shared + balanced_kmeans(points, E - shared, generator)
    router = least_squares_router(x, _energy(size, expert_of, E).sqrt())  # [E, H]
    constant = constant_direction(x).float()
    noise = noise_router(shared, len(constant), generator).to(router.device)  # no two rows alike, which could never part
    router[:shared] = _ALWAYS * constant + noise / x.float().norm(dim=1).mean().clamp(min=1e-12)
    return Partition(expert_of, router)


def start_affinity(
    partition: Partition | None, shape: tuple[int, int], *, strength: float, std: float, generator: torch.Generator
) -> Tensor:
    """A [F, E] drawn N(0, std), plus ``strength`` at each neuron's expert of the partition."""
    affinity = std * torch.randn(*shape, generator=generator)
    if partition is not None:
        affinity[torch.arange(shape[0]), partition.expert_of.cpu()] += strength
    return affinity
