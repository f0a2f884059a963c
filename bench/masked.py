"""One layer's step of alignment: forward, and backward to the input, the plan and the router, the weights frozen.

ours            ``masked_ffn``; "ours-recompute" keeps x instead of gate and up; "ours-all-products" does not know that the experts
                are of equal width, so that on a GPU it multiplies the mask's zeros as well
eager           the same in plain PyTorch, with the mask R M^T as a product [T, F]
frozen-dense    the dense FFN forward and backward to its input: what a step must cost at least, were nothing learned
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import dotmoe_kernels as dk
from bench.experts import DTYPES, dense_out_of_place, ends, relative_error
from bench.gpu.experts import draw, draw_indices
from bench.paired import OURS, Case
from bench.shapes import Shape
from dotmoe_kernels import reference
from tests.shapes import balanced_expert_of

IMPLS = (OURS, "ours-recompute", "eager", "frozen-dense")
GPU_IMPLS = (OURS, "ours-recompute", "ours-all-products", "eager", "frozen-dense")


def ours(x: Tensor, plan: Tensor, probs: Tensor, dy: Tensor, *fixed: Tensor, recompute: bool = False, balanced: bool = True) -> Any:
    """fixed: gate, up [F, H], down [H, F], expert_of [F], indices [T, K]"""
    y = dk.masked_ffn(x, *fixed, plan=plan, probs=probs, recompute=recompute, balanced=balanced)
    return torch.autograd.grad(y, [x, plan, probs], dy)


def eager(x: Tensor, plan: Tensor, probs: Tensor, dy: Tensor, *fixed: Tensor) -> Any:
    y = reference.masked_ffn(x, *fixed, plan=plan, probs=probs, activation=functional.silu)
    return torch.autograd.grad(y, [x, plan, probs], dy)


def frozen_dense(x: Tensor, dy: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Any:
    return torch.autograd.grad(dense_out_of_place(x, gate, up, down), [x], dy)


class Inputs(NamedTuple):
    """Tokens and their gradient [T, H], plan [F, E], probs [T, E], gate, up [F, H], down [H, F], expert_of [F], indices [T, K]"""

    x: Tensor
    dy: Tensor
    plan: Tensor
    probs: Tensor
    weights: tuple[Tensor, Tensor, Tensor]
    routed: tuple[Tensor, Tensor]


def inputs(shape: Shape, T: int, dtype: str, device: str) -> Inputs:
    made = partial(draw, device=device, dtype=DTYPES[dtype])
    soft = partial(draw, device=device, dtype=torch.float32)
    gate, up = (made(shape.F, shape.H, seed=seed, scale=shape.H**-0.5) for seed in (0, 1))
    weights = gate, up, made(shape.H, shape.F, seed=2, scale=shape.F**-0.5)
    routed = balanced_expert_of(shape.F, shape.E, seed=6).to(device), draw_indices(T, shape, device)
    plan, probs = (soft(rows, shape.E, seed=seed).softmax(-1).requires_grad_() for rows, seed in ((shape.F, 7), (T, 8)))
    return Inputs(made(T, shape.H, seed=3).requires_grad_(), made(T, shape.H, seed=5), plan, probs, weights, routed)


def calls_of(i: Inputs) -> dict[str, Callable[[], Any]]:
    learning = i.x, i.plan, i.probs, i.dy
    return {
        OURS: partial(ours, *learning, *i.weights, *i.routed),
        "ours-recompute": partial(ours, *learning, *i.weights, *i.routed, recompute=True),
        "ours-all-products": partial(ours, *learning, *i.weights, *i.routed, balanced=False),
        "eager": partial(eager, *learning, *i.weights, *i.routed),
        "frozen-dense": partial(frozen_dense, i.x, i.dy, *i.weights),
    }


def calls(shape: Shape, T: int, dtype: str, device: str) -> dict[str, Callable[[], Any]]:
    return calls_of(inputs(shape, T, dtype, device))


def case(shape: Shape, T: int, dtype: str, device: str) -> Case:
    given = inputs(shape, T, dtype, device)
    # the plan's gradient is a sum over all tokens, so the reference takes them all: 16 bits in float32, that in float64
    wide = torch.float64 if dtype == "float32" else torch.float32
    x, plan, probs = (t.detach().to(wide).requires_grad_() for t in (given.x, given.plan, given.probs))
    gate, up, down = (w.to(wide) for w in given.weights)
    expected = eager(x, plan, probs, given.dy.to(wide), gate, up, down, *given.routed)
    rows = ends(T)
    few = x.detach()[rows].requires_grad_()
    expected_dense = frozen_dense(few, given.dy[rows].to(wide), gate, up, down)

    def error(name: str, found: Any) -> float:
        if name == "frozen-dense":
            return relative_error(found[0][rows], expected_dense[0])
        distance = max(relative_error(a, b) for a, b in zip(found, expected, strict=True))
        return distance if distance == distance else float("inf")

    return Case(calls_of(given), error, 1e-5 if dtype == "float32" else 5e-2)


def info(shape: Shape, T: int, dtype: str) -> dict[str, Any]:
    """The frozen dense FFN forward and backward to its input; every weight read twice."""
    size = DTYPES[dtype].itemsize
    return {
        "shape": f"T {T}, {shape}",
        "dtype": dtype,
        "flops": 12 * T * shape.F * shape.H,
        "bytes": size * (6 * shape.F * shape.H + 4 * T * shape.H) + 8 * (shape.F + T) * shape.E,
    }
