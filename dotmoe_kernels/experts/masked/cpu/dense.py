"""The masked path in PyTorch with dense products: the routed FFN, and the forward that alignment learns through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...._autograd import first_order, wants_gradient
from ...._checks import has_values
from ...._tiles import down_by_expert, tokens_first, turns_rows
from ....routing.cpu import top_indices
from ...activations import find_activation

_FEW = 16384  # of [T, E], up to which NumPy's calls, cheaper than torch's, count for more than vectors
_NARROW = 16  # tokens up to which a copy of the mask for every neuron costs more than it saves
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def expert_mask(indices: Tensor, weights: Tensor | None, num_experts: int, dtype: torch.dtype) -> Tensor:
    """R [T, E]: each token's weight for each expert; column E collects the empty slots and is dropped."""
    r = torch.zeros(indices.shape[0], num_experts + 1, dtype=dtype, device=indices.device)
    w = r.new_ones(()).expand(indices.shape) if weights is None else weights.to(dtype)
    return r.scatter_add_(1, indices.long(), w)[:, :num_experts]


def few_ffn(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, logits: Tensor, top_k: int, activation: str) -> Tensor:
    """``view_ffn`` of a few tokens' largest logits, each with weight 1, on a CPU and without a gradient: x [T, H], logits
    [T, E + N], of which the last N are of no expert."""
    on = _bits_on(top_indices(logits, top_k).numpy(), logits.shape[1], x.dtype)
    chosen = Chosen(torch.from_numpy(on[: len(down_proj)]), None)
    return _forward(x, gate_up_proj, down_proj, chosen, find_activation(activation).forward)


def view_ffn(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor | None, activation: str
) -> Tensor:
    """x [T, H] -> [T, H]; the arguments of ``expert_ffn``, checked there. A ``down_proj`` without ``has_dense_view`` is copied.

    Between the dense products only what a token chose is read and differentiated: multiplied by the mask's zeros, an overflow in
    another expert would be NaN."""
    E, width, H = gate_up_proj.shape
    T, s = len(x), width // 2
    if not wants_gradient(x, gate_up_proj, down_proj, weights):
        chosen = chosen_experts(indices, weights, E, x.dtype)
        return _forward(x, gate_up_proj, down_proj, chosen, find_activation(activation).forward)
    used = indices < E
    x = torch.where(used.any(1, keepdim=True), x, 0)  # the weights' gradient multiplies every token
    product = functional.linear(x, gate_up_proj.reshape(-1, H)).view(T * E, width)
    slot = (torch.arange(T, device=x.device)[:, None] * E + indices).reshape(-1)  # rows of the product
    empty = ~used.reshape(-1)
    rows = product.index_select(0, slot.masked_fill(empty, 0)).masked_fill_(empty[:, None], 0)  # [S, 2s]
    gate, up = rows.chunk(2, -1)
    hidden = find_activation(activation).forward(gate) * up
    if weights is not None:
        hidden = hidden * weights.reshape(-1, 1).to(x.dtype)
    spread = hidden.new_zeros(T * E + 1, s).index_add_(0, slot.masked_fill(empty, T * E), hidden)  # a row more: the empty slots
    return _down(spread[:-1].view(T, E * s), down_proj)


def _forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, chosen: Chosen, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``view_ffn`` without a gradient. For a few tokens neurons are rows until the mask is applied: with the weights first a CPU's
    product takes half the time of the one that ``linear`` makes, which packs them anew."""
    (E, H, s), T = down_proj.shape, len(x)
    if tokens_first(T):
        return token_rows(x, gate_up_proj, down_proj, chosen, act)
    gate, up = torch.mm(gate_up_proj.reshape(-1, H), x.T).view(E, 2, s, T).unbind(1)  # [E, s, T] each
    hidden, bits = act(gate).mul_(up), _BITS[x.element_size()]
    on, r = chosen
    if r is not None:
        hidden.mul_(r[:, None])  # weights in float32: rounded to 16 bits they would count as another error
    on = on[:, None] if T <= _NARROW else on.repeat_interleave(s, 0).view(E, s, T)  # a row at a time has few vectors
    rows = hidden.view(bits).bitwise_and_(on).view(x.dtype).view(E * s, T).T  # [T, F]
    if turns_rows(E * s * H):
        rows = rows.contiguous()
    if down_by_expert(T, E * s * H, x.dtype) and down_proj.stride(1) == 1:
        return torch.bmm(rows.view(T, E, s).transpose(0, 1), down_proj.transpose(1, 2)).sum(0)
    return _down(rows, down_proj)


class Chosen(NamedTuple):
    """What tokens chose of some experts."""

    on: Tensor  # [E, T] all bits where an expert is a token's, as integers of a number's size
    r: Tensor | None  # R^T [E, T]; None: 1 where it is on


def token_rows(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    chosen: Chosen,
    act: Callable[[Tensor], Tensor],
    out: Tensor | None = None,
) -> Tensor:
    """x [T, H] -> [T, H] of some experts with a dense view, tokens as rows: the dense FFN's products, and the mask."""
    (E, H, s), T = down_proj.shape, len(x)
    gate, up = torch.mm(x, gate_up_proj.reshape(-1, H).T).view(T, E, 2, s).unbind(2)  # [T, E, s] each
    hidden = act(gate).mul_(up)
    if chosen.r is not None:
        hidden.mul_(chosen.r.T[:, :, None])
    hidden.view(_BITS[x.element_size()]).bitwise_and_(chosen.on.T[:, :, None])
    return _down(hidden.view(T, E * s), down_proj, out)


