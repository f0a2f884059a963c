"""Tiles of rounding and of the transport's kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .hardware import BACKEND, power_of_two

# rounding: most experts -> rows and experts of a tile of proposals, experts and entries of a tile of the selection. A tile of
# proposals is as wide as a warp at most, so that each warp has rows of its own and none waits for another
_ROUNDING = {
    "cuda": {
        16: {"BLOCK_F": 256, "BLOCK_E": 16, "BLOCK_X": 8, "BLOCK_S": 256},
        512: {"BLOCK_F": 128, "BLOCK_E": 32, "BLOCK_X": 8, "BLOCK_S": 256},
    },
    "hip": {
        16: {"BLOCK_F": 256, "BLOCK_E": 16, "BLOCK_X": 8, "BLOCK_S": 256},
        512: {"BLOCK_F": 64, "BLOCK_E": 64, "BLOCK_X": 8, "BLOCK_S": 256},
    },
}


def rounding_tiles(backend: str = BACKEND) -> dict[int, tuple[dict[str, int], dict[str, Any]]]:
    """Most experts -> (tile, launch options); more experts than the last entry use the last one, in several tiles."""
    return {E: ({**tile, "SWEEP": 512}, {"num_warps": 16, "num_stages": 1}) for E, tile in _ROUNDING[backend].items()}


def rounding_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    tiles = rounding_tiles()
    return next((tile for most, tile in tiles.items() if most >= E), tiles[max(tiles)])


# transport, by kernel: elements of a row tile of 256 threads (a tile's accumulators take as many registers again), and programs a
# multiprocessor: as many as run at once, since the next launch adds up what each of them leaves
_TRANSPORT = {
    "first": (2560, 3),
    "step": (5120, 3),
    "plan": (5120, 2),
    "adjoint": (5120, 2),
    "plain": (5120, 1),
    "finish": (2560, 2),
    "stats": (5120, 2),
    "apply": (5120, 2),
}


class TransportTiles(NamedTuple):
    """Row tiles [BLOCK_F, BLOCK_E] and [BLOCK_F, BLOCK_R], and how many programs share a layer."""

    blocks: dict[str, int]  # BLOCK_E, BLOCK_R (0: none), BLOCK_F
    options: dict[str, Any]
    wave: int  # programs at a time

    def split(self, F: int, L: int) -> tuple[int, int]:
        """(programs a layer, rows of each); every program has rows."""
        block = self.blocks["BLOCK_F"]
        tiles = -(-F // block)
        programs = max(1, min(self.wave // max(L, 1), tiles, 128))
        chunk = -(-tiles // programs) * block
        return -(-F // chunk), chunk


def column_blocks(E: int) -> tuple[int, int]:
    """(BLOCK_E, BLOCK_R): E columns as one power of two, or as two where that leaves fewer idle: 148 = 128 + 20 -> (128, 32)."""
    whole = max(16, power_of_two(E))
    main = whole // 2
    rest = max(16, power_of_two(E - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)


def transport_tiles(E: int, kernel: str, backend: str = BACKEND, device: torch.device | None = None) -> TransportTiles:
    main, rest = column_blocks(E)
    elements, programs = _TRANSPORT[kernel]
    blocks = {"BLOCK_E": main, "BLOCK_R": rest, "BLOCK_F": min(128, max(4, power_of_two(elements // (main + rest) + 1) // 2))}
    options: dict[str, Any] = {"num_warps": 4 if backend == "hip" else 8, "num_stages": 1}  # 256 threads
    if kernel == "finish":  # has a matrix product, whose tiles have 16 rows
        blocks["BLOCK_F"] = max(16, blocks["BLOCK_F"])
    if backend == "cuda" and programs == 2 and main + rest <= 256:  # compilers differ, and 128 let two programs run at once
        options["maxnreg"] = 128
    on_gpu = device is not None and device.type == "cuda"
    return TransportTiles(
        blocks, options, programs * (torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 3)
    )


def gram_tiles(E: int, backend: str = BACKEND) -> tuple[dict[str, int], dict[str, Any]]:
    block = min(64, max(16, power_of_two(E)))
    warps = {16: 1, 32: 2, 64: 4}[block]
    return {"BLOCK_M": block, "BLOCK_K": 32}, {"num_warps": max(1, warps // 2) if backend == "hip" else warps, "num_stages": 2}
