"""The only place that knows hardware: which path and which tile shapes fit a size and a device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

BACKEND = "hip" if torch.version.hip else "cuda"

# of one H200, measured elsewhere: what predictions are made from
H200_BANDWIDTH = 4.3e12  # bytes/s, device copy, read plus written
H200_BF16 = 790e12  # flops/s, bfloat16 matrix product
NVLINK = 450e9  # bytes/s a direction between two GPUs of a machine, as published
NETWORK = 50e9  # bytes/s a direction and GPU between machines, as published of 400 Gbit/s adapters
GPUS_A_MACHINE = 8
TRITON_SHARE = 0.75  # of that rate, which a product in Triton reaches [estimate]

# bytes of one float32 [tokens, vocabulary] of a chunk of the distillation loss: a core's cache; what keeps a GPU's product busy
LOSS_CHUNK = {"cpu": 1 << 20, "cuda": 1 << 28}

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


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def column_blocks(E: int) -> tuple[int, int]:
    """(BLOCK_E, BLOCK_R): E columns as one power of two, or as two where that leaves fewer idle: 148 = 128 + 20 -> (128, 32)."""
    whole = max(16, _power_of_two(E))
    main = whole // 2
    rest = max(16, _power_of_two(E - main))
    return (main, rest) if main >= 16 and main + rest < whole else (whole, 0)


def transport_tiles(E: int, kernel: str, backend: str = BACKEND, device: torch.device | None = None) -> TransportTiles:
    main, rest = column_blocks(E)
    elements, programs = _TRANSPORT[kernel]
    blocks = {"BLOCK_E": main, "BLOCK_R": rest, "BLOCK_F": min(128, max(4, _power_of_two(elements // (main + rest) + 1) // 2))}
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
    block = min(64, max(16, _power_of_two(E)))
    warps = {16: 1, 32: 2, 64: 4}[block]
    return {"BLOCK_M": block, "BLOCK_K": 32}, {"num_warps": max(1, warps // 2) if backend == "hip" else warps, "num_stages": 2}


def dispatch_tiles(E: int) -> tuple[dict[int, dict[str, int]], dict[str, int], dict[str, Any]]:
    """Most pairs -> tile of pairs and experts; tile of the scan over blocks; launch options. More pairs take several blocks.

    A block is sorted on the chip: twice the pairs take a fifth more steps a pair, but make runs twice as long to write."""
    block_e = max(64, _power_of_two(E))
    return {S: {"BLOCK_S": S, "BLOCK_E": block_e} for S in (64, 256, 1024)}, {"BLOCK_B": 1024}, {"num_warps": 4}


def dispatch_tile(S: int, E: int) -> tuple[dict[str, int], dict[str, int], dict[str, Any]]:
    tiles, scan, options = dispatch_tiles(E)
    return next((tile for most, tile in tiles.items() if most >= S), tiles[max(tiles)]), scan, options


def row_tile(H: int, dtype: torch.dtype) -> tuple[dict[str, int], dict[str, Any]]:
    """A part of one row, for copies and sums of rows: 16 bytes a thread in 16 bits, 32 in wider types."""
    most = 512 if dtype == torch.float64 else 1024
    return {"BLOCK_H": min(most, max(16, _power_of_two(H)))}, {"num_warps": 4}


# routing: elements of a tile of whole rows for 128 threads; a sort keeps 64-bit keys of them, LapSum a dozen float64 values
_ROUTING = {"top_k": 1024, "soft": 512}


def _routing_tile(E: int, kernel: str) -> tuple[dict[str, int], dict[str, Any]]:
    block_e = max(16, _power_of_two(E))
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
    block_e = max(16, _power_of_two(E))
    return {"BLOCK_P": max(8, 8192 // block_e), "BLOCK_E": block_e}, {"num_warps": 8, "num_stages": 1}


def multiplies_into_float32(x: torch.Tensor) -> bool:
    """Whether one product of PyTorch's takes 16-bit tensors like ``x`` and leaves their sums in float32."""
    return BACKEND == "cuda" and x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16)


