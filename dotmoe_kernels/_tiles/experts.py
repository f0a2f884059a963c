"""Tiles of the experts' kernels by path: decode, masked; ``grouped.py`` has the third."""

from __future__ import annotations

from typing import Any, NamedTuple

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
