"""Tiles of routing, the soft top-k, dispatch, and copies and sums of rows."""

from __future__ import annotations

from typing import Any

import torch

from .hardware import BACKEND, power_of_two


def dispatch_tiles(E: int) -> tuple[dict[int, dict[str, int]], dict[str, int], dict[str, Any]]:
    """Most pairs -> tile of pairs and experts; tile of the scan over blocks; launch options. More pairs take several blocks.

    A block is sorted on the chip: twice the pairs take a fifth more steps a pair, but make runs twice as long to write."""
    block_e = max(64, power_of_two(E))
    return {S: {"BLOCK_S": S, "BLOCK_E": block_e} for S in (64, 256, 1024)}, {"BLOCK_B": 1024}, {"num_warps": 4}


def dispatch_tile(S: int, E: int) -> tuple[dict[str, int], dict[str, int], dict[str, Any]]:
    tiles, scan, options = dispatch_tiles(E)
    return next((tile for most, tile in tiles.items() if most >= S), tiles[max(tiles)]), scan, options


def row_tiles_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Entries of the table of row tiles that a program finds at a time, among E experts."""
    block_e = max(64, power_of_two(E))
    return {"BLOCK_E": block_e, "BLOCK_R": max(1, 2048 // block_e)}, {"num_warps": 4}


def row_tile(H: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, Any]]:
    """A part of one row, for copies and sums of rows: 16 bytes a thread in 16 bits, 32 in wider types."""
    most = 512 if dtype == torch.float64 else 1024
    return {"BLOCK_H": min(most, max(16, power_of_two(H)))}, {"num_warps": 4}


# routing: elements of a tile of whole rows for 128 threads; a sort keeps 64-bit keys of them, LapSum a dozen float64 values
_ROUTING = {"top_k": 1024, "soft": 512}


def _routing_tile(E: int, kernel: str) -> tuple[dict[str, int], dict[str, Any]]:
    block_e = max(16, power_of_two(E))
    elements = _ROUTING[kernel]
    return {"BLOCK_T": min(32, max(1, elements // block_e)), "BLOCK_E": block_e}, {"num_warps": 4, "num_stages": 1}


def routing_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    return _routing_tile(E, "top_k")


def soft_top_k_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    return _routing_tile(E, "soft")


def soft_routing_tile(E: int, backend: str = BACKEND) -> tuple[dict[str, int], dict[str, Any]]:
    tile, options = soft_top_k_tile(E)
    if backend == "cuda":  # else the compiler spills some registers to fit three programs
        options["maxnreg"] = 255
    return tile, options


def routing_finish_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    """The sums that the programs of a routing launch leave: rows of them, and columns."""
    block_e = max(16, power_of_two(E))
    return {"BLOCK_P": max(8, 8192 // block_e), "BLOCK_E": block_e}, {"num_warps": 8, "num_stages": 1}


def routing_programs(device: torch.device) -> int:
    """As many as run at once; each leaves one row of sums."""
    return 4 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)
