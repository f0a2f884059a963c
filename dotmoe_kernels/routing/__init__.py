"""Routing: router logits Z [T, E] -> K experts a token, their weights, the load and the two routing losses (eq. 3 and 5).

    Q = softmax(Z);  R = top-K mask of Z;  R_ste = R + (Q - sg Q)
    balance = E sum_e load_e mean_t Q_te;  z = mean_t logsumexp(Z_t)^2

Zero experts (ZEDA) are further columns whose choice is an empty slot; the balance is then one of two groups:

    balance = (E + w N) (load_E Q_E / E + load_N Q_N / (w N)),  load and mean Q summed over the E experts and the N zero experts

Everything in float32 (float64 for float64 logits). Cost: one read of Z.

    cpu         PyTorch: top-K                gpu        Triton: top_k, and SoftMoE: soft
    operators   the kernels as torch ops      budgets    the soft router's options: experts a token, by layer
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from math import inf

import torch
from torch import Tensor

from .._autograd import wants_gradient
from .._backend import is_direct, is_plain, use_triton
from .._checks import (
    Passed,
    compute_dtype,
    has_values,
    is_integer,
    is_number,
    refuse,
    require,
    require_finite,
    require_float,
    require_mask,
)
from ..reference import Routing
from ..soft_topk import MOST_EXPERTS, row_values, solve_soft_top_k
from .budgets import SoftRouter
from .cpu import RouteTopK, count_experts, route, top_indices
from .operators import choose_top_k_op, route_soft_top_k_op, route_top_k_op

_WEIGHTS = ("unit", "softmax", "renormalized")
_passed = Passed()


def _check_mask(mask: Tensor | None, logits: Tensor) -> Tensor | None:
    if mask is None:
        return None
    valid = require_mask(mask, "mask", (logits.shape[0],), "[T]")
    require(valid.device == logits.device, "mask", f"on {valid.device}", f"the device of the logits, {logits.device}")
    return valid


def _without_padding(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Padding rows zero: whatever one holds, NaN included, stays out of values and gradients."""
    return logits if mask is None else torch.where(mask[:, None], logits, 0)


def _on_chip(logits: Tensor) -> bool:
    """Whether the kernels take these logits [T, E]; float64 and wider rows take the PyTorch route, on a GPU too."""
    return use_triton(logits) and logits.dtype != torch.float64 and logits.shape[1] <= MOST_EXPERTS


def _finish(z: Tensor, q: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, mask: Tensor | None) -> Routing:
    """Load and losses over the valid tokens. z, q, probs [T, E]; indices, weights [T, K]; an empty slot is E."""
    T, E = z.shape
    if mask is not None:
        indices = torch.where(mask[:, None], indices, E)
        weights = torch.where(mask[:, None], weights, 0)
        q = torch.where(mask[:, None], q, 0)
    count = count_experts(indices, E).to(z.dtype)
    load = count / count.sum().clamp(min=1)
    tokens = mask.sum().clamp(min=1) if mask is not None else max(T, 1)
    lse_squared = torch.logsumexp(z, -1) ** 2  # [T]
    if mask is not None:
        lse_squared = torch.where(mask, lse_squared, 0)
    return Routing(indices, weights, probs, load, E * torch.dot(load, q.sum(0)) / tokens, lse_squared.sum() / tokens)


def _group_balance(load: Tensor, mean: Tensor, count: int, share: float) -> Tensor:
    """Of the experts and the last ``count`` columns, the zero experts."""
    E, N = len(load) - count, share * count
    return (E + N) * (load[:E].sum() * mean[:E].sum() / E + load[E:].sum() * mean[E:].sum() / N)


def balance_of(routing: Routing, load: Tensor, *, soft: bool = False, num_zero_experts: int = 0, zero_share: float = 2.0) -> Tensor:
    """The balance loss of ``routing``, none of whose tokens is padding, with another load than its own: that of more tokens.

    Args:
        load: [E], as ``routing.load``; constant.
        soft: the routing is of ``route_soft_top_k``.
        num_zero_experts, zero_share: as of ``route_top_k``.

    Gradient: to probs.
    """
    q = routing.probs / routing.probs.sum(-1, keepdim=True) if soft else routing.probs
    mean = q.sum(0) / max(len(q), 1)
    if num_zero_experts:
        return _group_balance(load, mean, num_zero_experts, zero_share)
    return len(load) * torch.dot(load, mean)


def _with_zero_experts(routing: Routing, count: int, share: float, mask: Tensor | None) -> Routing:
    """Of a routing over experts and zero experts: choosing one of the last ``count`` is an empty slot."""
    E = routing.probs.shape[1] - count
    q = routing.probs if mask is None else torch.where(mask[:, None], routing.probs, 0)
    tokens = max(len(q), 1) if mask is None else mask.sum().clamp(min=1)
    balance = _group_balance(routing.load, q.sum(0) / tokens, count, share)
    weights = torch.where(routing.indices < E, routing.weights, 0)
    return routing._replace(indices=routing.indices.clamp(max=E), weights=weights, balance_loss=balance)


