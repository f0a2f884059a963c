"""Tiles of the experts' kernels by path: decode, masked, grouped."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .hardware import BACKEND, power_of_two

# decode: programs that a launch should have, so that their loads together cover the memory's latency; tokens that a tile can hold
_DECODE_PROGRAMS = 512
MOST_DECODE_TOKENS = 64


class DecodeTile(NamedTuple):
    """Tiles of the up and the down product, and how many programs share a column of y."""

    up: dict[str, int]  # BLOCK_T, BLOCK_S, BLOCK_K, BLOCK_J, BLOCK_E, BLOCK_P, STAGES
    up_options: dict[str, Any]
    down: dict[str, int]  # BLOCK_T, BLOCK_H, BLOCK_K, STAGES
    down_options: dict[str, Any]
    splits: int


def decode_tile(T: int, H: int, E: int, s: int, K: int, itemsize: int, backend: str = BACKEND) -> DecodeTile:
    """A vector of one token, or all tokens as one tile of the matrix units; float32 has no such unit and takes smaller ones."""
    most = min(E, T * K)  # experts that can be chosen
    block_t = 1 if T == 1 else max(16, power_of_two(T))
    narrow = itemsize > 2
    if T == 1:
        up = {"BLOCK_S": 8, "BLOCK_K": min(256 if narrow else 512, max(16, power_of_two(H)))}
        down = {"BLOCK_H": min(128, max(16, power_of_two(H))), "BLOCK_K": 32}
    else:
        wide = most * s >= 32 * _DECODE_PROGRAMS and not narrow
        up = {"BLOCK_S": 32 if wide else 16, "BLOCK_K": min(32 if narrow else 128, max(16, power_of_two(H)))}
        down = {"BLOCK_H": min(64 if narrow else 128, max(16, power_of_two(H))), "BLOCK_K": 32 if narrow else 64}
    down["BLOCK_K"] = min(down["BLOCK_K"], max(16, power_of_two(s)))
    columns, steps = -(-H // down["BLOCK_H"]), most * -(-s // down["BLOCK_K"])
    splits = power_of_two(max(1, min(_DECODE_PROGRAMS // columns, steps, 16)) + 1) // 2
    block_j = min(64, power_of_two(K)) if T == 1 else min(max(1, 1024 // block_t), power_of_two(K))
    lists = {"BLOCK_J": block_j, "BLOCK_E": max(64, power_of_two(E)), "BLOCK_P": min(1024, max(64, power_of_two(T * K)))}
    common, options = {"BLOCK_T": block_t, "STAGES": 2 if backend == "hip" else 4}, {"num_warps": 4}
    return DecodeTile({**common, **up, **lists}, options, {**common, **down}, options, splits)


def mask_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile [BLOCK_T, BLOCK_E] of the mask R."""
    block = min(128, max(16, power_of_two(E)))
    return {"BLOCK_T": 2048 // block, "BLOCK_E": block}, {"num_warps": 4}


def masked_tile(kernel: str, F: int, E: int = 1, narrow: bool = False) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile of the masked hidden layer: "hidden" [BLOCK_T, BLOCK_F]; "backward" and "plan" with sums over all E experts as well, for
    BLOCK_T tokens and BLOCK_F neurons. ``narrow``: float32, whose products take more registers."""
    if kernel == "hidden":
        return {"BLOCK_T": 8, "BLOCK_F": min(256, max(16, power_of_two(F)))}, {"num_warps": 4}
    block_e = max(16, power_of_two(E))
    rows = max(16, min(64, (4096 if narrow else 16384) // block_e))  # of the sums, which stay in registers
    along = 32 if narrow or block_e > 128 else 64
    kept, passing = ("BLOCK_T", "BLOCK_F") if kernel == "backward" else ("BLOCK_F", "BLOCK_T")
    rows = rows if kernel == "backward" else min(rows, max(16, power_of_two(F)))
    return {kept: rows, passing: along, "BLOCK_E": block_e}, {"num_warps": 8, "num_stages": 2}


def masked_up_tile(T: int, s: int, backend: str = BACKEND) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile of the masked up product in 16 bits: BLOCK_T tokens, BLOCK_S neurons of gate and of up, BLOCK_K of H."""
    if backend == "hip":
        return {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_K": 32}, {"num_warps": 4, "num_stages": 2}
    if T <= 64 or s <= 64:
        return {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_K": 64}, {"num_warps": 4, "num_stages": 4}
    return {"BLOCK_T": 128, "BLOCK_S": 128, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 3}


def columns_tile(F: int, itemsize: int, backend: str = BACKEND) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of F that is ordered on the chip, or parts of it, which few programs, with many warps each, read through a cache."""
    block = max(16, power_of_two(F))
    whole = block * itemsize <= 2**16 // (2 if backend == "hip" else 1)
    return {"WHOLE": whole, "BLOCK_F": block if whole else 4096}, {"num_warps": 16 if block >= 16384 else 4}


def slots_tile(s: int) -> tuple[dict[str, int], dict[str, Any]]:
    """BLOCK_P slots, BLOCK_N of an expert's neurons."""
    block = min(128, max(16, power_of_two(s)))
    return {"BLOCK_P": 2048 // block, "BLOCK_N": block}, {"num_warps": 4}


def masked_splits(kept: int, passing: int, block_kept: int, block_passing: int) -> tuple[int, int]:
    """(programs that share a tile of sums, rows that pass through each of them); every program has rows. So many that the last
    wave of them leaves little of a GPU idle."""
    wanted = max(1, min(8, 1200 // -(-kept // block_kept)))
    share = -(-passing // (wanted * block_passing)) * block_passing
    return -(-passing // share), share


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
