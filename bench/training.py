"""Forward and backward of the routed FFN by everybody: gradients to x, to all weights and to the routing weights.

A step is a forward call and the leaves of its gradients. The sparse ones are compared with float64 in full; the dense FFN, which
answers another question and has gradients to all of its weights, by a few tokens and a few neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

import dotmoe_kernels as dk
from bench.experts import (
    dense_merged,
    dense_out_of_place,
    ends,
    library_call,
    relative_error,
    silu_and_mul,
    stock_experts,
    without_transformers,
)
from bench.memory import kept_bytes
from bench.paired import OURS, Case
from bench.shapes import Shape
from dotmoe_kernels import reference

_TRANSFORMERS = ("eager", "grouped_mm", "sonicmoe")
_LIBRARIES = ("liger", "scattermoe")
IMPLS = (OURS, "ours-recompute", "dense", "dense-merged", *(f"transformers-{name}" for name in _TRANSFORMERS), *_LIBRARIES)


class Inputs(NamedTuple):
    """x and dy [T, H]; indices, distinct, and routing weights [T, K]"""

    x: Tensor
    dy: Tensor
    indices: Tensor
    routing: Tensor


@dataclass(frozen=True)
class Step:
    forward: Callable[[], Tensor]
    leaves: list[Tensor]

    def __call__(self, dy: Tensor) -> list[Tensor]:
        """y and the gradients"""
        y = self.forward()
        return [y, *torch.autograd.grad(y, self.leaves, dy)]


def steps(
    shape: Shape,
    w: dict[str, Tensor],
    inputs: Inputs,
    impls: tuple[str, ...] = IMPLS,
    swiglu: Callable[[Tensor], Tensor] = silu_and_mul,
) -> tuple[dict[str, Step], dict[str, str]]:
    """(steps, reasons of those without). w: of ``experts.layouts``; ``swiglu`` is that of "dense-merged"."""
    x, routing = (t.detach().requires_grad_() for t in (inputs.x, inputs.routing))
    leaf = {name: t.detach().requires_grad_() for name, t in w.items()}
    gate, up, dense_down = leaf["gate"], leaf["up"], leaf["dense_down"]
    ours = partial(dk.expert_ffn, x, leaf["gate_up"], leaf["down"], inputs.indices, routing)
    own = [x, leaf["gate_up"], leaf["down"], routing]
    found = {
        OURS: Step(ours, own),
        "ours-recompute": Step(partial(ours, recompute=True), own),
        "dense": Step(partial(dense_out_of_place, x, gate, up, dense_down), [x, gate, up, dense_down]),
        "dense-merged": Step(partial(dense_merged, x, leaf, swiglu), [x, leaf["dense_gate_up"], dense_down]),
    }
    skipped = {}
    for name in _TRANSFORMERS:
        impl = f"transformers-{name}"
        if impl not in impls:
            continue
        if reason := without_transformers(name, shape, len(x)):
            skipped[impl] = reason
            continue
        module = stock_experts(shape, w, name).requires_grad_(True)
        found[impl] = Step(partial(module, x, inputs.indices, routing), [x, module.gate_up_proj, module.down_proj, routing])
    for name in _LIBRARIES:
        call = library_call(name, x, leaf, inputs.indices, routing)
        if isinstance(call, str):
            skipped[name] = call
        else:
            found[name] = Step(call, [x, leaf["gate_up"], leaf["down_stock"], routing])
    return {name: found[name] for name in impls if name in found}, {name: skipped[name] for name in impls if name in skipped}


def gradient_bytes(shape: Shape, T: int, itemsize: int) -> int:
    """Of the sparse FFN's gradients: x, both weights, routing weights. They are part of everybody's peak."""
    return itemsize * (3 * shape.F * shape.H + T * (shape.H + shape.K))


def case(
    shape: Shape,
    w: dict[str, Tensor],
    inputs: Inputs,
    impls: tuple[str, ...] = IMPLS,
    *,
    tolerance: float,
    swiglu: Callable[[Tensor], Tensor] = silu_and_mul,
) -> Case:
    found, skipped = steps(shape, w, inputs, impls, swiglu)
    return Case(
        {name: partial(step, inputs.dy) for name, step in found.items()},
        judge(w, inputs),
        tolerance,
        skipped=skipped,
        kept={name: partial(kept_bytes, step.forward, [*w.values(), *inputs]) for name, step in found.items()},
    )


# --- the values --------------------------------------------------------------------------------------------------------


def expected_sparse(w: dict[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """y and the gradients in float64, an expert at a time."""
    x, dy, indices, routing = inputs
    wide = [torch.zeros(t.shape, dtype=torch.float64, device=x.device) for t in (x, x, w["gate_up"], w["down"], routing)]
    y, dx, dgate_up, ddown, drouting = wide
    for e in range(len(dgate_up)):
        row, slot = (indices == e).nonzero(as_tuple=True)
        narrow = (x[row], w["gate_up"][e : e + 1], w["down"][e : e + 1], routing[row, slot][:, None])
        leaves = [t.double().requires_grad_() for t in narrow]
        a, gate_up, down, weight = leaves
        only = torch.zeros(weight.shape, dtype=torch.int64, device=x.device)
        out = reference.expert_ffn(a, gate_up, down, only, weight, activation=functional.silu)
        gradients = torch.autograd.grad(out, leaves, dy[row].double())
        y[row] += out.detach()
        dx[row] += gradients[0]
        dgate_up[e], ddown[e] = gradients[1][0], gradients[2][0]
        drouting[row, slot] = gradients[3][:, 0]
    return wide


def expected_dense(w: dict[str, Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and dx of a few tokens; the gradients to gate, up and down of a few neurons: y is a sum over the neurons."""
    few, neurons = ends(len(x)), ends(len(w["gate"]))
    token = x[few].double().requires_grad_()
    y = dense_out_of_place(token, *(w[name].double() for name in ("gate", "up", "dense_down")))
    gate, up, down = (t.double().requires_grad_() for t in (w["gate"][neurons], w["up"][neurons], w["dense_down"][:, neurons]))
    part = dense_out_of_place(x.double(), gate, up, down)
    return [y.detach(), *torch.autograd.grad(y, token, dy[few].double()), *torch.autograd.grad(part, [gate, up, down], dy.double())]


def judge(w: dict[str, Tensor], inputs: Inputs) -> Callable[[str, Any], float]:
    """The largest relative error among y and the gradients; what is not finite anywhere is infinitely wrong."""
    sparse, dense = expected_sparse(w, inputs), expected_dense(w, inputs.x, inputs.dy)
    few, neurons = ends(len(inputs.x)), ends(len(w["gate"]))

    def error(name: str, found: list[Tensor]) -> float:
        if not all(bool(t.isfinite().all()) for t in found):
            return float("inf")
        if not name.startswith("dense"):
            return max(relative_error(a, b) for a, b in zip(found, sparse, strict=True))
        y, dx, *gradients = found
        gate, up, down = gradients if len(gradients) == 3 else (*gradients[0].chunk(2), gradients[1])
        parts = [y[few], dx[few], gate[neurons], up[neurons], down[:, neurons]]
        return max(relative_error(a, b) for a, b in zip(parts, dense, strict=True))

    return error
