"""Dispatch: routed pairs -> slots sorted by expert; token rows out to the slots and back.

Slot p serves the routed pair source[p] = t K + j of token[p] = t; expert e owns the slots [offsets[e], offsets[e + 1]). Pairs with
index E are empty slots: they come last, and their rows are zero in outputs and in gradients. The sort is stable, so everything
is deterministic. ``cpu.py`` does it in NumPy and PyTorch, ``gpu`` in Triton, by way of ``operators.py``.

Slots may be made by hand: ``source`` must be a permutation of the S = T K routed pairs, token = source // K, and the slots in use
must come first. On a GPU, where none of this is checked, ``token`` is not read: everything follows from ``source``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import wants_gradient
from .._backend import is_direct, is_plain, use_triton
from .._checks import (
    Passed,
    has_values,
    is_integer,
    refuse,
    require,
    require_float,
    require_indices,
    require_offsets,
    require_range,
    require_same,
    require_shape,
)
from ..reference import Slots
from . import cpu
from .cpu import fits_bags, sum_bags
from .operators import gather_op, inverse_op, scatter_op, sort_slots_op

__all__ = ["Slots", "dispatch_tokens", "fits_bags", "gather_tokens", "scatter_tokens", "sort_slots", "sum_bags"]

_passed = Passed()


def _as_operator(tensor: Tensor) -> bool:
    # the first call of any operator imports torch's compiler, which takes seconds
    return use_triton(tensor) or torch.compiler.is_compiling()


def dispatch_tokens(indices: Tensor, num_experts: int) -> Slots:
    """Stable counting sort of the routed pairs by expert, with no host synchronisation.

    Args:
        indices: [T, K] int64 or int32 in [0, E], any strides; E marks an empty slot. T K < 2^31.
        num_experts: E >= 1.

    Returns:
        Slots(token [S] int64, source [S] int64, offsets [E + 1] int32), S = T K.

    Raises:
        ValueError: a wrong rank or dtype, num_experts < 1, too many pairs, indices outside [0, E] (CPU tensors; on a GPU they
            count as empty slots).
    """
    require_indices(indices, "indices", 2, "[T, K]")
    require(is_integer(num_experts) and num_experts >= 1, "num_experts", num_experts, "an integer of at least 1")
    if indices.numel() >= 2**31:
        refuse("indices", f"of shape {list(indices.shape)}", "fewer than 2^31 entries: offsets are int32")
    require_range(indices, "indices", 0, num_experts)
    return sort_slots(indices, num_experts)


def sort_slots(indices: Tensor, num_experts: int) -> Slots:
    """``dispatch_tokens`` of arguments that were checked. ``sort_slots_op`` gives the inverse of ``source`` as well."""
    if _as_operator(indices):
        if is_direct(indices):
            from .gpu import sort

            if num_experts <= sort.MOST_EXPERTS:
                return Slots(*sort.sort_slots(indices, int(num_experts))[:3])
        return Slots(*sort_slots_op(indices, num_experts)[:3])
    return Slots(*cpu.sort_slots(indices, num_experts))


def _inverse(source: Tensor) -> Tensor:
    if is_direct(source):
        from .gpu import sort

        return sort.inverse(source)
    return inverse_op(source)


def _slot_of(slots: Slots, T: int) -> Tensor:
    """[T, K] int32: the slot of a routed pair."""
    return _inverse(slots.source).view(T, slots.source.numel() // max(T, 1))


def _signature(rows: Tensor, slots: Slots, weights: Tensor | None, num_tokens: int | None) -> tuple[object, ...] | None:
    """Of arguments whose values nobody looks at."""
    if not isinstance(rows, Tensor) or has_values(rows) or not isinstance(slots, tuple) or len(slots) != 3:
        return None
    if not is_plain(rows, *slots, weights):
        return None
    token, source, offsets = slots
    return (
        *(rows.shape, rows.dtype, rows.device),
        *(token.shape, token.dtype, token.device),
        *(source.shape, source.dtype, source.device),
        *(offsets.shape, offsets.dtype, offsets.device),
        *((None,) if weights is None else (weights.shape, weights.dtype, weights.device)),
        *(num_tokens, type(num_tokens)),
    )


def _check_slots(slots: Slots, rows: Tensor, argument: str) -> None:
    require(isinstance(slots, tuple) and len(slots) == 3, "slots", f"a {type(slots).__name__}", "Slots(token, source, offsets)")
    S = require_indices(slots.token, "slots.token", 1, "[S]").numel()
    require_indices(slots.source, "slots.source", 1, "[S]")
    require_shape(slots.source, "slots.source", (S,), "[S]")
    require(S < 2**31, "slots.token", f"of {S} slots", "fewer than 2^31: offsets are int32")
    require_indices(slots.offsets, "slots.offsets", 1, "[E + 1]")
    require_offsets(slots.offsets, "slots.offsets", slots.offsets.numel() - 1, S)
    require_same(slots.token, "slots.token", rows, argument, dtype=False)
    require_same(slots.source, "slots.source", rows, argument, dtype=False)
    require_same(slots.offsets, "slots.offsets", rows, argument, dtype=False)


def _check_tokens(slots: Slots, T: int, argument: str) -> None:
    """Every token has the same number of slots."""
    S = slots.token.numel()
    if S % T != 0 if T > 0 else S > 0:
        refuse(argument, f"{T} tokens", f"a number T of tokens with T K = {S} slots")
    require_range(slots.token, "slots.token", 0, T - 1)


def scatter_tokens(x: Tensor, slots: Slots) -> Tensor:
    """xs[p] = x[token[p]]: a copy of each token's row for every expert it visits.

    Args:
        x: [T, H] floating point, any strides.
        slots: from ``dispatch_tokens``, or made by hand: ``source`` a permutation of the T K routed pairs, token = source // K.

    Returns:
        xs [S, H], dtype of x; the rows of empty slots are zero.

    Raises:
        ValueError: a wrong rank, dtype or device, S not a multiple of T; on CPU a token outside x, offsets that decrease or leave
            [0, S].

    Gradient: to x, the sum of a token's K rows in float32 (float64 for float64), in a fixed order. A second derivative is refused.
    """
    signature = _signature(x, slots, None, None)
    if not signature or ("scatter", *signature) not in _passed:
        require_float(x, "x", 2, "[T, H]")
        _check_slots(slots, x, "x")
        _check_tokens(slots, x.shape[0], "x")
        if signature:
            _passed.add(("scatter", *signature))
    if _as_operator(x):
        slot_of = _slot_of(slots, x.shape[0])
        if is_direct(x, slot_of, slots.offsets):
            from .gpu import rows

            return rows.scatter_rows(x, slot_of, slots.offsets)
        return scatter_op(x, slot_of, slots.offsets)
    scatter = cpu.Scatter.apply if wants_gradient(x) else cpu.scatter
    return scatter(x, slots.token, slots.offsets)


def _check_gather(ys: Tensor, slots: Slots, weights: Tensor | None, num_tokens: int | None) -> int:
    """The arguments of ``gather_tokens`` fit each other; the number of tokens T."""
    require_float(ys, "ys", 2, "[S, H]")
    _check_slots(slots, ys, "ys")
    S = slots.token.numel()
    require(ys.shape[0] == S, "ys", f"of shape {list(ys.shape)}", f"[S, H] with S = {S}")
    if weights is not None:
        require_float(weights, "weights", 2, "[T, K]")
        require(weights.numel() == S, "weights", f"of shape {list(weights.shape)}", f"[T, K] with T K = {S}")
        require_same(weights, "weights", ys, "ys", dtype=False)
        T = weights.shape[0]
        require(num_tokens in (None, T), "num_tokens", num_tokens, f"the {T} rows of weights")
    elif num_tokens is not None:
        T = num_tokens
    else:
        require(has_values(ys), "num_tokens", None, "the number of tokens T, without weights on a GPU or under torch.compile")
        T = int(slots.token.max()) + 1 if S else 0
    _check_tokens(slots, T, "weights" if weights is not None else "num_tokens")
    return T


def gather_tokens(ys: Tensor, slots: Slots, weights: Tensor | None = None, *, num_tokens: int | None = None) -> Tensor:
    """y[t] = sum over the slots p of token t of weights[source[p]] ys[p], summed in float32, in a fixed order.

    Args:
        ys: [S, H] floating point, any strides; the rows of empty slots are ignored, whatever they hold.
        slots: from ``dispatch_tokens``, or made by hand: ``source`` a permutation of the T K routed pairs, token = source // K.
        weights: [T, K] floating point. None: unit weights.
        num_tokens: T, needed only without ``weights`` on a GPU or under torch.compile; elsewhere read off ``weights`` or the slots.

    Returns:
        y [T, H], dtype of ys.

    Raises:
        ValueError: a wrong rank, shape, dtype or device, weights of another number of slots, S not a multiple of T; on CPU a token
            of T or more, offsets that decrease or leave [0, S].

    Gradient: to ys, and to weights: dweights[t, j] = <dy[t], ys[slot of (t, j)]>. A second derivative is refused.
    """
    signature = _signature(ys, slots, weights, num_tokens)
    if not signature or ("gather", *signature) not in _passed:
        T = _check_gather(ys, slots, weights, num_tokens)
        if signature:
            _passed.add(("gather", *signature))
    else:
        T = weights.shape[0] if weights is not None else int(num_tokens or 0)
    if _as_operator(ys):
        slot_of = _slot_of(slots, T) if weights is None else _inverse(slots.source).view(weights.shape)
        given = ys, weights, slot_of, slots.offsets
        if is_direct(*given):
            from .gpu import rows

            return rows.gather_rows(*given)
        return gather_op(*given)
    gather = cpu.Gather.apply if wants_gradient(ys, weights) else cpu.gather
    return gather(ys, weights, *slots, T)
