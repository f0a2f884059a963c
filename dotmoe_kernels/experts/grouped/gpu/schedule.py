# mypy: disable-error-code="no-untyped-def"
"""Which tile a program of a grouped product takes, found on the device from the offsets alone: where no sort left a table of them
(``dispatch/gpu/tiles.py``).

The rows of group e are [offsets[e], offsets[e + 1]). A launch has ``most_row_tiles`` row tiles times ``columns`` programs, whatever
the routing; those beyond the last tile return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick_tile(
    program,
    offsets_ptr,  # [E + 1]
    E,
    end,  # rows behind offsets[E] up to here are a group E of their own, where REST
    columns,  # tiles across the columns of an output
    REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # a power of two above E
    GROUP_M: tl.constexpr,
):
    """(group, first row, row behind the group's last, column tile); a group above the last one means no work.

    Up to GROUP_M row tiles of a group take one slice of its weights together, then the next slice: both stay in L2."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + tl.minimum(e, E)).to(tl.int32)
    stop = tl.load(offsets_ptr + tl.minimum(e + 1, E)).to(tl.int32)  # no rows above E
    if REST:
        stop = tl.where(e == E, end, stop)
    tiles = (stop - begin + BLOCK_M - 1) // BLOCK_M  # [BLOCK_E]
    behind = tl.cumsum(tiles, 0).to(tl.int64) * columns
    group = tl.sum((behind <= program).to(tl.int32), 0)  # BLOCK_E if there are not that many tiles
    mine = e == group
    first = tl.sum(tl.where(mine, begin, 0), 0)
    last = tl.sum(tl.where(mine, stop, 0), 0)
    count = tl.maximum(tl.sum(tl.where(mine, tiles, 0), 0), 1)
    local = (program - tl.sum(tl.where(mine, behind - tiles.to(tl.int64) * columns, 0), 0)).to(tl.int32)
    band = local // (GROUP_M * columns)
    height = tl.minimum(count - band * GROUP_M, GROUP_M)
    height = tl.maximum(height, 1)
    local -= band * GROUP_M * columns
    return group, first + (band * GROUP_M + local % height) * BLOCK_M, last, local // height
