"""PREDICTED times of a step of alignment on one H200, in bfloat16: arithmetic from bytes, flops and round trips, not measured.

A pass takes the longer of its bytes over the copy rate and its flops over the matrix rate (``registry.py``), products of
PyTorch's the full rate. The counts of passes are read off the code: an elementwise operation of PyTorch reads and writes whole
tensors. Transport and rounding are the registry's kernels, with all 50 Sinkhorn steps, though a warm start takes fewer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bench import shapes
from bench.alignment import PARTS, STEPS
from bench.kernels import KERNELS
from bench.kernels.predictions import token_sums
from bench.kernels.registry import BANDWIDTH, BF16, FP32
from bench.shapes import Shape
from dotmoe_kernels._tiles import leaves_zeros_out

_ATTENTION = 0.6  # of the matrix rate that causal attention reaches [estimate]
_GREEDY_LOOP = 0.6  # seconds a layer of Q25 of the argsort and Python loop, as measured on a CPU; L3's in proportion to F E
_RATIOS = {
    "transport_and_rounding_share": "transport + rounding, share",
    "eager_over_ours": "step: eager / ours",
    "eager_over_ours_without_rounding": "without rounding",
    "masked_ffn_over_frozen_dense": "masked FFN / frozen dense",
    "eager_over_masked_ffn": "eager / masked FFN",
}


class Backbone(NamedTuple):
    """A whole model: what it is called in the registry, FFN, layers, vocabulary, width of all keys, tokens of a sequence."""

    batch: str
    ffn: Shape
    layers: int
    vocabulary: int
    keys: int
    length: int = 2048


BACKBONES = (Backbone("Q25 x 28", shapes.Q25, 28, 152064, 512), Backbone("L3 x 32", shapes.L3, 32, 128256, 1024))
TOKENS = (8192, 16384)  # a micro-batch; the paper's 64 x 2048 on eight GPUs


def _product(T: int, a: int, b: int) -> float:
    return max(2 * (T * (a + b) + a * b) / BANDWIDTH, 2 * T * a * b / BF16)


def _passes(count: float, T: int, width: int, itemsize: int = 2) -> float:
    return count * T * width * itemsize / BANDWIDTH


def ffn_forward(T: int, c: Shape, passes: float) -> float:
    """Three products and ``passes`` over [T, F] between them."""
    return 3 * _product(T, c.H, c.F) + _passes(passes, T, c.F)


def ffn_backward(T: int, c: Shape, passes: float) -> float:
    """To the input alone."""
    return 3 * _product(T, c.H, c.F) + _passes(passes, T, c.F) + _passes(3, T, c.H)


def masked_ffn_seconds(T: int, c: Shape, *, all_products: bool = False) -> float:
    """With the mask's zeros left out where that pays: a copy of the weights in either pass, gate and up, the slots' hidden, its
    sums; back dU^, one pass (3) for the router's and the plan's gradients, the slots' gradients, their sums. Else silu, up and mask
    in one pass (3); back one pass (5) with the router's gradient, and one (3) with the plan's. A thin product [T, F] x [F, E] lies
    beside each of those gradients."""
    thin = max(0.0, 2 * T * c.F * c.E / BF16 - 3 * 2 * T * c.F / BANDWIDTH)
    if all_products or not leaves_zeros_out(T, c.E, c.s, c.K, c.H):
        return ffn_forward(T, c, 3) + ffn_backward(T, c, 8) + 2 * thin
    copies = 2 * _passes(6, c.F, c.H)
    dense = 3 * _product(T, c.H, c.F) + _passes(3, T, c.F) + thin
    slots = _passes(3 + 5, T * c.K, c.s) + token_sums(T, c, c.s) + token_sums(T, c, 2 * c.s)
    return copies + dense + slots


def frozen_dense_seconds(T: int, c: Shape) -> float:
    """silu (2) and a product (3); back the product's two gradients (6) and silu's (3)."""
    return ffn_forward(T, c, 5) + ffn_backward(T, c, 9)


def eager_ffn_seconds(T: int, c: Shape) -> float:
    """Beside the dense FFN's passes: R M^T [T, F] written, U times it (3); back the gradients of that product (6), then dR and dM
    (2); three thin products; M and its straight-through terms over [F, E] (12)."""
    thin = 3 * _product(T, c.E, c.F)
    return ffn_forward(T, c, 5 + 4) + ffn_backward(T, c, 9 + 8) + thin + _passes(12, c.F, c.E)


def _attention(T: int, b: Backbone, factor: float) -> float:
    """``factor``: of the scores' flops, 1 forward and 2.5 backward."""
    H = b.ffn.H
    scores = factor * 2 * T * b.length * H / (_ATTENTION * BF16)  # two products, the half below the diagonal
    return 2 * _product(T, H, H) + 2 * _product(T, H, b.keys) + scores + _passes(12 * factor, T, H)


def _norms(T: int, b: Backbone) -> float:
    """Two norms in five operations in float32."""
    return _passes(2 * 10, T, b.ffn.H, 4)


def _loss(T: int, b: Backbone, passes: float) -> float:
    return 3 * _product(T, b.ffn.H, b.vocabulary) + _passes(passes, T, b.vocabulary, 4)


