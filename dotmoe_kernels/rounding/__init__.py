"""Rounding: plan -> exactly balanced assignment, the paper's greedy found in parallel (eq. 2).

The greedy visits the pairs (neuron i, expert e) by descending score, equal scores in row-major order, and takes a pair if the
neuron is free and the expert has room. Under one strict order of the pairs this is the unique stable matching, so deferred
acceptance finds it: every free neuron proposes to the best expert that would still have it, every expert holds its best c_e
proposals so far and refuses the rest. ``cpu.py`` does it in NumPy, ``gpu.py`` in one Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from .._backend import use_triton
from .._checks import compute_dtype, has_values, require, require_float, require_same, require_tensor
from . import cpu


def _on_host(scores: Tensor, capacity: Tensor) -> Tensor:
    """The same as the operator below, in NumPy."""
    dense = scores.to(compute_dtype(scores)).cpu().contiguous().numpy()
    rounded = [cpu.deferred_acceptance(s, c) for s, c in zip(dense, capacity.cpu().numpy(), strict=True)]
    expert_of = np.stack(rounded) if rounded else np.empty(dense.shape[:2], dtype=np.int64)
    return torch.from_numpy(expert_of).to(scores.device)


@torch.library.custom_op("dotmoe_kernels::balanced_assignment", mutates_args=())
def _balanced_assignment(scores: Tensor, capacity: Tensor) -> Tensor:
    """scores [L, F, E], capacity [L, E] int64 on the same device -> expert_of [L, F] int64."""
    if not use_triton(scores):
        return _on_host(scores, capacity)
    from .gpu import deferred_acceptance  # imports Triton

    return deferred_acceptance(scores, capacity)


@_balanced_assignment.register_fake
def _(scores: Tensor, capacity: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[:2], dtype=torch.int64)


def _limits(capacity: Tensor | Sequence[int] | None, batch: torch.Size, F: int, E: int, device: torch.device) -> Tensor:
    """The capacities [L, E] int64 on ``device``; their values are checked where that costs no synchronisation."""
    if capacity is None:
        limit = F // E + (torch.arange(E, device=device) < F % E).to(torch.int64)
    else:
        given = torch.as_tensor(capacity).detach()
        require(tuple(given.shape) in ((E,), (*batch, E)), "capacity", f"of shape {list(given.shape)}", f"[{E}] or {[*batch, E]}")
        real = given.dtype != torch.bool and not given.is_complex()
        require(real, "capacity", f"of dtype {given.dtype}", "whole numbers of neurons")
        if has_values(given):
            whole = not given.is_floating_point() or bool((given == given.round()).all())
            require(whole, "capacity", given.tolist(), "whole numbers of neurons")
            require(bool((given >= 0).all()), "capacity", given.tolist(), "entries of at least 0")
            require(bool((given.sum(-1) == F).all()), "capacity", f"summing to {given.sum(-1).tolist()}", f"sum F = {F}")
        limit = given.to(torch.int64).to(device, non_blocking=True)
    return limit.expand(*batch, E).reshape(-1, E)


def balanced_assignment(scores: Tensor, capacity: Tensor | Sequence[int] | None = None, *, return_gap: bool = False) -> Any:
    """Greedy rounding of a transport plan: exactly ``capacity[e]`` neurons to expert e.

    Args:
        scores: [..., F, E] floating point, any strides: preference on a log scale. Rank a plan by log_u + log_v + A / tau rather
            than by P, which saturates at 0 and 1 in float32 and makes false ties.
        capacity: [E] or [..., E] whole numbers summing to F, zero allowed. None: F / E each, the first F % E experts one more.
            In a CUDA graph None or a tensor on the GPU, whose values are not checked.
        return_gap: also return the certificate gap [...] = sum_i max_e score_ie - sum_i score_i,expert(i) >= 0, which bounds
            the loss against the best assignment, in the units of ``scores``.

    Returns:
        expert_of [..., F] int64, or (expert_of, gap).

    Raises:
        ValueError: a wrong rank or dtype, NaN or infinite scores (CPU tensors), capacities that are fractional, negative or do
            not sum to F, and more experts than neurons without a ``capacity``.

    Gradient: none; see ``straight_through``.

    Source: eq. 2 of DOT-MoE (arXiv 2606.01666); deferred acceptance: Gale and Shapley 1962.
    """
    require_float(scores, "scores", 2, "[..., F, E]", at_least=True)
    batch, (F, E) = scores.shape[:-2], scores.shape[-2:]
    require(F >= 1 and E >= 1, "scores", f"of shape {list(scores.shape)}", "at least one neuron and one expert")
    if capacity is None:
        require(E <= F, "scores", f"of shape {list(scores.shape)}", f"at most as many experts as neurons, E <= F = {F}")
    limit = _limits(capacity, batch, F, E, scores.device)
    scores = scores.detach()
    if has_values(scores):
        require(bool(torch.isfinite(scores).all()), "scores", "NaN or infinite somewhere", "finite values")
    # the first call of any operator imports torch's compiler, which takes seconds
    as_operator = use_triton(scores) or torch.compiler.is_compiling()
    expert_of = (_balanced_assignment if as_operator else _on_host)(scores.reshape(-1, F, E), limit).view(*batch, F)
    if not return_gap:
        return expert_of
    dtype = compute_dtype(scores)
    chosen = scores.gather(-1, expert_of.clamp(min=0)[..., None])[..., 0]
    return expert_of, (scores.amax(-1).to(dtype) - chosen.to(dtype)).sum(-1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Forward ``hard``, backward ``soft``: hard + (soft - sg soft) (eq. 3).

    Args:
        hard: any shape and dtype, the values.
        soft: floating point, the shape of ``hard``; receives the gradient as it comes.

    Returns:
        The values of ``hard`` in the dtype of ``soft``.

    Raises:
        ValueError: different shapes or devices, a ``soft`` that is not floating point.

    Source: eq. 3 of DOT-MoE (arXiv 2606.01666); Bengio et al. 2013 (arXiv 1308.3432).
    """
    require_tensor(hard, "hard", "[...]")
    require_float(soft, "soft", 0, "[...]", at_least=True)
    require(hard.shape == soft.shape, "hard", f"of shape {list(hard.shape)}", f"the shape of soft, {list(soft.shape)}")
    require_same(hard, "hard", soft, "soft", dtype=False)
    return reference.straight_through(hard, soft)
