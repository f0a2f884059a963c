"""Tiles of the grouped path's kernels, and which of two forms of a kernel runs: by prediction, until a GPU says otherwise."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .hardware import BACKEND, H200, power_of_two
from .launches import Floor, Launch


# grouped products by rows an expert (S / E): most rows -> tile of rows. 16 bits; predicted, not measured. On sm_90 the tile
# of many rows is 128 tokens x (128 gate + 128 up): wgmma, no spill. An AMD program has 64 KB, so tiles are smaller there
class GroupedTile(NamedTuple):
    block: dict[str, int]  # BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M
    options: dict[str, Any]


_GROUPED_ROWS = (16, 32, 64)  # above: 128
_GROUPED_UP = {  # rows: (BLOCK_N of each half, BLOCK_K, warps, stages)
    "cuda": {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
    "hip": {16: (64, 64, 4, 2), 32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2)},
}
_GROUPED_MM = {  # rows: (BLOCK_N, BLOCK_K, warps, stages)
    "cuda": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3)},
    "hip": {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 2)},
}
_GROUPED_HIDDEN_BWD = {
    "cuda": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3)},
    "hip": {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 2)},
}


def _grouped_tile(table: dict[int, tuple[int, int, int, int]], rows: float, width: int, narrow: bool) -> GroupedTile:
    block_m = next((most for most in _GROUPED_ROWS if rows <= most), 128)
    block_n, block_k, warps, stages = table[block_m]
    if narrow:  # float32: no matrix units without TF32, and twice the bytes
        block_m, block_n, block_k, warps, stages = min(block_m, 64), 32 if table[block_m][0] == 64 else 64, 32, 4, 2
    block_n = min(block_n, max(16, power_of_two(width)))
    return GroupedTile(
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 16}, {"num_warps": warps, "num_stages": stages}
    )


def grouped_up_tile(
    S: int, E: int, s: int, dtype: torch.dtype, backend: str = BACKEND, *, keep: bool = False, early: bool = False
) -> GroupedTile:
    """Of S slots and E experts of width s. ``keep``: gate and up are stored too, which takes registers beside both sums;
    ``early``: a GPU ``before_hopper``. Both spill at the full width. In float32 a thread's operands are loaded for a whole BLOCK_K
    before they are multiplied: at 32 they take 384 registers beside 32 sums."""
    tile = _grouped_tile(_GROUPED_UP[backend], S / max(E, 1), s, dtype == torch.float32)
    if dtype == torch.float32:
        if backend == "cuda" and tile.block["BLOCK_N"] == 64:  # many rows of wide experts
            return GroupedTile({**tile.block, "BLOCK_K": 16}, {"num_warps": 8, "num_stages": 3})
        tile.block["BLOCK_M"] = min(tile.block["BLOCK_M"], 32)
    elif keep or early:
        tile.block["BLOCK_N"] = min(tile.block["BLOCK_N"], 64)
    return tile


def grouped_hidden_bwd_tile(S: int, E: int, s: int, dtype: torch.dtype, backend: str = BACKEND) -> GroupedTile:
    """Of S slots and E experts of width s; one tile of columns leaves the routing weights' gradient as a plain store."""
    return _grouped_tile(_GROUPED_HIDDEN_BWD[backend], S / max(E, 1), s, dtype == torch.float32)


def grouped_mm_tile(S: int, E: int, Kdim: int, N: int, dtype: torch.dtype, backend: str = BACKEND) -> GroupedTile:
    return _grouped_tile(_GROUPED_MM[backend], S / max(E, 1), N, dtype == torch.float32)


def grouped_weight_tile(
    dtype: torch.dtype, backend: str = BACKEND, *, gathered: bool = False
) -> tuple[dict[str, int], dict[str, Any]]:
    """A tile [BLOCK_K, BLOCK_N] of an expert's weight gradient, BLOCK_S rows at a time. ``gathered``: where a
    row is must be known before it is loaded, and the compiler halves the stages between the two."""
    if dtype == torch.float32 and backend == "hip":
        return {"BLOCK_K": 64, "BLOCK_N": 64, "BLOCK_S": 32}, {"num_warps": 4, "num_stages": 2}
    stages = 2 if backend == "hip" else 5 if gathered else 3
    # float32: registers as in ``grouped_up_tile``; BLOCK_K lies along the width of the experts, which are thin
    block_k, block_s = (64, 16) if dtype == torch.float32 else (128, 64)
    return {"BLOCK_K": block_k, "BLOCK_N": 128, "BLOCK_S": block_s}, {"num_warps": 8, "num_stages": stages}


# --- forms --------------------------------------------------------------------------------------------------------------

# what a program waits for before it knows its tile: found among the offsets, or read from the table that the sort left. Counted for
# sm_90 as Triton 3.6 compiles it; 3.9 leaves 12 barriers and 7 shuffles of the first
_PICK, _READ = Floor(17, 28, 1), Floor(0, 0, 1)
_WIDEST = 256  # Kdim up to which an expert's columns stay on the chip beside the rows that pass


