"""Rounding: plan -> exactly balanced assignment, the paper's greedy found in parallel (eq. 2).

The greedy visits the pairs (neuron i, expert e) by descending score, equal scores in row-major order, and takes a pair if the
neuron is free and the expert has room. Under one strict order of the pairs this is the unique stable matching, so deferred
acceptance finds it: every free neuron proposes to the best expert that would still have it, every expert holds its best c_e
proposals so far and refuses the rest. A full expert's worst held pair is a threshold that only rises; a neuron below it need
not propose. About E rounds and 1-4 F proposals on balanced plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference
from ._checks import compute_dtype, require, require_float, require_same, require_tensor


def _deferred_acceptance(scores: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """expert_of [F] of scores [F, E], capacity [E] int64."""
    F, E = scores.shape
    lowest = np.array(-np.inf, dtype=scores.dtype)
    # a full expert's worst held pair; an expert without room refuses everybody
    worst = np.where(capacity > 0, lowest, np.array(np.inf, dtype=scores.dtype))
    worst_row = np.full(E, F, dtype=np.int64)
    count = np.zeros(E, dtype=np.int64)
    expert_of = np.full(F, -1, dtype=np.int64)
    free = np.arange(F)
    rows = scores  # the scores of the free neurons
    while free.size:
        open_to = rows > worst
        tie = rows == worst
        if tie.any():
            open_to |= tie & (free[:, None] < worst_row)
        choice = np.where(open_to, rows, lowest).argmax(1)  # the first of equals: row-major
        expert_of[free] = choice
        count += np.bincount(choice, minlength=E)
        refused = []
        for e in np.flatnonzero(count >= capacity):
            if capacity[e] == 0 or not (count[e] > capacity[e] or worst_row[e] == F):
                continue
            held = np.flatnonzero(expert_of == e)
            value = scores[held, e]
            if count[e] > capacity[e]:
                order = np.argsort(-value, kind="stable")  # equal scores: the lower row first
                refused.append(held[order[capacity[e] :]])
                last = order[capacity[e] - 1]
                count[e] = capacity[e]
            else:
                last = value.size - 1 - value[::-1].argmin()  # the last row of the lowest score
            worst[e], worst_row[e] = value[last], held[last]
        free = np.concatenate(refused) if refused else np.empty(0, dtype=np.int64)
        free.sort()
        rows = scores[free]
    return expert_of


def balanced_assignment(scores: Tensor, capacity: Tensor | Sequence[int] | None = None, *, return_gap: bool = False) -> Any:
    """Greedy rounding of a transport plan: exactly ``capacity[e]`` neurons to expert e.

    Args:
        scores: [..., F, E] floating point, any strides: preference on a log scale. Rank a plan by log_u + log_v + A / tau rather
            than by P, which saturates at 0 and 1 in float32 and makes false ties.
        capacity: [E] or [..., E] whole numbers summing to F, zero allowed. None: F / E each, the first F % E experts one more.
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
        limit = torch.full((E,), F // E, dtype=torch.int64)
        limit[: F % E] += 1
    else:
        given = torch.as_tensor(capacity).detach().cpu()
        require(tuple(given.shape) in ((E,), (*batch, E)), "capacity", f"of shape {list(given.shape)}", f"[{E}] or {[*batch, E]}")
        whole = not given.is_floating_point() or bool((given == given.round()).all())
        require(whole and given.dtype != torch.bool, "capacity", given.tolist(), "whole numbers of neurons")
        limit = given.to(torch.int64)
        require(bool((limit >= 0).all()), "capacity", limit.tolist(), "entries of at least 0")
        require(bool((limit.sum(-1) == F).all()), "capacity", f"summing to {limit.sum(-1).tolist()}", f"sum F = {F}")
    dense = scores.detach().to(compute_dtype(scores))
    require(bool(torch.isfinite(dense).all()), "scores", "NaN or infinite somewhere", "finite values")
    flat = dense.reshape(-1, F, E).cpu().contiguous().numpy()
    limits = limit.expand(*batch, E).reshape(-1, E).numpy()
    rounded = [_deferred_acceptance(s, c) for s, c in zip(flat, limits, strict=True)]
    expert_of = torch.from_numpy(np.stack(rounded) if rounded else np.empty((0, F), dtype=np.int64))
    expert_of = expert_of.view(*batch, F).to(scores.device)
    if not return_gap:
        return expert_of
    chosen = dense.gather(-1, expert_of[..., None])[..., 0]
    return expert_of, (dense.amax(-1) - chosen).sum(-1)


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
