"""Masked experts: the whole permuted FFN as one dense product, the experts that a token did not choose set to zero.

``masked_view_ffn`` runs the routed FFN that way, for batches whose experts' union is everything: the dense product then reads the
same weights with less overhead. ``masked_ffn`` is the forward that alignment learns through (eq. 4),

    Y^ = (U * (R_ste M_ste^T)) Wd^T,  U = act(X Wg^T) * (X Wu^T),

in the neurons' first order. M is one-hot in the forward, so R M^T is a gather R[:, expert_of]. Backward, after dU^ = dY Wd:

    dG = dU^ * U [T, F];  dQ_te = sum_{i in e} dG_ti;  dP = dG^T R [F, E];  dU = dU^ * R[:, expert_of]

With frozen projections and tokens enough the products behind the mask leave its zeros out (``masked_cpu``, ``masked_gpu``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..._autograd import anchor, first_order, wants_gradient
from ..._backend import use_triton
from ..._checks import has_values, require, require_float, require_indices, require_range, require_same, require_shape
from ..._tiles import expert_by_expert_masked
from ..activations import find_activation
from .cpu.sparse import SparseMaskedFFN


def _expert_mask(indices: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    """R [T, E]: each token's weight for each expert; column E collects the empty slots and is dropped."""
    r = torch.zeros(indices.shape[0], num_experts + 1, dtype=dtype, device=indices.device)
    w = r.new_ones(()).expand(indices.shape) if weights is None else weights.to(dtype)
    return r.scatter_add_(1, indices.long(), w)[:, :num_experts]


def masked_view_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there. A ``down_proj`` without ``has_dense_view`` is copied."""
    if use_triton(x) and x.dtype != torch.float64 and not wants_gradient(x, gate_up_proj, down_proj, weights):
        from .operators import masked_view

        return masked_view(x, gate_up_proj, down_proj, indices, weights, activation)
    E, width, H = gate_up_proj.shape
    r = _expert_mask(indices, weights, E, x.dtype)
    gate, up = functional.linear(x, gate_up_proj.reshape(-1, H)).view(-1, E, 2, width // 2).unbind(2)  # [T, E, s] each
    hidden = find_activation(activation).forward(gate)
    if wants_gradient(x, gate_up_proj, weights):
        hidden = hidden * up * r[:, :, None]
    else:
        hidden.mul_(up).mul_(r[:, :, None])
    hidden = hidden.reshape(-1, E * width // 2)  # [T, F]
    if down_proj.transpose(0, 1).is_contiguous():
        return functional.linear(hidden, down_proj.transpose(0, 1).reshape(H, -1))
    return hidden @ down_proj.transpose(1, 2).reshape(-1, H)


def _gates(r: Tensor, expert_of: Tensor) -> Tensor:
    """M R^T [F, T]"""
    return r.T.contiguous().index_select(0, expert_of)


class _MaskedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_proj: Tensor,
        up_proj: Tensor,
        down_proj: Tensor,
        r: Tensor,
        plan: Tensor | None,
        probs: Tensor | None,
        expert_of: Tensor,
        activation: str,
        anchor: Tensor | None,
    ) -> Tensor:
        """r [T, E] holds the hard weights; plan and probs only receive gradients. Neurons are rows: R's are then copied whole."""
        gate, up = gate_proj @ x.T, up_proj @ x.T  # [F, T]
        hidden = find_activation(activation).forward(gate).mul_(up)
        hidden *= _gates(r, expert_of)
        weight_grads = any(ctx.needs_input_grad[1:4])
        kept = x if weight_grads else None, gate_proj, up_proj, down_proj, r, expert_of, gate, up, anchor
        ctx.save_for_backward(*kept)
        ctx.activation = activation
        ctx.soft = (None if plan is None else plan.dtype, None if probs is None else probs.dtype)
        return hidden.T @ down_proj.T

    @staticmethod
    @first_order("masked_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_proj, up_proj, down_proj, r, expert_of, gate, up, _ = ctx.saved_tensors
        act = find_activation(ctx.activation)
        need_x, need_gate, need_up, need_down, need_r, need_plan, need_probs = ctx.needs_input_grad[:7]
        a = act.forward(gate)  # [F, T]
        du = down_proj.T @ dy.T  # [F, T], of the masked hidden
        dr = dplan = dprobs = dx = dgate_proj = dup_proj = ddown_proj = None
        space = torch.empty_like(du)  # twice: the pages of a new tensor would cost as much as a pass
        if need_r or need_plan or need_probs:
            dg = torch.mul(du, a, out=space).mul_(up)  # gradient of the gate M R^T
            if need_plan:
                dplan = (dg @ r).to(ctx.soft[0])
            if need_r or need_probs:
                experts = dg.new_zeros(r.shape[1], len(expert_of)).scatter_(0, expert_of.long()[None], 1.0)  # M^T
                segments = (experts @ dg).T  # [T, E]
                dprobs = segments.to(ctx.soft[1]) if need_probs else None
                dr = segments.to(r.dtype) if need_r else None
        if need_x or need_gate or need_up or need_down:
            mask = _gates(r, expert_of)
            if need_down:
                ddown_proj = ((a * up).mul_(mask) @ dy).T
            du *= mask
            del mask
            dgate = act.backward(torch.mul(du, up, out=space), gate)
            dup = du.mul_(a)
            if need_x:
                dx = (dgate.T @ gate_proj).addmm_(dup.T, up_proj)
            if need_gate:
                dgate_proj = dgate @ x
            if need_up:
                dup_proj = dup @ x
        return dx, dgate_proj, dup_proj, ddown_proj, dr, dplan, dprobs, None, None, None


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

    Gradient: to x, plan, probs, weights and the three projections, each only if it needs one. A second derivative is refused.

    Source: eq. 3 and 4 of DOT-MoE (arXiv 2606.01666).
    """
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
    find_activation(activation)
    with torch.autocast(x.device.type, enabled=False):
        if use_triton(x) and x.dtype != torch.float64:
            from .operators import masked

            tensors = x, gate_proj, up_proj, down_proj, expert_of, indices, plan, probs, weights
            return masked(*tensors, E, activation, recompute, balanced)
        r = _expert_mask(indices, weights, E, x.dtype)
        arguments = (x, gate_proj, up_proj, down_proj, r, plan, probs, expert_of, activation, anchor(x))
        learns = wants_gradient(x, plan, probs, weights)
        split = expert_by_expert_masked(T, indices.shape[1], E, F, x.element_size(), learns)
        sparse = split and x.device.type == "cpu" and not torch.compiler.is_compiling()
        function = SparseMaskedFFN if sparse and not wants_gradient(gate_proj, up_proj, down_proj) else _MaskedFFN
        if recompute and torch.is_grad_enabled():
            return checkpoint(function.apply, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function.apply(*arguments)