def route_top_k(
    router_logits: Tensor,
    top_k: int,
    *,
    weights: str = "unit",
    mask: Tensor | None = None,
    num_zero_experts: int = 0,
    zero_share: float = 2.0,
) -> Routing:
    """The ``top_k`` largest logits of each token, ties to the lower index.

    Args:
        router_logits: [T, E] floating point; computed in float32 (float64 for float64).
        top_k: experts a token, 1 <= top_k <= E.
        weights: of the selected experts: "unit" is 1 with the gradient of the softmax (straight-through), "softmax" is Q,
            "renormalized" is Q over its sum among the selected.
        mask: [T] bool, or integers 0 and 1, true for a valid token; a padding token gets empty slots (index E, weight 0), counts
            nowhere, and its row may hold anything.
        num_zero_experts: N, how many of the last columns are zero experts, whose output is 0; E is then the number of the others,
            and choosing one is an empty slot (index E, weight 0).
        zero_share: w of the balance of the two groups, which is least, 1, where w N / (w N + E) of the slots are empty.

    Returns:
        Routing(indices [T, K] int64 best first, weights [T, K], probs Q [T, E], load [E] summing to 1, balance_loss [],
        z_loss []); the losses are unscaled means over the valid tokens and 0 without any. Q and load have all E + N columns.

    Raises:
        ValueError: a wrong rank, dtype or mask, top_k outside [1, E], an unknown ``weights``, no column that is no zero expert, a
            zero_share that is not positive, NaN or infinite logits (CPU).

    Gradient: to ``router_logits`` from weights (the selected experts only), probs and both losses; the load has none.

    Source: eq. 3 and 5 of DOT-MoE (arXiv 2606.01666); balance: Switch Transformer (arXiv 2101.03961); z: ST-MoE
    (arXiv 2202.08906); zero experts: ZEDA (arXiv 2605.18643).
    """
    signature = is_plain(router_logits, mask) and (
        *(router_logits.shape, router_logits.dtype, top_k, type(top_k), weights),
        *(num_zero_experts, type(num_zero_experts), zero_share, type(zero_share)),
    )
    if not signature or signature not in _passed:
        _check_top_k(router_logits, top_k, weights, num_zero_experts, zero_share)
        if signature:
            _passed.add(signature)
    top_k, valid = int(top_k), _check_mask(mask, router_logits)
    routing = _route_top_k(router_logits, top_k, weights, valid, finite=True)
    return _with_zero_experts(routing, int(num_zero_experts), float(zero_share), valid) if num_zero_experts else routing


def _check_top_k(router_logits: Tensor, top_k: int, weights: str, num_zero_experts: int, zero_share: float) -> None:
    """The arguments of ``route_top_k`` fit each other."""
    require_float(router_logits, "router_logits", 2, "[T, E]")
    E = router_logits.shape[1]
    if not is_integer(top_k) or not 1 <= top_k <= E:
        refuse("top_k", repr(top_k), f"an integer from 1 to E = {E}")
    if weights not in _WEIGHTS:
        refuse("weights", repr(weights), " | ".join(_WEIGHTS))
    if not is_integer(num_zero_experts) or not 0 <= num_zero_experts < max(E, 1):
        refuse("num_zero_experts", repr(num_zero_experts), f"an integer from 0 to {max(E - 1, 0)}, below the columns of the logits")
    if not (is_number(zero_share) and 0 < zero_share < inf):
        refuse("zero_share", repr(zero_share), "a positive number")


def _route_top_k(router_logits: Tensor, top_k: int, weights: str, valid: Tensor | None, *, finite: bool) -> Routing:
    """The arguments are checked; ``finite``: so are the values of the logits."""
    if _on_chip(router_logits):
        if is_direct(router_logits, valid):
            from .gpu.top_k import forward

            chosen, indices, probs, load, losses, _ = forward(router_logits, valid, top_k, weights)
            return Routing(indices, chosen, probs, load, losses[0], losses[1])
        chosen, indices, probs, load, losses, _ = route_top_k_op(router_logits, valid, top_k, weights)
        return Routing(indices, chosen, probs, load.detach(), losses[0], losses[1])
    router_logits = _without_padding(router_logits, valid)
    if finite:
        require_finite(router_logits, "router_logits")
    device = router_logits.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        z = router_logits if router_logits.dtype == torch.float32 else router_logits.to(compute_dtype(router_logits))
        if z.requires_grad and torch.is_grad_enabled():
            return Routing(*RouteTopK.apply(z, valid, top_k, weights))
        return Routing(*route(z, valid, top_k, weights)[0])


