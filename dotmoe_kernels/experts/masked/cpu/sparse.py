"""``masked_ffn`` on a CPU with frozen weights: behind the mask the products run only where it is not zero.

The straight-through gradients need gate, up and dU^ = dY Wd for every neuron and token. What follows the mask does not: its zeros,
three quarters of it at 25 % active, are left out of Y^ = (U * R M^T) Wd^T and of dX. The neurons are taken in the order of their
experts, so those of one expert are a block of columns; its tokens' rows of that block meet its rows of the weights.
Cost in products of [T, H] x [H, F]: three, and three times the density of R, instead of six; the weights are copied twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...._autograd import first_order
from ...._checks import compute_dtype
from ...._tiles import product_rows
from ...activations import find_activation


class _Block(NamedTuple):
    """An expert with tokens and neurons."""

    tokens: Tensor  # [n]
    filled: Tensor  # [m]: the same, and others up to ``product_rows``, whose rows nobody reads
    neurons: slice  # of the sorted ones
    scale: Tensor | None  # [m, 1] entries of R; None: all 1


def _blocks(r: Tensor, sizes: list[int]) -> Iterator[_Block]:
    """r [T, E]; ``sizes``: neurons of each expert."""
    expert, token = (r.T != 0).nonzero(as_tuple=True)
    scale = r[token, expert][:, None]
    unit = bool((scale == 1).all())
    ends = torch.bincount(expert, minlength=len(sizes)).cumsum(0).tolist()
    first, n = 0, len(token)
    token, scale = functional.pad(token, (0, n)), functional.pad(scale, (0, 0, 0, n))
    for (start, end), s in zip(pairwise([0, *ends]), sizes, strict=True):
        if end > start and s > 0:
            rows = slice(start, start + product_rows(end - start, r))
            yield _Block(token[start:end], token[rows], slice(first, first + s), None if unit else scale[rows])
        first += s


def _columns(weight: Tensor, order: Tensor) -> Tensor:
    """weight [H, F] -> weight[:, order], by gather: along rows index_select takes twice its time, in 16 bits."""
    return weight.gather(1, order.expand(weight.shape))


def _rows(blocks: list[_Block], like: Tensor) -> Tensor:
    """[n, H] for the products of any block: a new one each time would cost its page faults."""
    return like.new_empty(max((len(block.filled) for block in blocks), default=0), like.shape[1])


class SparseMaskedFFN(torch.autograd.Function):
    """As ``_MaskedFFN``, without gradients to the projections."""

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
        """r [T, E] holds the hard weights; plan and probs only receive gradients."""
        act = find_activation(activation).forward
        order = torch.argsort(expert_of, stable=True)
        sizes = torch.bincount(expert_of, minlength=r.shape[1]).tolist()
        gate = x @ gate_proj.index_select(0, order).T  # [T, F], sorted
        up = x @ up_proj.index_select(0, order).T
        down = _columns(down_proj, order)
        y = torch.zeros(x.shape, dtype=compute_dtype(x))
        blocks = list(_blocks(r, sizes))
        rows = _rows(blocks, x)
        for tokens, filled, neurons, scale in blocks:
            hidden = act(gate[:, neurons].index_select(0, filled)).mul_(up[:, neurons].index_select(0, filled))  # [m, s]
            if scale is not None:
                hidden.mul_(scale)
            products = torch.mm(hidden, down[:, neurons].T, out=rows[: len(filled)])
            y.index_add_(0, tokens, products[: len(tokens)].to(y.dtype))
        ctx.save_for_backward(gate_proj, up_proj, down_proj, r, order, gate, up, anchor)
        ctx.activation, ctx.sizes, ctx.blocks = activation, sizes, blocks
        ctx.soft = (None if plan is None else plan.dtype, None if probs is None else probs.dtype)
        return y.to(x.dtype)

    @staticmethod
    @first_order("masked_ffn")
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate_proj, up_proj, down_proj, r, order, gate, up, _ = ctx.saved_tensors
        act, sizes = find_activation(ctx.activation), ctx.sizes
        need_x, _, _, _, need_r, need_plan, need_probs = ctx.needs_input_grad[:7]
        (T, E), F = r.shape, len(order)
        du = dy @ _columns(down_proj, order)  # [T, F], of the masked hidden
        dr = dplan = dprobs = dx = None
        if need_r or need_plan or need_probs:
            dg = act.forward(gate).mul_(up).mul_(du)  # gradient of the gate R M^T
            if need_plan:
                ours = dg.T @ r  # [F, E], sorted
                dplan = torch.empty_like(ours).index_copy_(0, order, ours).to(ctx.soft[0])
            if need_r or need_probs:
                if len(set(sizes)) == 1:
                    segments = dg.view(T, E, F // E).sum(-1)  # [T, E]
                else:
                    segments = dg @ functional.one_hot(torch.repeat_interleave(torch.tensor(sizes)), E).to(dg.dtype)
                dprobs = segments.to(ctx.soft[1]) if need_probs else None
                dr = segments.to(r.dtype) if need_r else None
            del dg
        if need_x:
            dx = torch.zeros(dy.shape, dtype=compute_dtype(dy))
            rows = _rows(ctx.blocks, dy)
            for tokens, filled, neurons, scale in ctx.blocks:
                g, u, d = (t[:, neurons].index_select(0, filled) for t in (gate, up, du))  # [m, s]
                if scale is not None:
                    d.mul_(scale)
                dgate, dup = act.backward(u.mul_(d), g), d.mul_(act.forward(g))
                here = order[neurons]
                some = torch.mm(dgate, gate_proj.index_select(0, here), out=rows[: len(filled)])
                dx.index_add_(0, tokens, some.addmm_(dup, up_proj.index_select(0, here))[: len(tokens)].to(dx.dtype))
            dx = dx.to(dy.dtype)
        return dx, None, None, None, dr, dplan, dprobs, None, None, None
