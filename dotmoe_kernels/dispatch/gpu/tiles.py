# mypy: disable-error-code="no-untyped-def"
"""The table of row tiles that the sort leaves for grouped products: a program reads its tile instead of finding it.

The rows of expert e, [offsets[e], offsets[e + 1]), make tiles of BLOCK_M rows, and up to GROUP_M tiles of an expert one band. A
band takes one slice of its expert's weights together, then the next slice: both stay in L2. Entry r of the table [tiles, 4] int32,
one a row tile: its expert (-1: no work), its band's first row, the row behind the expert's last, its band's first row tile. The
programs of a band of h tiles are h * columns in a row, so the program p finds its band in entry p // columns.

Cost: 16 bytes a row tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._backend import device_guard
from ..._tiles import row_tiles_tile


class RowTiles(NamedTuple):
    """Every row tile of BLOCK_M rows, and the tiles of a band."""

    table: Tensor  # [tiles, 4] int32
    block_m: int
    group_m: int


def most_row_tiles(rows: int, groups: int, block_m: int) -> int:
    """A bound that no routing exceeds: every group with rows wastes less than one tile."""
    return triton.cdiv(rows, block_m) + min(groups, rows)


@triton.jit
def write_row_tiles(
    tiles_ptr,  # [tiles, 4]
    first,
    last,
    begin,  # [BLOCK_E] first row of each expert
    end,  # [BLOCK_E] and the row behind its last
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # entries at a time
):
    """The entries [first, last)."""
    count = (end - begin + BLOCK_M - 1) // BLOCK_M
    behind = tl.cumsum(count, 0)
    before = behind - count
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mine = (before[None, :] <= r[:, None]) & (behind[None, :] > r[:, None])  # [BLOCK_R, BLOCK_E], one expert or none
        expert = tl.sum((behind[None, :] <= r[:, None]).to(tl.int32), 1)
        used = tl.sum(mine.to(tl.int32), 1) > 0
        band = (r - tl.sum(tl.where(mine, before[None, :], 0), 1)) // GROUP_M * GROUP_M
        at = tiles_ptr + r * 4
        inside = r < last
        tl.store(at, tl.where(used, expert, -1), mask=inside)
        tl.store(at + 1, tl.sum(tl.where(mine, begin[None, :], 0), 1) + band * BLOCK_M, mask=inside)
        tl.store(at + 2, tl.sum(tl.where(mine, end[None, :], 0), 1), mask=inside)
        tl.store(at + 3, tl.sum(tl.where(mine, before[None, :], 0), 1) + band, mask=inside)


@triton.jit
def read_tile(tiles_ptr, program, columns, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr):
    """(expert, first row, row behind the expert's last, column tile); expert -1 means no work."""
    at = tiles_ptr + (program // columns) * 4
    expert = tl.load(at)
    first = tl.load(at + 1)
    end = tl.load(at + 2)
    local = program - tl.load(at + 3) * columns
    height = tl.maximum(tl.minimum((end - first + BLOCK_M - 1) // BLOCK_M, GROUP_M), 1)
    return expert, first + (local % height) * BLOCK_M, end, local // height


@triton.jit(do_not_specialize=["E", "tiles"])
def _row_tiles_kernel(
    offsets_ptr,  # [E + 1]
    tiles_ptr,  # [tiles, 4]
    E,
    tiles,
    BLOCK_M: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The table from offsets that another sort left."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + tl.minimum(e, E)).to(tl.int32)
    end = tl.load(offsets_ptr + tl.minimum(e + 1, E)).to(tl.int32)  # no rows from expert E on
    first = tl.program_id(0) * BLOCK_R
    write_row_tiles(tiles_ptr, first, tl.minimum(first + BLOCK_R, tiles), begin, end, BLOCK_M, GROUP_M, BLOCK_R)


def empty_table(rows: int, num_experts: int, block_m: int, device: torch.device) -> Tensor:
    return torch.empty(most_row_tiles(rows, num_experts, block_m), 4, dtype=torch.int32, device=device)


def row_tiles(offsets: Tensor, rows: int, block_m: int, group_m: int) -> RowTiles:
    """Of ``rows`` slots of the experts whose ``offsets`` [E + 1] are given."""
    E = offsets.numel() - 1
    table = empty_table(rows, E, block_m, offsets.device)
    if len(table):
        block, options = row_tiles_tile(E)
        with device_guard(offsets):
            _row_tiles_kernel[(triton.cdiv(len(table), block["BLOCK_R"]),)](
                offsets.contiguous(), table, E, len(table), BLOCK_M=block_m, GROUP_M=group_m, **block, **options
            )
    return RowTiles(table, block_m, group_m)
