"""First derivatives only: the backward passes here are formulas of their own, not graphs.

torch's ``once_differentiable`` refuses a second derivative only on ``.backward()``; ``torch.autograd.grad`` may pass by its error
node and return a number without this op's part. Here the gradients of a differentiable backward pass hang on a node that depends
on everything they were computed from, and that raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a function of these is differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def anchor(x: Tensor) -> Tensor | None:
    """Nothing [0, ...] that depends on x, an input and a saved tensor for a Function whose backward pass keeps only what was made
    from x: of a loss that is linear in its output, ``first_order`` would find nothing there that a second derivative hangs on."""
    return x[:0].clone() if wants_gradient(x) else None


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first ``count`` tensors as they are; the others only connect the graph."""
        ctx.name = name
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{ctx.name} has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


def first_order(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the backward of a Function: no graph, no autocast; a second derivative raises RuntimeError."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapped(ctx: Any, *grads: Tensor | None) -> Any:
            device = next((g.device.type for g in grads if g is not None), "cpu")
            casting = torch.is_autocast_enabled(device)
            if not torch.is_grad_enabled() and not casting:  # nearly always
                return backward(ctx, *grads)
            with torch.no_grad(), torch.autocast(device, enabled=False) if casting else nullcontext():
                result = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return result
            results = result if isinstance(result, tuple) else (result,)
            places = [n for n, r in enumerate(results) if r is not None]
            sources = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
            if not places or not sources:
                return result
            refused = _Refuse.apply(name, len(places), *(results[n] for n in places), *sources)
            out = list(results)
            for n, tensor in zip(places, refused, strict=True):
                out[n] = tensor
            return tuple(out)

        return wrapped

    return decorate
