"""Routing and dispatch: router logits [T, E] to experts, weights, losses and expert-sorted slots, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench import shapes
from bench.paired import Case, Group, cases
from bench.shapes import Shape
from dotmoe_kernels import reference
from tests.shapes import normal, routed_indices


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


def _top_k(shape: Shape, T: int) -> Case:
    logits = untied(T, shape.E)
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.route_top_k(logits, shape.K),
        "torch": lambda: compose(logits, shape.K),
        "torch-stable-sort": lambda: reference.route_top_k(logits, shape.K),
    }
    expected = reference.route_top_k(logits.double(), shape.K)
    return Case(run, lambda _, found: _distance(found, expected), 1e-5)


def _top_k_gradient(shape: Shape, T: int) -> Case:
    logits = untied(T, shape.E).requires_grad_()
    weight = normal(T, shape.K, seed=1, dtype=torch.float32)

    def gradient(route: Callable[[Tensor, int], Any], z: Tensor) -> Tensor:
        routing = route(z, shape.K)
        loss = (routing[1] * weight.to(z.dtype)).sum() + 1e-2 * routing[4] + 1e-3 * routing[5]
        return torch.autograd.grad(loss, z)[0]

    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: gradient(dk.route_top_k, logits),
        "torch": lambda: gradient(compose, logits),
        "torch-stable-sort": lambda: gradient(reference.route_top_k, logits),
    }
    expected = gradient(reference.route_top_k, logits.detach().double().requires_grad_())
    return Case(run, lambda _, found: _distance([found], [expected]), 1e-5)


def _soft_top_k(shape: Shape, T: int) -> Case:
    scores = normal(T, shape.E, seed=0, dtype=torch.float32)
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.soft_top_k(scores, shape.K, temperature=0.5),
        "bisection": lambda: reference.soft_top_k(scores, float(shape.K), temperature=0.5),
        "hard-topk": lambda: torch.zeros_like(scores).scatter_(1, torch.topk(scores, shape.K, dim=-1).indices, 1.0),
    }
    expected = reference.soft_top_k(scores.double(), float(shape.K), temperature=0.5)
    extra = {"hard-topk": {"note": "for scale: it is not differentiable"}}
    return Case(run, lambda _, found: _distance([found], [expected]), 1e-4, frozenset({"hard-topk"}), extra=extra)


def sort_histc(indices: Tensor, E: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dispatch as in transformers' grouped_mm experts: sort, histogram of floats, running sum."""
    ids, source = torch.sort(indices.reshape(-1), stable=True)
    count = torch.histc(ids.float(), bins=E, min=0, max=E - 1)
    offsets = torch.zeros(E + 1, dtype=torch.int32)
    offsets[1:] = torch.cumsum(count, 0, dtype=torch.int32)
    return source // indices.shape[1], source, offsets


def _dispatch(shape: Shape, T: int) -> Case:
    indices = routed_indices(T, shape.K, shape.E, seed=0)
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.dispatch_tokens(indices, shape.E),
        "torch-sort-bincount": lambda: reference.dispatch_tokens(indices, shape.E),
        "torch-sort-histc": lambda: sort_histc(indices, shape.E),
    }
    expected = reference.dispatch_tokens(indices, shape.E)
    return Case(run, lambda _, found: _distance(found, expected), 0.0)


def _groups() -> list[Group]:
    groups = []
    for prefix, T, rounds, budget in (("quick-", 256, 5, 1.0), ("", 4096, 11, 8.0)):
        shape = shapes.L3
        info = {"shape": f"T {T}, E {shape.E}, K {shape.K}", "dtype": "float32", "bytes": 4 * T * shape.E, "flops": 0}
        slots = {**info, "dtype": "int64", "bytes": 3 * 8 * T * shape.K}
        top_k = ("ours", "torch", "torch-stable-sort")
        groups += [
            Group(f"{prefix}route_top_k", top_k, partial(_top_k, shape, T), info, rounds, budget),
            Group(f"{prefix}route_top_k-gradient", top_k, partial(_top_k_gradient, shape, T), info, rounds, budget),
            Group(f"{prefix}soft_top_k", ("ours", "bisection", "hard-topk"), partial(_soft_top_k, shape, T), info, rounds, budget),
            Group(
                f"{prefix}dispatch",
                ("ours", "torch-sort-bincount", "torch-sort-histc"),
                partial(_dispatch, shape, T),
                slots,
                rounds,
                budget,
            ),
        ]
    return groups


@cases(_groups())
def test_routing(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
