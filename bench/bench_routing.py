"""Routing: router logits [T, E] to experts, weights and losses, against plain torch.

The cases run on any device; ``bench/gpu/routing.py`` takes them to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench.paired import OURS, Case, Group, cases
from dotmoe_kernels import reference
from tests.shapes import normal

EXPERTS = ((8, 2), (32, 8), (112, 28), (128, 32), (148, 37))  # E, K
TOP_K = (OURS, "torch", "torch-stable-sort", "transformers-router")
GRADIENT = (OURS, "torch", "torch-stable-sort")
SOFT = (OURS, "bisection", "hard-topk")
ROUTE_SOFT = (OURS, "bisection")


def compose(logits: Tensor, K: int) -> tuple[Tensor, ...]:
    """What a model's router does: softmax, topk, unit weights straight-through, load by bincount, both losses."""
    T, E = logits.shape
    probs = torch.softmax(logits, -1)
    indices = torch.topk(logits, K, dim=-1).indices
    chosen = probs.gather(1, indices)
    load = torch.bincount(indices.flatten(), minlength=E).to(logits.dtype) / (T * K)
    balance = E * (load * probs.mean(0)).sum()
    return indices, 1 + (chosen - chosen.detach()), probs, load, balance, torch.logsumexp(logits, -1).square().mean()


def untied(T: int, E: int) -> Tensor:
    """Normal logits whose rows hold no value twice: torch.topk leaves the order of equal values open. [T, E]"""
    logits = normal(T + T // 8 + 8, E, seed=0, dtype=torch.float32)
    rows = torch.sort(logits, -1).values.diff(dim=-1).gt(0).all(-1)
    return logits[rows][:T].contiguous()


def _distance(found: Any, expected: Any) -> float:
    """Largest difference of the outputs, indices included, relative to the size of each."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        worst = max(worst, float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)))
    return worst


def transformers_router(logits: Tensor, K: int) -> tuple[Tensor, ...]:
    """The lines after the linear layer in transformers' MixtralTopKRouter; they give no load and no losses."""
    top, indices = torch.topk(torch.softmax(logits.float(), -1), K, dim=-1)
    return indices, top / top.sum(-1, keepdim=True)


def top_k_case(T: int, E: int, K: int, device: str = "cpu") -> Case:
    logits = untied(T, E).to(device)
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: dk.route_top_k(logits, K),
        "torch": lambda: compose(logits, K),
        "torch-stable-sort": lambda: reference.route_top_k(logits, K),
        "transformers-router": lambda: transformers_router(logits, K),
    }
    expected = reference.route_top_k(logits.double(), K)

    def error(name: str, found: Any) -> float:
        if name == "transformers-router":  # equal probabilities of unequal logits may change places
            return _distance([found[0].sort(-1).values], [expected[0].sort(-1).values])
        return _distance(found, expected)

    extra = {"transformers-router": {"note": "weights and experts only: no load, no losses"}}
    return Case(run, error, 1e-5, frozenset({"transformers-router"}), extra=extra)


def gradient_case(T: int, E: int, K: int, device: str = "cpu") -> Case:
    logits = untied(T, E).to(device).requires_grad_()
    weight = normal(T, K, seed=1, dtype=torch.float32).to(device)

    def gradient(route: Callable[[Tensor, int], Any], z: Tensor) -> Tensor:
        routing = route(z, K)
        loss = (routing[1] * weight.to(z.dtype)).sum() + 1e-2 * routing[4] + 1e-3 * routing[5]
        return torch.autograd.grad(loss, z)[0]

    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: gradient(dk.route_top_k, logits),
        "torch": lambda: gradient(compose, logits),
        "torch-stable-sort": lambda: gradient(reference.route_top_k, logits),
    }
    expected = gradient(reference.route_top_k, logits.detach().double().requires_grad_())
    return Case(run, lambda _, found: _distance([found], [expected]), 1e-5)


def soft_case(T: int, E: int, K: int, device: str = "cpu") -> Case:
    scores = normal(T, E, seed=0, dtype=torch.float32).to(device)
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: dk.soft_top_k(scores, K, temperature=0.5),
        "bisection": lambda: reference.soft_top_k(scores, float(K), temperature=0.5),
        "hard-topk": lambda: torch.zeros_like(scores).scatter_(1, torch.topk(scores, K, dim=-1).indices, 1.0),
    }
    expected = reference.soft_top_k(scores.double(), float(K), temperature=0.5)
    extra = {"hard-topk": {"note": "for scale: it is not differentiable"}}
    return Case(run, lambda _, found: _distance([found], [expected]), 1e-4, frozenset({"hard-topk"}), extra=extra)


def route_soft_case(T: int, E: int, K: int, device: str = "cpu") -> Case:
    """Only probabilities and losses are compared: at the threshold a rounding decides whether a slot is used."""
    scores = untied(T, E).to(device)
    options: dict[str, Any] = {"temperature": 0.5, "threshold": 0.1, "max_active": K}
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: dk.route_soft_top_k(scores, float(K), **options),
        "bisection": lambda: reference.route_soft_top_k(scores, float(K), **options),
    }
    expected = reference.route_soft_top_k(scores.double(), float(K), **options)
    return Case(run, lambda _, found: _distance([found[2], found[5]], [expected[2], expected[5]]), 1e-4)


def groups_of(tokens: tuple[int, ...], device: str, *, most: int, most_soft: int, prefix: str = "") -> list[Group]:
    """Every (T, E, K); above ``most`` tokens only E 8 and 112, which are also the sizes of the soft ones."""
    hard = (("route_top_k", TOP_K, top_k_case, 1), ("route_top_k-gradient", GRADIENT, gradient_case, 2))
    soft = (("soft_top_k", SOFT, soft_case, 2), ("route_soft_top_k", ROUTE_SOFT, route_soft_case, 2))
    groups = []
    for T in tokens:
        for E, K in EXPERTS:
            two = E in (8, 112)
            kinds = (*(hard if two or most >= T else ()), *(soft if two and most_soft >= T else ()))
            for name, impls, case, passes in kinds:
                info = {"shape": f"T {T}, E {E}, K {K}", "dtype": "float32", "bytes": passes * 4 * T * E, "flops": 0}
                groups.append(Group(f"{prefix}{name}-T{T}-E{E}-K{K}", impls, partial(case, T, E, K, device), info, 9, 3.0))
    return groups


@cases(
    [
        *[g for g in groups_of((256,), "cpu", most=256, most_soft=256, prefix="quick-") if "E112" in g.name],
        *groups_of((1, 16, 512, 8192, 65536), "cpu", most=8192, most_soft=8192),
    ]
)
def test_routing(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