def route_soft_top_k(
    scores: Tensor,
    k: float | Tensor,
    *,
    temperature: float | Tensor,
    threshold: float,
    max_active: int,
    mask: Tensor | None = None,
) -> Routing:
    """SoftMoE: p = LapSum(scores, k); the experts with p > threshold, at least one and at most ``max_active``, weighted by p.

    Args:
        scores: [T, E] raw router scores, floating point.
        k: expected number of experts a token, in (0, E): a float or a tensor [] or [T].
        temperature: LapSum's alpha > 0, a float or a tensor [] or [T].
        threshold: theta in [0, 1); constant in the backward, no renormalisation.
        max_active: K, slots a token, 1 <= max_active <= E.
        mask: [T], true for a valid token.

    Returns:
        Routing(indices [T, K] int64, weights [T, K], probs p [T, E], load, balance_loss, z_loss); an unused slot has index E and
        weight 0. The balance loss takes p over its sum for Q.

    Raises:
        ValueError: as ``soft_top_k`` and ``route_top_k``; a threshold outside [0, 1), max_active outside [1, E].

    Gradient: to scores, k and temperature from weights, probs and losses, with the selection held constant.

    Source: SoftMoE (arXiv 2606.17952).
    """
    require_float(scores, "scores", 2, "[T, E]")
    E = scores.shape[1]
    require(is_integer(max_active) and 1 <= max_active <= E, "max_active", max_active, f"an integer from 1 to E = {E}")
    require(is_number(threshold) and 0 <= threshold < 1, "threshold", threshold, "a number in [0, 1)")
    return _route_soft_top_k(scores, k, temperature, threshold, int(max_active), _check_mask(mask, scores), finite=True)


def _route_soft_top_k(
    scores: Tensor,
    k: float | Tensor,
    temperature: float | Tensor,
    threshold: float,
    max_active: int,
    valid: Tensor | None,
    *,
    finite: bool,
) -> Routing:
    """The arguments are checked; ``finite``: so are the values of the scores."""
    E = scores.shape[1]
    if _on_chip(scores):
        ks, temperatures = row_values(scores, k, temperature)
        given = scores, ks, temperatures, valid
        if is_direct(*given):
            from .gpu.soft import forward

            run: Callable[..., tuple[Tensor, ...]] = forward
        else:
            run = route_soft_top_k_op
        chosen, indices, p, load, losses, _, _ = run(*given, float(threshold), max_active)
        return Routing(indices, chosen, p, load.detach(), losses[0], losses[1])
    scores = _without_padding(scores, valid)
    if finite:
        require_finite(scores, "scores")
    p = solve_soft_top_k(scores, *row_values(scores, k, temperature))  # [T, E]
    z = scores.to(compute_dtype(scores))
    indices = top_indices(z.detach(), max_active)
    chosen = p.gather(1, indices)
    keep = chosen.detach() > threshold
    keep[:, :1] = True
    q = p / p.sum(-1, keepdim=True)
    return _finish(z, q, p, torch.where(keep, indices, E), torch.where(keep, chosen, 0), valid)


def route_soft(logits: Tensor, router: SoftRouter, *, mask: Tensor | None = None) -> Routing:
    """``route_soft_top_k`` with the options of ``router``."""
    k, temperature, threshold, max_active = router
    return route_soft_top_k(logits, k, temperature=temperature, threshold=threshold, max_active=max_active, mask=mask)


def choose(logits: Tensor, top_k: int, soft: SoftRouter | None, num_zero_experts: int = 0) -> tuple[Tensor, Tensor]:
    """A model's router: (weights [T, K], indices [T, K]) as ``route_soft``, or as ``route_top_k`` with unit weights without a soft
    router, of logits that may be NaN. Such a token gets some experts, whose outputs are then NaN for it alone, as in a dense model.

    Probabilities, load and losses are not computed where nobody can ask for a gradient."""
    if soft is not None:
        routing = _route_soft_top_k(logits, *soft, None, finite=False)
        return routing.weights, routing.indices
    E = logits.shape[1] - num_zero_experts
    if _on_chip(logits) and not wants_gradient(logits):
        if is_direct(logits):
            from .gpu.top_k import choose as launch

            return launch(logits, top_k, E)
        return choose_top_k_op(logits, top_k, E)
    if has_values(logits) and not wants_gradient(logits) and not use_triton(logits):
        indices = top_indices(logits, top_k)
        weights = logits.new_ones(indices.shape)
        return (weights.masked_fill_(indices >= E, 0), indices.clamp_(max=E)) if num_zero_experts else (weights, indices)
    routing = _route_top_k(logits, top_k, "unit", None, finite=False)
    if num_zero_experts:
        routing = _with_zero_experts(routing, num_zero_experts, 1.0, None)
    return routing.weights, routing.indices
