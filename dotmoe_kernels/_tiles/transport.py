"""Tiles of rounding and of the transport's kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .hardware import BACKEND, GPU, H200, Span, power_of_two
from .launches import Floor, Launch, times, together

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
    "persistent": (5120, 2),
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
    if kernel == "persistent":  # all that are launched must run at once
        blocks |= {"FIRST_F": max(4, blocks["BLOCK_F"] // 2), "BLOCK_P": 32}
        if backend == "cuda" and "maxnreg" not in options:  # else the compiler spills some registers to fit three
            programs, options["maxnreg"] = 1, 255
    on_gpu = device is not None and device.type == "cuda"
    return TransportTiles(
        blocks, options, programs * (torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 3)
    )


def steps_seconds(form: str, L: int, F: int, E: int, steps: int, gpu: GPU) -> Span:
    """PREDICTED time of so many Sinkhorn steps: a launch a step ("streaming"), or a barrier a step in one launch ("persistent")."""
    kernel = "persistent" if form == "persistent" else "step"
    elements, programs = _TRANSPORT[kernel]
    tiles = transport_tiles(E, kernel, "cuda")._replace(wave=programs * gpu.multiprocessors)
    size, (each, _) = 4.0 * L * F * E, tiles.split(F, L)
    looks = -(-each // tiles.blocks.get("BLOCK_P", 16))  # at the other programs' sums, one after the other
    floor = Floor(barriers=30 + 2 * looks, shuffles=40, accesses=2 + looks)  # of the column tiles' sums, in the SASS of sm_90
    memory = size if size > 0.8 * gpu.l2_bytes else 0.0
    one = Launch(memory, 10.0 * L * F * E, each * L, programs, floor, size, product=False).seconds(gpu)
    if form == "streaming":
        return times(steps, one)
    met = Span(one.low - gpu.launch.low + gpu.barrier.low, one.high - gpu.launch.high + gpu.barrier.high)
    return together(gpu.launch, times(steps, met))


@lru_cache(maxsize=1024)
def _faster_form(L: int, F: int, E: int, num_iters: int) -> str:
    return min(("persistent", "streaming"), key=lambda form: steps_seconds(form, L, F, E, num_iters, H200).middle)


def transport_form(L: int, F: int, E: int, num_iters: int, device: torch.device) -> str:
    """Of the steps of a call: "persistent" where all layers' programs run at once and it is predicted faster, on NVIDIA's GPUs."""
    if device.type != "cuda" or BACKEND != "cuda" or num_iters < 2:
        return "streaming"
    if transport_tiles(E, "persistent", device=device).wave < L:
        return "streaming"
    return _faster_form(L, F, E, num_iters)


def gram_tiles(E: int, backend: str = BACKEND) -> tuple[dict[str, int], dict[str, Any]]:
    block = min(64, max(16, power_of_two(E)))
    warps = {16: 1, 32: 2, 64: 4}[block]
    return {"BLOCK_M": block, "BLOCK_K": 32}, {"num_warps": max(1, warps // 2) if backend == "hip" else warps, "num_stages": 2}
