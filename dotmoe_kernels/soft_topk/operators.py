"""LapSum's kernels as torch operators, one a pass; Triton is imported when one is first called.

dotmoe_kernels::soft_top_k            scores [T, E], k [T], temperature [T] -> p [T, E], solution [T, 2]
dotmoe_kernels::soft_top_k_backward   dL/dp -> dscores, dk, dtemperature
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("dotmoe_kernels::soft_top_k", mutates_args=())
def soft_top_k_op(scores: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """scores [T, E], k and temperature [T] float64 -> p [T, E] float32; (pivot, offset) [T, 2] float64, whose sum is b."""
    from .gpu import forward

    return forward(scores, k, temperature)


@soft_top_k_op.register_fake
def _(scores: Tensor, k: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.float32), k.new_empty((scores.shape[0], 2))


@torch.library.custom_op("dotmoe_kernels::soft_top_k_backward", mutates_args=())
def soft_top_k_backward_op(scores: Tensor, temperature: Tensor, solution: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dscores [T, E] in the dtype of the scores, dk [T], dtemperature [T] float64."""
    from .gpu import backward

    return backward(scores, temperature, solution, grad)


@soft_top_k_backward_op.register_fake
def _(scores: Tensor, temperature: Tensor, solution: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T = scores.shape[0]
    return scores.new_empty(scores.shape), solution.new_empty((T,)), solution.new_empty((T,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, temperature = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, temperature, output[1])


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    scores, temperature, solution = ctx.saved_tensors
    return soft_top_k_backward_op(scores, temperature, solution.detach(), grad)


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("soft_top_k has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


soft_top_k_op.register_autograd(_backward, setup_context=_save)
soft_top_k_backward_op.register_autograd(_refuse)
