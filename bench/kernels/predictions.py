"""PREDICTED times of the routed FFN on one H200, in bfloat16, 25 % active: arithmetic from bytes and flops, nobody measured them.

The passes are those of ``conversion/speeds.py``; the ends of a range those of ``_tiles/launches.py``, on an H100 too. Beside each
stands the limit: the bytes of the weights that a call must read, or the flops it must do, whichever takes longer.
"""

from __future__ import annotations

from typing import Any

from bench import shapes
from bench.kernels.registry import BANDWIDTH, BF16
from bench.shapes import Shape
from dotmoe_kernels._tiles import REDUCTION_CHUNK
from dotmoe_kernels._tiles.grouped import down_launch
from dotmoe_kernels._tiles.hardware import GPU, GPUS, H200, Span
from dotmoe_kernels._tiles.launches import Launch, times, together
from dotmoe_kernels.conversion.speeds import (
    LAUNCH,
    decode_span,
    dense_seconds,
    dense_span,
    grouped_span,
    grouped_up_span,
    one_pass,
    product_span,
    token_sums,
    union,
)

_ATOMICS = 0.25  # of the copy rate that float32 additions in L2 reach [estimate]
SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
REDUCTIONS = ("rows", "chunks", "dense", "atomics")


def grouped_seconds(T: int, c: Shape, reduction: str = "rows") -> float:
    """Sort, up product, and the down product with one of the reductions."""
    if reduction == "rows":
        return grouped_span(T, c, H200).middle
    S, up = T * c.K, grouped_up_span(T, c, H200, "halves")
    if reduction == "chunks":  # some tokens and columns at a time; their rows stay in L2
        tokens, columns = REDUCTION_CHUNK
        rows = min(T, tokens) * c.K
        kept = down_launch("tiles", rows, c.E, c.s, columns)._replace(bytes=2 * (c.F * columns + rows * c.s))
        sums = Launch(2 * min(T, tokens) * columns, l2=2 * rows * columns).seconds(H200)
        parts = -(-T // tokens) * -(-c.H // columns)
        return together(up, times(parts, together(kept.seconds(H200), sums))).middle
    if reduction == "dense":  # the dense hidden is zeroed, and read by a product over all F
        return together(up, Launch(2 * T * c.F).seconds(H200), product_span(T, c.F, c.H, H200)).middle
    product = down_launch("tiles", S, c.E, c.s, c.H).seconds(H200)
    added = 4 * S * c.H / _ATOMICS
    ends = Span(max(product.low, added / H200.bandwidth.high), max(product.high, added / H200.bandwidth.low))
    return together(up, Launch(6 * T * c.H).seconds(H200), ends).middle


def dense_training_seconds(T: int, c: Shape) -> float:
    """Forward; backward: dh, dDown, the SwiGLU, dx and the merged dGateUp, its products at the vendor's rate."""
    down = one_pass(2 * (c.F * c.H + T * (c.F + c.H)), 2 * T * c.F * c.H)
    up = one_pass(2 * (2 * c.F * c.H + T * (2 * c.F + c.H)), 4 * T * c.F * c.H)
    return dense_seconds(T, c) + 2 * down + one_pass(2 * 5 * T * c.F) + 2 * up


def _in_triton(size: float, flops: float) -> float:
    return Launch(size, flops).seconds(H200).middle


def training_seconds(T: int, c: Shape) -> float:
    """Forward with gate and up kept; backward: the hidden gradient, two weight gradients that gather their rows, dx."""
    S, weights = T * c.K, union(T, c) * c.F * c.H
    slots = S * c.s * c.H
    sort = 5 * LAUNCH  # and token and source in 32 bits
    up = _in_triton(2 * (2 * weights + S * (c.H + 3 * c.s)), 4 * slots)
    forward = sort + up + token_sums(T, c, c.s)
    hidden = _in_triton(2 * (weights + S * (c.H + 5 * c.s)), 2 * slots)
    down = _in_triton(2 * (c.F * c.H + S * (c.H + c.s)), 2 * slots)
    gate_up = _in_triton(2 * (2 * c.F * c.H + S * (c.H + 2 * c.s)), 4 * slots)
    return forward + hidden + down + gate_up + token_sums(T, c, 2 * c.s)


def training_limit_seconds(T: int, c: Shape) -> float:
    """Every weight read in both passes and its gradient written, or 18 flops a weight and slot."""
    return max(2 * 3 * 3 * c.F * c.H / BANDWIDTH, 18 * T * c.K * c.s * c.H / BF16)


def kept_bytes(T: int, c: Shape, itemsize: int = 2) -> int:
    """What the training pass keeps beside x and the routing weights: gate and up [S, 2s], and the routing in 32 bits."""
    S = T * c.K
    return itemsize * S * 2 * c.s + 4 * (3 * S + c.E + 1)


def grouped_mm_kept_bytes(T: int, c: Shape, itemsize: int = 2) -> int:
    """The same of transformers' grouped_mm: rows in and rows out [S, H], gate and up, the activation and the hidden [S, s]; the
    routing in 64 bits and the sorted weights are left out. A test counts it."""
    return itemsize * T * c.K * (2 * c.H + 4 * c.s)


def limit_seconds(T: int, c: Shape) -> float:
    return max(2 * 3 * union(T, c) * c.F * c.H / BANDWIDTH, 6 * T * c.K * c.s * c.H / BF16)


def _span(path: str, T: int, c: Shape, gpu: GPU) -> Span:
    if path == "masked":
        return together(dense_span(T, c, gpu), gpu.launch)
    return decode_span(T, c, gpu) if path == "decode" else grouped_span(T, c, gpu)


def experts_against_dense() -> list[dict[str, Any]]:
    """The points of the targets: op alone, without its router; on an H200 the middle of a range, and both ends on either GPU."""
    rows = []
    for c, T in [(c, T) for c in SHAPES for T in (1, 4, 16, 256, 8192)]:
        path = "decode" if T <= 16 else "masked" if T < 512 else "grouped"
        time, dense = _span(path, T, c, H200).middle, dense_span(T, c, H200).middle
        row = {"shape": f"{c.name} T {T}", "path": path, "limit_seconds": limit_seconds(T, c), "predicted_seconds": time}
        row |= {"dense_predicted_seconds": dense, "predicted_times_dense": dense / time}
        for gpu in GPUS:
            ours, other = _span(path, T, c, gpu), dense_span(T, c, gpu)
            row[f"{gpu.name}_predicted_seconds"], row[f"{gpu.name}_dense_predicted_seconds"] = list(ours), list(other)
        rows.append(row)
    return rows


def reductions() -> list[dict[str, Any]]:
    """The whole grouped path at T = 8192 with each way of adding up a token's rows."""
    return [
        {"shape": f"{c.name} T 8192", "reduction": how, "predicted_seconds": grouped_seconds(8192, c, how)}
        for c in SHAPES
        for how in REDUCTIONS
    ]


def training_against_dense() -> list[dict[str, Any]]:
    """Forward and backward at T = 8192 with all gradients, and the bytes kept in between."""
    rows = []
    for c in SHAPES:
        time, dense = training_seconds(8192, c), dense_training_seconds(8192, c)
        row = {"shape": f"{c.name} T 8192", "limit_seconds": training_limit_seconds(8192, c), "predicted_seconds": time}
        row |= {"dense_predicted_seconds": dense, "predicted_times_dense": dense / time}
        rows.append({**row, "kept_bytes": kept_bytes(8192, c), "grouped_mm_kept_bytes": grouped_mm_kept_bytes(8192, c)})
    return rows