def routing_programs(device: torch.device) -> int:
    """As many as run at once; each leaves one row of sums."""
    return 4 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1)


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
    block_t = 1 if T == 1 else max(16, _power_of_two(T))
    narrow = itemsize > 2
    if T == 1:
        up = {"BLOCK_S": 8, "BLOCK_K": min(256 if narrow else 512, max(16, _power_of_two(H)))}
        down = {"BLOCK_H": min(128, max(16, _power_of_two(H))), "BLOCK_K": 32}
    else:
        wide = most * s >= 32 * _DECODE_PROGRAMS and not narrow
        up = {"BLOCK_S": 32 if wide else 16, "BLOCK_K": min(32 if narrow else 128, max(16, _power_of_two(H)))}
        down = {"BLOCK_H": min(64 if narrow else 128, max(16, _power_of_two(H))), "BLOCK_K": 32 if narrow else 64}
    down["BLOCK_K"] = min(down["BLOCK_K"], max(16, _power_of_two(s)))
    columns, steps = -(-H // down["BLOCK_H"]), most * -(-s // down["BLOCK_K"])
    splits = _power_of_two(max(1, min(_DECODE_PROGRAMS // columns, steps, 16)) + 1) // 2
    block_j = min(64, _power_of_two(K)) if T == 1 else min(max(1, 1024 // block_t), _power_of_two(K))
    lists = {"BLOCK_J": block_j, "BLOCK_E": max(64, _power_of_two(E)), "BLOCK_P": min(1024, max(64, _power_of_two(T * K)))}
    common, options = {"BLOCK_T": block_t, "STAGES": 2 if backend == "hip" else 4}, {"num_warps": 4}
    return DecodeTile({**common, **up, **lists}, options, {**common, **down}, options, splits)


def mask_tile(E: int) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile [BLOCK_T, BLOCK_E] of the mask R."""
    block = min(128, max(16, _power_of_two(E)))
    return {"BLOCK_T": 2048 // block, "BLOCK_E": block}, {"num_warps": 4}


def masked_tile(kernel: str, F: int, E: int = 1, narrow: bool = False) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile of the masked hidden layer: "hidden" [BLOCK_T, BLOCK_F]; "backward" and "plan" with sums over all E experts as well, for
    BLOCK_T tokens and BLOCK_F neurons. ``narrow``: float32, whose products take more registers."""
    if kernel == "hidden":
        return {"BLOCK_T": 8, "BLOCK_F": min(256, max(16, _power_of_two(F)))}, {"num_warps": 4}
    block_e = max(16, _power_of_two(E))
    rows = max(16, min(64, (4096 if narrow else 16384) // block_e))  # of the sums, which stay in registers
    along = 32 if narrow or block_e > 128 else 64
    kept, passing = ("BLOCK_T", "BLOCK_F") if kernel == "backward" else ("BLOCK_F", "BLOCK_T")
    rows = rows if kernel == "backward" else min(rows, max(16, _power_of_two(F)))
    return {kept: rows, passing: along, "BLOCK_E": block_e}, {"num_warps": 8, "num_stages": 2}


def masked_up_tile(T: int, s: int, backend: str = BACKEND) -> tuple[dict[str, int], dict[str, Any]]:
    """Tile of the masked up product in 16 bits: BLOCK_T tokens, BLOCK_S neurons of gate and of up, BLOCK_K of H."""
    if backend == "hip":
        return {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_K": 32}, {"num_warps": 4, "num_stages": 2}
    if T <= 64 or s <= 64:
        return {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_K": 64}, {"num_warps": 4, "num_stages": 4}
    return {"BLOCK_T": 128, "BLOCK_S": 128, "BLOCK_K": 64}, {"num_warps": 8, "num_stages": 3}


def masked_up_in_triton(T: int, num_experts: int) -> bool:
    """Whether the masked path's up product is Triton's rather than PyTorch's with a masking pass behind it. A row tile that all
    experts serve gains nothing but a pass over [T, 2F]: so PyTorch's, which is the dense FFN's own. Predicted, not measured."""
    return False


def leaves_zeros_out(T: int, E: int, s: int, K: int, H: int) -> bool:
    """Whether ``masked_ffn`` takes the products behind its mask by slots: a third of the arithmetic at 25 % active is saved, the
    rows [T K, H] of two sums are written and read, and the weights are copied in both passes. Predicted, not measured."""
    products = 6 * T * E * s * H / H200_BF16  # the three behind the mask
    saved = products * (1 - K / (TRITON_SHARE * E))
    return K > 0 and saved * H200_BANDWIDTH > 2 * (4 * T * K * H + 12 * E * s * H)  # bytes in 16 bits


def columns_tile(F: int, itemsize: int, backend: str = BACKEND) -> tuple[dict[str, Any], dict[str, Any]]:
    """A row of F that is ordered on the chip, or parts of it, which few programs, with many warps each, read through a cache."""
    block = max(16, _power_of_two(F))
    whole = block * itemsize <= 2**16 // (2 if backend == "hip" else 1)
    return {"WHOLE": whole, "BLOCK_F": block if whole else 4096}, {"num_warps": 16 if block >= 16384 else 4}


def slots_tile(s: int) -> tuple[dict[str, int], dict[str, Any]]:
    """BLOCK_P slots, BLOCK_N of an expert's neurons."""
    block = min(128, max(16, _power_of_two(s)))
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
    block_n = min(block_n, max(16, _power_of_two(width)))
    return GroupedTile(
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 16}, {"num_warps": warps, "num_stages": stages}
    )


def before_hopper(device: torch.device) -> bool:
    """Whether sums lie in the registers of the warps that multiply, without wgmma."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 9


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


def reduction(E: int, s: int, K: int, T: int, dtype: torch.dtype, backend: str = BACKEND) -> str:
    """How the grouped path adds up a token's K rows: "rows" stores them sorted by expert and sums them afterwards; "chunks" does so
    for some tokens and columns at a time, whose rows stay in L2; "dense" multiplies the dense hidden [T, E s] (no expert twice a
    token, a dense view); "atomics" adds in float32 in any order. Predicted, not measured: at L3 a chunk takes 144 launches of 5 us
    each, which eats what the cache saves, and the dense product costs 4 times the flops; so "rows" until a GPU says otherwise."""
    return "rows"


# bytes of the rows [S, columns] that are summed to y and to dx: at L3 and T = 8192 the whole [S, H] takes 1.9 GB, and every part
# of it reads the hidden rows again: [S, s] for y, 59 MB, [S, 2s] for dx
SUM_WORKSPACE = 2**30

REDUCTION_CHUNK = (2048, 256)  # tokens, columns: at K = 28 a scratch of 29 MB in 16 bits, of 50 MB of L2


# experts on a CPU: from which rows an expert (T K / E) one expert after another beats whole grouped products, and how many rows of
# several experts stay in the cache of two cores between the two products of a batch
_CPU_LOOP_ROWS = {torch.float32: 24, torch.float64: 24, torch.bfloat16: 96, torch.float16: 96}
_CPU_PADDED_ROWS = 2048
_CPU_WIDE = 256  # from which width s a product of its own costs less than reading an expert's weights for nothing


def expert_by_expert(dtype: torch.dtype, num_slots: int, num_experts: int) -> bool:
    """Whether the grouped path on a CPU finishes one expert after another instead of one product after another."""
    return num_slots >= _CPU_LOOP_ROWS[dtype] * num_experts


def padded_experts(num_experts: int, rows: int) -> int:
    """How many experts of at most ``rows`` rows go into one batched product on a CPU in 16 bits."""
    return max(1, min(num_experts, _CPU_PADDED_ROWS // max(rows, 1)))


def most_idle(width: int) -> float:
    """Up to which share of experts without rows a batched product of all of them beats one product a chosen expert."""
    return 0.6 if width < _CPU_WIDE else 0.5


_CPU_DECODE_TOKENS = 2  # in 16 bits
_CPU_GATHERED = 2**20  # elements up to which a copy of 16-bit weights costs less than a product's call for each expert


_CPU_SUMMED = 2**17  # elements of an expert's down projection up to which, in 32 bits, a product's call costs more than it saves


def sums_rows(elements: int, dtype: torch.dtype) -> bool:
    """Whether decode of one token on a CPU reads down projections of ``elements`` by rows instead of by a product an expert."""
    return dtype in (torch.bfloat16, torch.float16) or elements <= _CPU_SUMMED


def gathers_experts(elements: int, dtype: torch.dtype, device: str) -> bool:
    """Whether decode on a CPU copies the chosen experts' ``elements`` of gate and up together, for one product instead of many."""
    return device == "cpu" and dtype in (torch.bfloat16, torch.float16) and elements <= _CPU_GATHERED


# masked_ffn on a CPU: tokens from which on the zeros left out outweigh the copies of the weights; rows of an expert from which on a
# product of its own is worth its calls; rows times neurons of it from which on two threads have something to share. Without matrix
# units for them 16-bit products are slow, and so is nothing beside them; without a backward pass one product of three is spared
# instead of three of six
_SPLIT_TOKENS, _SPLIT_ROWS = 256, 16
_SPLIT_HIDDEN = {"16 bits": 8192, "both passes": 16384, "forward": 32768}


def expert_by_expert_masked(T: int, K: int, E: int, F: int, itemsize: int, learns: bool) -> bool:
    """Whether the products behind the mask go expert by expert on a CPU."""
    rows = T * K // max(E, 1)  # an expert's
    least = _SPLIT_HIDDEN["16 bits" if itemsize == 2 else "both passes" if learns else "forward"]
    return T >= _SPLIT_TOKENS and rows >= _SPLIT_ROWS and rows * F >= least * E and 2 * K <= E


class Choice(NamedTuple):
    """The path of ``expert_ffn``, and the reason in words."""

    path: str
    why: str


# on a GPU, tokens: up to where each chosen expert's weights are read once without a sort; without a dense view, up to where those
# kernels still take all rows at once; from where the arithmetic that grouped products save outweighs their padding. The first is a
# property of the kernels, the last is predicted: a dense FFN in 16 bits is bound by its weights' bytes up to T = 184 on an H200
# (790 TFLOP/s over 4.3 TB/s), and at T = 512 and 25 % active an expert has a whole tile of 128 rows
_DECODE_TOKENS, _DECODE_TOKENS_ALONE, _GROUPED_TOKENS = 16, 64, 512


def pick_path(
    T: int, E: int, s: int, K: int, H: int, dtype: torch.dtype, device: str, *, dense_view: bool, needs_grad: bool = False
) -> Choice:
    """The path of ``expert_ffn`` for x [T, H], E experts of width s and K slots a token on "cpu" or a GPU; ``dense_view``: the
    weights are the dense FFN as well."""
    if needs_grad:
        return Choice("grouped", "the path with a gradient")
    if device == "cpu":
        if T == 1:
            return Choice("decode", "one token: matrix-vector products with the chosen experts")
        if dtype in (torch.bfloat16, torch.float16):
            if T <= _CPU_DECODE_TOKENS:
                return Choice("decode", f"16 bits and T <= {_CPU_DECODE_TOKENS}: down_proj is read by rows, not expert by expert")
            return Choice("grouped", "16 bits: many experts in one batched product")
        return Choice("grouped", "reads only the experts that were chosen")
    if dtype == torch.float64:
        return Choice("grouped", "float64 has no kernels of its own")
    if T <= _DECODE_TOKENS:
        return Choice("decode", f"T <= {_DECODE_TOKENS}: every chosen expert's weights are read once, without a sort")
    if dense_view and T < _GROUPED_TOKENS and K * _DECODE_TOKENS >= E:
        return Choice("masked", "nearly every expert is chosen by some token: bound by the weights' bytes, as the dense FFN is")
    if T <= _DECODE_TOKENS_ALONE and not dense_view:
        return Choice("decode", f"T <= {_DECODE_TOKENS_ALONE} and no dense view")
    return Choice("grouped", "enough rows an expert: saves the arithmetic of the experts that a token did not choose")
