"""Top-K routing in PyTorch: the CPU's implementation, and that of float64 and of more than 512 experts everywhere.

One softmax, one sort, and the backward by formula (``gpu.py``) in three passes over [T, E] instead of autograd's dozen. On a CPU
float32 logits are sorted as integers, value above and expert below: no ties are left to break, and NumPy sorts integers with
vector instructions, several times faster than torch.topk finds K of 112. lse = z_top - ln q_top saves the passes of a logsumexp,
and keeps its digits since q_top >= 1 / E. For few tokens NumPy does the rest too: its calls cost less than torch's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._autograd import first_order
from .._checks import has_values

_FEW = 16384  # logits up to which a call costs more than its work
# logits up to which three slower calls beat the ten of the packed sort: between two layers' weights none is in a cache
_FEWER = 1024
_TINY = 512  # logits from which on it pays to turn them over
_NARROW = 16  # experts from which on torch's softmax has vectors
_CACHED = 32768  # logits whose sort stays in a core's cache
_THREADS = 4  # from which on torch.topk, which uses them all, is the faster one for many tokens


def _few(z: Tensor, mask: Tensor | None) -> bool:
    """Whether NumPy's calls, cheaper than torch's, count for more than threads."""
    return mask is None and has_values(z) and 0 < z.numel() <= _FEW and z.dtype == torch.float32  # a size asked in a graph binds it


def _places(indices: np.ndarray, E: int) -> np.ndarray:
    """indices [T, K] -> where they are among the T E logits."""
    T = len(indices)
    return indices if T == 1 else indices + np.arange(0, T * E, E)[:, None]


def _sort_packed(z: np.ndarray, k: int) -> np.ndarray:
    """Indices [T, k] int64 of the k largest float32 of each row, descending, ties to the lower index."""
    T, E = z.shape
    indices = np.empty((T, k), np.int64)
    expert, rows = np.arange(E), max(_CACHED // max(E, 1), 1)
    for first in range(0, T, rows):
        bits = np.subtract(np.float32(0), z[first : first + rows]).view(np.int32)  # of -z, where both zeros are +0
        key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)  # in the order of -z
        key <<= 32
        key |= expert
        key.sort(1)
        np.bitwise_and(key[:, :k], 0xFFFFFFFF, out=indices[first : first + rows])
    return indices


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest of each row, descending, ties to the lower index."""
    E = scores.shape[1]
    if not has_values(scores):
        return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k].contiguous()
    few_threads = torch.get_num_threads() < _THREADS or scores.numel() <= _FEW
    if scores.dtype == torch.float32 and few_threads:
        z = scores.detach().numpy()
        return torch.from_numpy((-z).argsort(1, "stable")[:, :k].copy() if z.size <= _FEWER else _sort_packed(z, k))
    # topk leaves the order of equal values open: sort just the rows where that matters
    values, indices = torch.topk(scores, min(k + 1, E), dim=-1)
    indices = indices[:, :k].contiguous()
    equal = values[:, 1:] == values[:, :-1]
    if bool(equal.any()):
        tied = equal.any(-1).nonzero()[:, 0]
        indices[tied] = torch.sort(scores[tied], dim=-1, descending=True, stable=True).indices[:, :k]
    return indices


def largest(scores: list[float], k: int) -> list[int]:
    """As ``top_indices``, of one token's: of few a list is sorted before NumPy's calls have begun."""
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:k]


def count_experts(indices: Tensor, num_experts: int) -> Tensor:
    """[E] int64: how often each expert is named in ``indices`` [T, K]; index E counts nowhere."""
    slots = indices.reshape(-1)
    if has_values(slots):
        return torch.bincount(slots, minlength=num_experts + 1)[:num_experts]
    # bincount asks for the largest index: a GPU would synchronise, and a graph does not know the answer
    return slots.new_zeros(num_experts + 1).scatter_add_(0, slots, torch.ones_like(slots))[:num_experts]


def _softmax(z: Tensor) -> Tensor:
    """[T, E] -> [T, E]. On a CPU torch takes a row of fewer than 16 one by one; the vectors of NumPy run over the tokens."""
    if not has_values(z) or z.dtype != torch.float32 or z.shape[1] >= _NARROW or z.numel() < _TINY:
        return torch.softmax(z, -1)
    q = z.detach().numpy().T.copy()  # [E, T]
    np.exp(np.subtract(q, q.max(0), out=q), out=q)
    q /= q.sum(0)
    return torch.from_numpy(np.ascontiguousarray(q.T))


def _route_few(z: Tensor, top_k: int, mode: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, None]]:
    """As ``route``, of float32 without a mask."""
    (T, E), probs = z.shape, _softmax(z)
    q, logits = probs.numpy(), z.detach().numpy()
    indices = _sort_packed(logits, top_k)
    chosen = _places(indices, E)
    if mode == "unit":
        weights = np.ones((T, top_k), q.dtype)
    else:
        weights = q.take(chosen)
        if mode == "renormalized":
            weights /= weights.sum(1, keepdims=True)  # a sum of the largest: at least 1 / E
    load = (np.bincount(indices.reshape(-1), minlength=E) / (T * top_k)).astype(q.dtype)
    best = chosen[:, 0]
    lse = logits.take(best) - np.log(q.take(best))  # [T]
    losses = (load * q.sum(0)).sum() * (E / T), lse.dot(lse) / T
    i, w, share, balance, squares, l = (torch.from_numpy(np.asarray(value)) for value in (indices, weights, load, *losses, lse))
    return (i, w, probs, share, balance, squares), (l, None)