def _sinkhorn(b: Backbone) -> float:
    def of(name: str) -> float:
        return KERNELS[f"sinkhorn_{name}"].costs[b.batch].seconds().middle

    forward = of("first_step") + (STEPS - 1) * of("step") + of("plan")
    return forward + of("adjoint_start") + (STEPS - 1) * of("adjoint_step") + of("adjoint_finish")


def _adamw(b: Backbone) -> float:
    """A's, in about 20 passes, its norm and the clipping in three."""
    return _passes(23, b.layers * b.ffn.F, b.ffn.E, 4)


def split(T: int, b: Backbone) -> dict[str, float]:
    """Seconds of a step of T tokens by part, ours."""
    L, c = b.layers, b.ffn
    block = ffn_forward(T, c, 5) + _attention(T, b, 1) + _norms(T, b)
    return {
        "teacher": L * block,
        "transport": _sinkhorn(b),
        "rounding": KERNELS["rounding"].costs[b.batch].seconds().middle,
        "masked FFN": L * masked_ffn_seconds(T, c),
        "attention": L * (_attention(T, b, 1) + _attention(T, b, 2.5)),
        "norms": L * 3 * _norms(T, b),
        "loss": _loss(T, b, 23),
        "optimizer": _adamw(b),
    }


def eager_split(T: int, b: Backbone) -> dict[str, float]:
    """The same of the plain reproduction. A Sinkhorn step takes two logsumexp over [F, E] of 7 passes, back 8 each; the loss keeps
    both logits whole, in about 30 passes."""
    c = b.ffn
    size = b.layers * c.F
    return split(T, b) | {
        "transport": max(_passes(2 * (7 + 8) * STEPS, size, c.E, 4), 2 * 30 * STEPS * size * c.E / FP32),
        "rounding": _GREEDY_LOOP * b.layers * c.F * c.E / (shapes.Q25.F * shapes.Q25.E),
        "masked FFN": b.layers * eager_ffn_seconds(T, c),
        "loss": _loss(T, b, 30),
    }


def steps() -> list[dict[str, Any]]:
    """By model and tokens a step: both splits, and what the targets ask for."""
    rows = []
    for b, T in [(b, T) for b in BACKBONES for T in TOKENS]:
        ours, eager = split(T, b), eager_split(T, b)
        total = sum(ours.values())
        rows.append(
            {
                "shape": f"{b.batch} T {T}",
                "ours_predicted_seconds": ours,
                "eager_predicted_seconds": eager,
                "transport_and_rounding_share": (ours["transport"] + ours["rounding"]) / total,
                "eager_over_ours": sum(eager.values()) / total,
                "eager_over_ours_without_rounding": (sum(eager.values()) - eager["rounding"]) / (total - ours["rounding"]),
                "masked_ffn_over_frozen_dense": masked_ffn_seconds(T, b.ffn) / frozen_dense_seconds(T, b.ffn),
                "eager_over_masked_ffn": eager_ffn_seconds(T, b.ffn) / masked_ffn_seconds(T, b.ffn),
            }
        )
    return rows


def layers() -> list[dict[str, Any]]:
    """A step of one layer's masked FFN; the limit is the products that nobody can leave out: three dense ones, and of the three
    behind the mask what is not zero."""
    rows = []
    for c, T in [(c, T) for c in (shapes.L3, shapes.Q25, shapes.MID, shapes.COARSE) for T in (2048, *TOKENS)]:
        ours, eager = masked_ffn_seconds(T, c), eager_ffn_seconds(T, c)
        rows.append(
            {
                "shape": f"{c.name} T {T}",
                "limit_seconds": 6 * (1 + c.K / c.E) * T * c.H * c.F / BF16,
                "predicted_seconds": ours,
                "all_products_predicted_seconds": masked_ffn_seconds(T, c, all_products=True),
                "frozen_dense_predicted_seconds": frozen_dense_seconds(T, c),
                "eager_predicted_seconds": eager,
                "eager_over_ours": eager / ours,
            }
        )
    return rows


def layer_table() -> list[list[str]]:
    """``layers`` under its header."""
    rows = [["shape", "limit", "ours", "with all products", "frozen dense", "eager", "eager / ours"]]
    for row in layers():
        times = [f"{1e3 * value:.2f} ms" for name, value in row.items() if name.endswith("seconds")]
        rows.append([row["shape"], *times, f"{row['eager_over_ours']:.2f}x"])
    return rows


def tables() -> tuple[list[list[str]], list[list[str]]]:
    """Rows (shape, impl, every part, sum) and (shape, the ratios of ``steps``), each under its header."""
    splits, ratios = [["shape", "impl", *PARTS, "sum"]], [["shape", *_RATIOS.values()]]
    for row in steps():
        for impl in ("ours", "eager"):
            parts = row[f"{impl}_predicted_seconds"]
            cells = [f"{1e3 * parts[part]:,.1f}" for part in PARTS]
            splits.append([row["shape"], impl, *cells, f"{1e3 * sum(parts.values()):,.0f} ms"])
        ratios.append([row["shape"], *(f"{row[name]:.3g}" for name in _RATIOS)])
    return splits, ratios
