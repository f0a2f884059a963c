"""One token of a model, layer after layer: the weights of each push all else out of the caches, so that a call takes the time of a
hundred rows of an expert, and what counts is how few there are. What no token changes is made once: an expert's weights as
matrices, the numbers of its rows, the room for gate and up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import local
from typing import NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from ...._backend import is_plain
from ...._tiles import sums_rows
from ...activations import find_activation


class _Matrices(NamedTuple):
    """Views of the weights, an expert each, and where those lie."""

    places: tuple[int, int]
    owners: tuple[ReferenceType[nn.Parameter], ...]  # the parameters: with the first that goes, the views go
    dtype: torch.dtype
    up: Sequence[Tensor]  # [2s, H] each, gate above up
    down: Sequence[Tensor]  # [H, s] each
    rows: Tensor  # Down [F, H], a neuron a row


class _Room(NamedTuple):
    """For gate and up of K experts."""

    rows: Sequence[Tensor]  # [2s] each
    gate: Tensor  # [K, s]
    up: Tensor


class _Rooms(local):
    """A thread's, by size: a thread computes one token at a time."""

    def __init__(self) -> None:
        self.by_size: dict[tuple[int, int, torch.dtype], _Room] = {}

    def of(self, experts: int, width: int, dtype: torch.dtype) -> _Room:
        size = experts, width, dtype
        if size not in self.by_size:
            with torch.inference_mode(False):  # a tensor made in that mode could be written in no other
                hidden = torch.empty(experts, width, dtype=dtype, device="cpu")
                gate, up = hidden.chunk(2, -1)
                self.by_size[size] = _Room(hidden.unbind(), gate, up)
        return self.by_size[size]


_rooms = _Rooms()


@lru_cache(maxsize=16)
def _numbered(experts: int, width: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """The rows of Down that are an expert's, [s] each; where the only bag begins."""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.arange(experts * width).view(experts, width).unbind(), torch.zeros(1, dtype=torch.int64)


class TokenExperts:
    """The experts of one layer for one token. Holds views of [E, 2s, H] and [E, s, H] as long as these parameters live where they
    are: whoever brings weights and takes them away again gets their memory back. A copy, or what a file holds, begins without."""

    def __init__(self) -> None:
        self._matrices: _Matrices | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def forget(self) -> None:
        """Let go of the weights."""
        self._matrices = None

    def fits(self, x: Tensor, gate_up_proj: Tensor, down_rows: Tensor) -> bool:
        """Whether a call takes these: a plain x, and contiguous plain parameters in its dtype. Looks at new ones alone."""
        if not type(gate_up_proj) is type(down_rows) is nn.Parameter:  # others may lie nowhere, or in several places
            return False
        places, kept = (gate_up_proj.data_ptr(), down_rows.data_ptr()), self._matrices
        if kept is None or kept.places != places or kept.dtype != gate_up_proj.dtype:
            self._matrices = kept = None
            up, down = gate_up_proj.detach(), down_rows.detach()
            if up.is_cpu and up.is_contiguous() and down.is_contiguous() and is_plain(up, down) and up.numel():
                owners = tuple(ref(weights, lambda _: self.forget()) for weights in (gate_up_proj, down_rows))
                views = up.unbind(), down.transpose(1, 2).unbind(), down.view(-1, down.shape[2])
                self._matrices = kept = _Matrices(places, owners, up.dtype, *views)
        return kept is not None and kept.dtype == x.dtype

    def __call__(self, x: Tensor, experts: Sequence[int], activation: str) -> Tensor:
        """The sum of these experts' outputs, without a gradient, after ``fits``.

        Args:
            x: [H]
            experts: different ones, or none.
            activation: an ACT2FN name.

        Returns:
            y [H]
        """
        assert self._matrices is not None, "not asked whether they fit"
        if not experts:
            return torch.zeros_like(x)
        up, down, weight = self._matrices[-3:]
        H, s = down[0].shape
        room = _rooms.of(len(experts), 2 * s, x.dtype)
        for row, e in zip(room.rows, experts, strict=True):
            torch.mv(up[e], x, out=row)
        hidden = find_activation(activation).forward(room.gate).mul_(room.up)  # [K, s]
        if sums_rows(len(experts), H * s, x.dtype):
            numbers, start = _numbered(len(up), s)
            rows = torch.cat([numbers[e] for e in experts])
            return torch.embedding_bag(weight, rows, start, False, 0, False, hidden.view(-1))[0][0]
        y = torch.mv(down[experts[0]], hidden[0])
        for h, e in zip(hidden[1:].unbind(), experts[1:], strict=True):
            y.addmv_(down[e], h)
        return y