def _row_tiles(S: int, E: int, block_m: int) -> float:
    """Expected at random routing: each expert's last tile is half empty."""
    return S / block_m + min(E, S) / 2


def up_launch(form: str, S: int, E: int, s: int, H: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """Of the up product. "halves": two products of a tile, which finds itself; "joint": one, from the table."""
    block = grouped_up_tile(S, E, s, dtype, "cuda").block
    tiles, columns = _row_tiles(S, E, block["BLOCK_M"]), -(-s // block["BLOCK_N"])
    loaded = tiles * columns * (block["BLOCK_M"] + 2 * block["BLOCK_N"]) * H
    flops = 4 * tiles * columns * block["BLOCK_M"] * block["BLOCK_N"] * H
    found = _PICK if form == "halves" else _READ
    floor = Floor(found.barriers + 4, found.shuffles, found.accesses + 3)
    slots = 1 if block["BLOCK_M"] == 128 else 2
    return Launch(2 * (2 * E * s * H + S * H + S * s), flops, tiles * columns, slots, floor, 2 * (loaded + S * s))


def down_launch(form: str, S: int, E: int, Kdim: int, N: int, dtype: torch.dtype = torch.bfloat16) -> Launch:
    """Of a product [S, Kdim] by [E, Kdim, N]. "tiles": a program a tile, which finds itself; "table": which reads it;
    "stationary": a program walks over an expert's rows."""
    tile = grouped_stationary_tile(S, E, Kdim, N, dtype) if form == "stationary" else grouped_mm_tile(S, E, Kdim, N, dtype, "cuda")
    block = tile.block
    tiles, columns = _row_tiles(S, E, block["BLOCK_M"]), -(-N // block["BLOCK_N"])
    flops = 2 * tiles * columns * block["BLOCK_M"] * block["BLOCK_N"] * Kdim
    moved = 2 * (E * Kdim * N + S * Kdim + S * N)
    rows, weights = tiles * columns * block["BLOCK_M"] * Kdim, tiles * columns * block["BLOCK_N"] * Kdim
    if form == "stationary":
        programs = E * columns * block["SHARE"]
        steps = tiles * columns / programs  # each ends with a store of its tile
        floor = Floor(2 + 4 * steps, 0, 3)
        return Launch(
            moved,
            flops,
            programs,
            1 if block["BLOCK_M"] == 128 else 2,
            floor,
            2 * (rows + programs * block["BLOCK_N"] * Kdim + S * N),
        )
    found = _PICK if form == "tiles" else _READ
    floor = Floor(found.barriers + 4, found.shuffles, found.accesses + 2)
    return Launch(moved, flops, tiles * columns, 2, floor, 2 * (rows + weights + S * N))


@lru_cache(maxsize=1024)
def grouped_up_form(S: int, E: int, s: int, H: int, dtype: torch.dtype, backend: str = BACKEND) -> str:
    """Of the up product. Float32, without matrix units, and AMD's keep the older one."""
    if backend != "cuda" or dtype == torch.float32:
        return "halves"
    return min(("joint", "halves"), key=lambda form: up_launch(form, S, E, s, H, dtype).seconds(H200).middle)


@lru_cache(maxsize=1024)
def grouped_mm_form(S: int, E: int, Kdim: int, N: int, dtype: torch.dtype, backend: str = BACKEND) -> str:
    """Of the product of the hidden rows; N: all the columns, however many are made at a time: no bit hangs on a workspace."""
    if backend != "cuda" or dtype == torch.float32:
        return "tiles"
    forms = ("stationary", "table", "tiles") if Kdim <= _WIDEST else ("table", "tiles")
    return min(forms, key=lambda form: down_launch(form, S, E, Kdim, N, dtype).seconds(H200).middle)


def grouped_stationary_tile(
    S: int, E: int, Kdim: int, N: int, dtype: torch.dtype, backend: str = BACKEND, *, early: bool = False
) -> GroupedTile:
    """An expert's columns at rest: BLOCK_K is all of Kdim. SHARE programs take an expert's rows between them: so many that the last
    wave of them leaves little of a GPU idle, and each still has several tiles."""
    rows = S / max(E, 1)
    block_m = next((most for most in _GROUPED_ROWS if rows <= most), 128)
    block_k = max(16, power_of_two(Kdim))
    wide = block_m == 128 and block_k <= 128 and not early
    block_n = min(256 if wide else 128, max(16, power_of_two(N)))
    stages = 3 if block_k <= 128 else 2
    if backend == "hip":
        block_m, stages = min(block_m, 64), 2
    share = 1
    while -(-N // block_n) * E * share < 16 * H200.multiprocessors and rows >= 8 * share * block_m:
        share *= 2
    block = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SHARE": share, "STAGES": stages}
    return GroupedTile(block, {"num_warps": 8 if block_m == 128 else 4})
