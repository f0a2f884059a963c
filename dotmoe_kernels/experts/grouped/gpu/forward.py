"""The grouped path in Triton, forward: sort, up product, down product, sum of a token's rows. Four ways to do the last two.

    y_t = sum_j w_tj Down_e h[slot of (t, j)]

Routing weights are applied in float32: with the sums, to the hidden before it is rounded ("dense"), or to the down product.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...._tiles import REDUCTION_CHUNK, SUM_WORKSPACE, before_hopper, grouped_mm_form, grouped_up_form, grouped_up_tile
from ...._tiles import reduction as pick_reduction
from ....dispatch.gpu.rows import gather_rows
from ....dispatch.gpu.sort import MOST_EXPERTS, sort_into_tiles
from ....dispatch.gpu.tiles import RowTiles, row_tiles
from ....dispatch.operators import sort_slots_op
from ....permutation import has_dense_view
from ...masked.gpu.hidden import expert_mask
from .down import add_product, grouped_product
from .up import up_product


def dense_down(down_proj: Tensor) -> Tensor:
    """The [F, H] view of a ``down_proj`` [E, H, s] that is stored as [E, s, H] or as [H, E, s]."""
    E, H, s = down_proj.shape
    if down_proj.transpose(1, 2).is_contiguous():
        return down_proj.transpose(1, 2).view(E * s, H)
    return down_proj.transpose(0, 1).view(H, E * s).T


def part_of(H: int, column: int, workspace: int) -> int:
    """How many of H columns of ``column`` bytes fit, a multiple of 128 and at least that: the fewest parts, of even size."""
    blocks, most = triton.cdiv(H, 128), max(1, workspace // (128 * column))
    return 128 * triton.cdiv(blocks, triton.cdiv(blocks, most))


def token_sums(
    a: Tensor,
    b: Tensor,
    weights: Tensor | None,
    slot_of: Tensor,
    offsets: Tensor,
    workspace: int | None,
    tiles: RowTiles | None = None,
    form: str = "",
) -> Tensor:
    """y_t = sum over the slots p of t of w_p a[p] B_e; a [S, Kdim], b [E, Kdim, H] -> [T, H].

    The rows a[p] B_e take at most ``workspace`` bytes at a time (None: a default), but at least 128 columns. form: of
    ``grouped_product``; empty: that of ``_tiles``."""
    S, (E, Kdim, H) = a.shape[0], b.shape
    form = form or grouped_mm_form(S, E, Kdim, H, a.dtype)
    if form == "table" and tiles is None:
        form = "tiles"
    columns = part_of(H, S * a.element_size(), SUM_WORKSPACE if workspace is None else workspace)
    y = a.new_empty(slot_of.shape[0], H)
    for left in range(0, H, columns):
        rows = grouped_product(a, b[:, :, left : left + columns], offsets, zero=False, form=form, tiles=tiles)
        gather_rows(rows, weights, slot_of, offsets, y[:, left : left + columns])
        del rows  # before the next ones are made
    return y


def sort_for(x: Tensor, gate_up: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, RowTiles]:
    """``sort_slots``, and the row tiles of the up product."""
    E, width, _ = gate_up.shape
    S = indices.numel()
    block = grouped_up_tile(S, E, width // 2, x.dtype, early=before_hopper(x.device)).block
    if E <= MOST_EXPERTS:
        return sort_into_tiles(indices, E, block["BLOCK_M"], block["GROUP_M"])
    token, source, offsets, slot_of = sort_slots_op(indices, E)
    return token, source, offsets, slot_of, row_tiles(offsets, S, block["BLOCK_M"], block["GROUP_M"])


def grouped_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    indices: Tensor,
    weights: Tensor | None,
    activation: str,
    reduction: str = "",
    workspace: int | None = None,
    up_form: str = "",
    down_form: str = "",
) -> Tensor:
    """x [T, H] -> y [T, H]; the arguments of the operator. up_form "halves" or "joint", down_form "tiles", "table" or "stationary":
    the kernels of the reduction "rows"; empty: those of ``_tiles``."""
    (T, H), (E, width), K = x.shape, gate_up.shape[:2], indices.shape[1]
    if T * H * K * E * width == 0:
        return x.new_zeros(T, H)
    how = reduction or pick_reduction(E, width // 2, K, T, x.dtype)
    if how == "dense" and not has_dense_view(down):
        how = "rows"
    if how == "chunks":
        return _in_chunks(x, gate_up, down, indices, weights, activation)
    form = "halves" if how != "rows" else up_form or grouped_up_form(indices.numel(), E, width // 2, H, x.dtype)
    tiles = None
    if form == "joint" or down_form == "table":
        token, source, offsets, slot_of, tiles = sort_for(x, gate_up, indices)
    else:
        token, source, offsets, slot_of = sort_slots_op(indices, E)
    if how == "dense":
        # an expert that a token names twice has one place in h: both slots write the sum of its weights there
        r = expert_mask(indices, weights, E, torch.float32)  # [T, E]
        entry = token * E + indices.reshape(-1)[source]
        h, _ = up_product(x, gate_up, token, offsets, activation, dense=True, source=entry, weights=r)
        return h @ dense_down(down)
    h, _ = up_product(x, gate_up, token, offsets, activation, tiles=tiles if form == "joint" else None)
    if how == "atomics":
        y = torch.zeros(T, H, dtype=torch.float32, device=x.device)
        add_product(h, down, offsets, y, token, source, weights)
        return y.to(x.dtype)
    return token_sums(h, down.transpose(1, 2), weights, slot_of, offsets, workspace, tiles, down_form)


def _in_chunks(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor | None, activation: str) -> Tensor:
    """Some tokens and columns at a time: the rows [S_c, columns] are summed while they are in L2. Counts depend on shapes alone."""
    (T, H), E = x.shape, gate_up.shape[0]
    tokens, columns = REDUCTION_CHUNK
    y = x.new_empty(T, H)
    for first in range(0, T, tokens):
        part = slice(first, first + tokens)
        token, _, offsets, slot_of = sort_slots_op(indices[part], E)
        h, _ = up_product(x[part], gate_up, token, offsets, activation)
        w = None if weights is None else weights[part]
        for left in range(0, H, columns):
            ys = grouped_product(h, down[:, left : left + columns].transpose(1, 2), offsets, zero=False)
            gather_rows(ys, w, slot_of, offsets, y[part, left : left + columns])
    return y
