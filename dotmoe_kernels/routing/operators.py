"""The routing kernels as torch operators, one a pass; Triton is imported when one is first called.

dotmoe_kernels::route_top_k            logits -> weights, indices, probs, load, losses, and what the backward needs
dotmoe_kernels::choose_top_k           logits -> unit weights and indices alone, without a gradient
dotmoe_kernels::route_top_k_backward   gradients of weights, probs and both losses -> dlogits
dotmoe_kernels::route_soft_top_k       the same two for SoftMoE
dotmoe_kernels::route_soft_top_k_backward

``losses`` is [3] float32: balance, z, and the number of valid tokens. A padding token is known by its empty slots (index E).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _empty(logits: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, E = logits.shape

    def new(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    return new(T, slots), logits.new_empty((T, slots), dtype=torch.int64), new(T, E), new(E), new(3), new(T)


@torch.library.custom_op("dotmoe_kernels::route_top_k", mutates_args=())
def route_top_k_op(
    logits: Tensor, mask: Tensor | None, top_k: int, weights: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> weights [T, K], indices [T, K] int64, probs [T, E], load [E], losses [3], logsumexp [T], all float32."""
    from .gpu.top_k import forward

    return forward(logits, mask, top_k, weights)


@route_top_k_op.register_fake
def _(logits: Tensor, mask: Tensor | None, top_k: int, weights: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(logits, top_k)


@torch.library.custom_op("dotmoe_kernels::choose_top_k", mutates_args=())
def choose_top_k_op(logits: Tensor, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
    """-> weights [T, K] float32, indices [T, K] int64; a choice from column ``experts`` on is an empty slot of that index."""
    from .gpu.top_k import choose

    return choose(logits, top_k, experts)


@choose_top_k_op.register_fake
def _(logits: Tensor, top_k: int, experts: int) -> tuple[Tensor, Tensor]:
    return _empty(logits, top_k)[:2]


@torch.library.custom_op("dotmoe_kernels::route_top_k_backward", mutates_args=())
def route_top_k_backward_op(
    logits: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
    mode: str,
) -> Tensor:
    """-> dlogits [T, E] in the dtype of the logits."""
    from .gpu.top_k import backward

    return backward(logits, indices, load, losses, lse, dweights, dprobs, dlosses, mode)


@route_top_k_backward_op.register_fake
def _(
    logits: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
    mode: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, _, ctx.mode = inputs
    _, indices, _, load, losses, lse = output
    ctx.mark_non_differentiable(indices, load, lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, indices, load, losses, lse)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweights, _, dprobs, _, dlosses, _ = grads
    if dweights is None and dprobs is None and dlosses is None:
        return None, None, None, None
    logits, *saved = ctx.saved_tensors
    saved = [t.detach() for t in saved]
    return route_top_k_backward_op(logits, *saved, dweights, dprobs, dlosses, ctx.mode), None, None, None


@torch.library.custom_op("dotmoe_kernels::route_soft_top_k", mutates_args=())
def route_soft_top_k_op(
    scores: Tensor, k: Tensor, temperature: Tensor, mask: Tensor | None, threshold: float, max_active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``route_top_k`` with the soft p for probs, and the solution [T, 2] float64 of LapSum; k and temperature [T] float64."""
    from .gpu.soft import forward

    return forward(scores, k, temperature, mask, threshold, max_active)


@route_soft_top_k_op.register_fake
def _(
    scores: Tensor, k: Tensor, temperature: Tensor, mask: Tensor | None, threshold: float, max_active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return *_empty(scores, max_active), k.new_empty((scores.shape[0], 2))


@torch.library.custom_op("dotmoe_kernels::route_soft_top_k_backward", mutates_args=())
def route_soft_top_k_backward_op(
    scores: Tensor,
    temperature: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    solution: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dscores [T, E] in the dtype of the scores, dk and dtemperature [T] float64."""
    from .gpu.soft import backward

    return backward(scores, temperature, indices, load, losses, lse, solution, dweights, dprobs, dlosses)


@route_soft_top_k_backward_op.register_fake
def _(
    scores: Tensor,
    temperature: Tensor,
    indices: Tensor,
    load: Tensor,
    losses: Tensor,
    lse: Tensor,
    solution: Tensor,
    dweights: Tensor | None,
    dprobs: Tensor | None,
    dlosses: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    T = scores.shape[0]
    return scores.new_empty(scores.shape), solution.new_empty((T,)), solution.new_empty((T,))


def _save_soft(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, _, temperature, *_ = inputs
    _, indices, _, load, losses, lse, solution = output
    ctx.mark_non_differentiable(indices, load, lse, solution)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(scores, temperature, indices, load, losses, lse, solution)


def _backward_soft(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweights, _, dprobs, _, dlosses, _, _ = grads
    if dweights is None and dprobs is None and dlosses is None:
        return (None,) * 6
    scores, temperature, *saved = ctx.saved_tensors
    saved = [t.detach() for t in saved]
    return *route_soft_top_k_backward_op(scores, temperature, *saved, dweights, dprobs, dlosses), None, None, None


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("routing has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


route_top_k_op.register_autograd(_backward, setup_context=_save)
route_soft_top_k_op.register_autograd(_backward_soft, setup_context=_save_soft)
route_top_k_backward_op.register_autograd(_refuse)
route_soft_top_k_backward_op.register_autograd(_refuse)
