"""Masked experts: the whole permuted FFN as one dense product, the experts that a token did not choose set to zero.

``masked_view_ffn`` runs the routed FFN that way, for batches whose experts' union is everything: the dense product then reads the
same weights with less overhead. ``masked_ffn`` is the forward that alignment learns through (eq. 4),

    Y^ = (U * (R_ste M_ste^T)) Wd^T,  U = act(X Wg^T) * (X Wu^T),

in the neurons' first order. M is one-hot in the forward, so R M^T is a gather R[:, expert_of]. Backward, after dU^ = dY Wd:

    dG = dU^ * U [T, F];  dQ_te = sum_{i in e} dG_ti;  dP = dG^T R [F, E];  dU = dU^ * R[:, expert_of]

With frozen projections and tokens enough the products behind the mask leave its zeros out (``cpu/sparse.py``, ``gpu/slots.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..._autograd import anchor, wants_gradient
from ..._backend import use_kernels
from ..._checks import has_values, require, require_float, require_indices, require_range, require_same, require_shape
from ..._tiles import expert_by_expert_masked
from ..activations import find_activation
from .cpu.dense import MaskedFFN, expert_mask, view_ffn
from .cpu.sparse import SparseMaskedFFN


def masked_view_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there. A ``down_proj`` without ``has_dense_view`` is copied."""
    if use_kernels(x) and not wants_gradient(x, gate_up_proj, down_proj, weights):
        from .gpu.autograd import masked_view  # its operators take as long to define as the rest of the package to import

        return masked_view(x, gate_up_proj, down_proj, indices, weights, activation)
    return view_ffn(x, gate_up_proj, down_proj, indices, weights, activation)


def _check_masked(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    expert_of: Tensor,
    indices: Tensor,
    plan: Tensor | None,
    probs: Tensor | None,
    weights: Tensor | None,
    balanced: bool,
) -> int:
    """The arguments of ``masked_ffn``; the number of experts E."""
    require_float(x, "x", 2, "[T, H]")
    require_float(gate_proj, "gate_proj", 2, "[F, H]")
    T, H = x.shape
    F = gate_proj.shape[0]
    for name, tensor, shape, dims in (
        ("gate_proj", gate_proj, (F, H), "[F, H]"),
        ("up_proj", up_proj, (F, H), "[F, H]"),
        ("down_proj", down_proj, (H, F), "[H, F]"),
    ):
        require_float(tensor, name, 2, dims)
        require_shape(tensor, name, shape, dims)
        require_same(tensor, name, x, "x")
    require_indices(expert_of, "expert_of", 1, "[F]")
    require_shape(expert_of, "expert_of", (F,), "[F]")
    require_indices(indices, "indices", 2, "[T, K]")
    require(indices.shape[0] == T, "indices", f"of shape {list(indices.shape)}", f"[T, K] with T = {T}")
    E = None
    for name, soft, rows in (("plan", plan, F), ("probs", probs, T)):
        if soft is not None:
            require_float(soft, name, 2, "[F, E]" if name == "plan" else "[T, E]")
            E = soft.shape[1] if E is None else E
            require_shape(soft, name, (rows, E), f"[{'F' if name == 'plan' else 'T'}, E]")
            require_same(soft, name, x, "x", dtype=False)
    if E is None:
        E = int(expert_of.max()) + 1 if F else 1
        if indices.numel() and not balanced:
            # any E beyond the largest index does: an empty slot then gets a column that no neuron belongs to
            E = max(E, int(indices.max()) + 1)
    require_range(expert_of, "expert_of", 0, E - 1)
    require_range(indices, "indices", 0, E)
    if balanced:
        require(E > 0 and F % E == 0, "balanced", f"True with E = {E}", f"True only where E divides F = {F}")
        if has_values(expert_of):
            most = int(torch.bincount(expert_of, minlength=E).max()) if F else 0
            require(most == F // E, "expert_of", f"with {most} neurons of one expert", f"F / E = {F // E} of each where balanced")
    if weights is not None:
        require_float(weights, "weights", 2, "[T, K]")
        require_shape(weights, "weights", tuple(indices.shape), "[T, K]")
        require(
            not (probs is not None and probs.requires_grad and weights.requires_grad),
            "weights",
            "needing a gradient beside probs",
            "one router gradient: probs (dense straight-through) or weights (selected experts)",
        )
    return E


def masked_ffn(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    expert_of: Tensor,
    indices: Tensor,
    *,
    plan: Tensor | None = None,
    probs: Tensor | None = None,
    weights: Tensor | None = None,
    activation: str = "silu",
    recompute: bool = False,
    balanced: bool = False,
) -> Tensor:
    """Alignment forward (eq. 4): y = (U * (R M^T)) Wd^T with U = act(x Wg^T) * (x Wu^T), hard forward, soft backward.

    Args:
        x: [T, H] floating point.
        gate_proj, up_proj: [F, H]; down_proj: [H, F]; in the dtype of ``x``.
        expert_of: [F] int64, the hard assignment M.
        indices: [T, K] int64, the hard routing R; index E is an empty slot.
        plan: [F, E], receives the straight-through gradient dP.
        probs: [T, E], receives the straight-through gradient dQ, of all the experts.
        weights: [T, K] of the selected experts, with gradient. None: 1. Carries a router gradient of its own (the soft router):
            never together with ``probs``.
        activation: an ACT2FN name.
        recompute: keep x instead of gate and up [T, F] for the backward pass, which then computes them again.
        balanced: every expert has F / E neurons, as ``balanced_assignment`` gives them; a GPU, where nobody looks, then leaves the
            mask's zeros out of the products behind it, and returns NaN if it was not so.

    Returns:
        y [T, H] in the dtype of ``x``.

    Raises:
        ValueError: a wrong rank, shape, dtype or device, an unknown activation, probs together with weights that need a
            gradient, balanced where E does not divide F; on CPU, outside torch.compile, entries of expert_of or indices outside the
            experts, and experts of unequal width where balanced.

    Gradient: to x, plan, probs, weights and the three projections, each only if it needs one. Those of plan, probs and weights see
    U of every neuron and token, chosen or not: where it overflows, that neuron's row of dP and that token's of dQ are not finite. A
    second derivative is refused.

    Source: eq. 3 and 4 of DOT-MoE (arXiv 2606.01666).
    """
    E = _check_masked(x, gate_proj, up_proj, down_proj, expert_of, indices, plan, probs, weights, balanced)
    find_activation(activation)
    with torch.autocast(x.device.type, enabled=False):
        if use_kernels(x):
            from .gpu.autograd import masked

            tensors = x, gate_proj, up_proj, down_proj, expert_of, indices, plan, probs, weights
            return masked(*tensors, E, activation, recompute, balanced)
        T, F = len(x), len(gate_proj)
        r = expert_mask(indices, weights, E, x.dtype)
        arguments = (x, gate_proj, up_proj, down_proj, r, plan, probs, expert_of, activation, anchor(x))
        learns = wants_gradient(x, plan, probs, weights)
        sparse = has_values(x) and expert_by_expert_masked(T, indices.shape[1], E, F, x.dtype, learns)
        function = SparseMaskedFFN if sparse and not wants_gradient(gate_proj, up_proj, down_proj) else MaskedFFN
        if recompute and torch.is_grad_enabled():
            return checkpoint(function.apply, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function.apply(*arguments)