def route(z: Tensor, mask: Tensor | None, top_k: int, mode: str) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """z [T, E] float32 or float64, padding rows 0 -> (indices, weights [T, K], probs [T, E], load [E], balance, z loss []), and
    (lse [T], tokens [] or None)."""
    T, E = z.shape
    if _few(z, mask):
        return _route_few(z, top_k, mode)
    q = _softmax(z)
    indices = top_indices(z, top_k)
    best = indices[:, :1]
    lse = (z.gather(1, best) - q.gather(1, best).log_())[:, 0]  # [T]
    if mode == "unit":
        weights = q.new_ones(T, top_k)
    elif mode == "softmax":
        weights = q.gather(1, indices)
    else:
        weights = torch.softmax(z.gather(1, indices), -1)
    if mask is None:
        n = max(T, 1)
        load = count_experts(indices, E).to(z.dtype).div_(max(T * top_k, 1))
        balance = torch.dot(load, q.sum(0)).mul_(E / n)
        return (indices, weights, q, load, balance, torch.dot(lse, lse).div_(n)), (lse, None)
    tokens = mask.sum().clamp(min=1)
    q_sum = torch.where(mask[:, None], q, 0).sum(0)
    weights = torch.where(mask[:, None], weights, 0)
    indices = torch.where(mask[:, None], indices, E)
    count = count_experts(indices, E)
    load = count.to(z.dtype) / count.sum().clamp(min=1)
    squares = torch.where(mask, lse.square(), 0).sum()
    return (indices, weights, q, load, E * torch.dot(load, q_sum) / tokens, squares / tokens), (lse, tokens)


def _gradient_few(
    saved: tuple[Tensor | None, ...], mode: str, dweights: Tensor | None, dbalance: Tensor | None, dz: Tensor | None
) -> np.ndarray:
    """dlogits [T, E] of ``_route_few`` by the formulas of ``RouteTopK.backward``; nothing asks for the gradient of probs."""
    q, indices, weights, load, lse = (t.numpy() for t in saved[:5] if t is not None)
    T, E = q.shape
    chosen = _places(indices, E)
    minus: Any = 0  # [T, 1]
    c: Any = 0  # [E]
    entries = None
    if dweights is not None:
        dw = dweights.numpy()
        if mode == "renormalized":
            entries = weights * (dw - (weights * dw).sum(1, keepdims=True))
        else:
            entries = q.take(chosen) * dw
            minus = entries.sum(1, keepdims=True)
    if dbalance is not None:
        c = load * np.float32(E / T * dbalance.item())
        minus = minus + q.dot(c)[:, None]
    if dz is not None:
        minus = minus - (lse * np.float32(2 / T * dz.item()))[:, None]
    dlogits = (c - minus) * q
    if entries is not None:
        dlogits.reshape(-1)[chosen] += entries  # a token's experts are distinct
    return dlogits


class RouteTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, mask: Tensor | None, top_k: int, mode: str) -> tuple[Tensor, ...]:
        """As ``route``."""
        outputs, (lse, tokens) = route(z, mask, top_k, mode)
        indices, weights, q, load, _, _ = outputs
        ctx.mode = mode
        ctx.save_for_backward(q, indices, weights, load, lse, mask, tokens)
        ctx.mark_non_differentiable(indices, load)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @first_order("route_top_k")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, indices, weights, load, lse, mask, tokens = saved = ctx.saved_tensors  # read once: checkpointing allows no more
        _, dweights, dprobs, _, dbalance, dz = grads
        if dprobs is None and _few(q, mask):
            return torch.from_numpy(_gradient_few(saved, ctx.mode, dweights, dbalance, dz)), None, None, None
        T, E = q.shape
        n = max(T, 1) if tokens is None else tokens
        at = indices if mask is None else indices.clamp(max=E - 1)
        minus = q.new_zeros(T)  # dZ = q (dprobs + c - minus) + entries at the selected experts
        entries = c = None
        if dweights is not None and ctx.mode == "renormalized":
            entries = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        elif dweights is not None:
            entries = q.gather(1, at) * dweights
            minus += entries.sum(-1)
        if dbalance is not None:
            c = (E * dbalance / n) * load
            minus += torch.mv(q, c)
        if dz is not None:
            minus -= (2 * dz / n) * lse
        if dprobs is not None:
            g = dprobs if c is None else dprobs + c
            minus += (q * dprobs).sum(-1)
            dlogits = (g - minus[:, None]).mul_(q)
        elif c is not None:
            dlogits = (c - minus[:, None]).mul_(q)
        else:
            dlogits = q * -minus[:, None]
        if entries is not None:
            dlogits.scatter_add_(1, at, entries)
        if mask is not None:
            dlogits = torch.where(mask[:, None], dlogits, 0)
        return dlogits, None, None, None