def _bits_on(indices: np.ndarray, rows: int, dtype: torch.dtype) -> np.ndarray:
    """[rows, T] of indices [T, K], all of which are below ``rows``."""
    on = np.zeros((rows, len(indices)), f"i{dtype.itemsize}")
    on[indices, np.arange(len(indices))[:, None]] = -1
    return on


def chosen_experts(indices: Tensor, weights: Tensor | None, E: int, dtype: torch.dtype) -> Chosen:
    """Of indices [T, K]."""
    T, bits = len(indices), _BITS[dtype.itemsize]
    if T * E <= _FEW and has_values(indices) and (weights is None or weights.dtype == torch.float32):
        chosen = indices.numpy()
        on = _bits_on(chosen, E + 1, dtype)
        unit = weights is None or bool((weights.detach().numpy() == 1).all())
        if unit and np.count_nonzero(on[:E]) == np.count_nonzero(chosen < E):  # no expert twice a token
            return Chosen(torch.from_numpy(on[:E]), None)
    r = expert_mask(indices, weights, E, torch.promote_types(dtype, torch.float32)).T
    named = r != 0
    unit = has_values(r) and bool((r == named).all())
    return Chosen(named.to(bits).neg_(), None if unit else r)


def _down(hidden: Tensor, down_proj: Tensor, out: Tensor | None = None) -> Tensor:
    """hidden [T, F] -> [T, H]"""
    return torch.mm(hidden, down_proj.transpose(1, 2).reshape(-1, down_proj.shape[1]), out=out)


def _gates(r: Tensor, expert_of: Tensor) -> Tensor:
    """M R^T [F, T]"""
    return r.T.contiguous().index_select(0, expert_of)


class _Mask(NamedTuple):
    """Selects rather than multiplies: 0 times what overflowed in an expert that a token did not choose would be NaN."""

    bits: Tensor  # [F, T], all of a number's or none: an "and" has vectors on a CPU, which masked_fill and where have not
    scale: Tensor | None  # [F, T]; None: all 1 where it is on

    def apply_(self, hidden: Tensor) -> Tensor:
        if self.scale is not None:
            hidden.mul_(self.scale)
        hidden.view(self.bits.dtype).bitwise_and_(self.bits)
        return hidden


def _mask(r: Tensor, expert_of: Tensor) -> _Mask:
    on = r != 0
    unit = has_values(r) and bool((r == on).all())
    return _Mask(_gates(-on.to(_BITS[r.element_size()]), expert_of), None if unit else _gates(r, expert_of))


class MaskedFFN(torch.autograd.Function):
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
        hidden = _mask(r, expert_of).apply_(find_activation(activation).forward(gate).mul_(up))
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
        filled = r.new_zeros(r.shape[1], dtype=torch.bool).index_fill_(0, expert_of.long(), True)  # [E] has neurons
        space = torch.empty_like(du)  # twice: the pages of a new tensor would cost as much as a pass
        if need_r or need_plan or need_probs:
            dg = torch.mul(du, a, out=space).mul_(up)  # gradient of the gate M R^T
            if need_plan:
                dplan = (dg @ r).to(ctx.soft[0])
            if need_r or need_probs:
                experts = dg.new_zeros(r.shape[1], len(expert_of)).scatter_(0, expert_of.long()[None], 1.0)  # M^T
                segments = torch.where(filled, (experts @ dg).T, 0)  # [T, E]
                dprobs = segments.to(ctx.soft[1]) if need_probs else None
                dr = segments.to(r.dtype) if need_r else None
        if need_x or need_gate or need_up or need_down:
            mask = _mask(r, expert_of)
            if need_down:
                ddown_proj = (mask.apply_(a * up) @ dy).T
            dgate = mask.apply_(act.backward(torch.mul(du, up, out=space), gate))
            dup = mask.apply_(du.mul_(a))
            del mask
            if need_x:
                dx = (dgate.T @ gate_proj).addmm_(dup.T, up_proj)
            if need_gate or need_up:
                x = torch.where(((r != 0) & filled).any(1, keepdim=True), x, 0)
            if need_gate:
                dgate_proj = dgate @ x
            if need_up:
                dup_proj = dup @ x
        return dx, dgate_proj, dup_proj, ddown_proj, dr, dplan, dprobs, None, None, None
