"""PREDICTED times of a routed FFN on one H200 in bfloat16: arithmetic from bytes and flops, nobody measured them.

A pass takes the longer of its bytes over the copy rate and its flops over the matrix rate (``_tiles``), and at least a launch.
Triton's products are taken at a share of the rate of the vendor's library [estimate].
"""

from __future__ import annotations

from typing import Protocol

import torch

from .._tiles import H200_BANDWIDTH, H200_BF16, SUM_WORKSPACE, TRITON_SHARE, grouped_mm_form, grouped_up_form, pick_path
from .._tiles.grouped import down_launch, up_launch
from .._tiles.hardware import GPU, H200, Span
from .._tiles.launches import Launch, times, together

LAUNCH = 2.5e-6  # seconds of a small launch in a CUDA graph [estimate]
DECODE_SHARE = 0.75  # of the copy rate that the decode kernels' reads reach at the high end of a range [estimate]
LAUNCHES = {"router": 2, "decode": 3}  # of the router (its product, and the choice), and of the decode path
RESTS_ON = (
    f"one H200 in bfloat16 at {H200_BANDWIDTH / 1e12:g} TB/s and {H200_BF16 / 1e12:.0f} TFLOP/s, of which products in Triton reach "
    f"{TRITON_SHARE:.0%} [estimate], and {LAUNCH * 1e6:g} us a launch [estimate]; the grouped path at the middle of its range; "
    "bytes and flops counted, random routing; nobody measured it"
)


class Routed(Protocol):
    """A routed FFN: hidden size H, F = E s neurons in E experts of width s, K of them a token."""

    @property
    def H(self) -> int: ...
    @property
    def F(self) -> int: ...
    @property
    def E(self) -> int: ...
    @property
    def s(self) -> int: ...
    @property
    def K(self) -> int: ...


def one_pass(size: float, flops: float = 0.0, rate: float = H200_BF16) -> float:
    """Seconds that move ``size`` bytes and do ``flops``."""
    return max(size / H200_BANDWIDTH, flops / rate, LAUNCH)


def product_seconds(T: int, rows: int, columns: int) -> float:
    """[T, columns] = [T, rows] [rows, columns] at the vendor's rate."""
    return one_pass(2 * (rows * columns + T * (rows + columns)), 2 * T * rows * columns)


def dense_seconds(T: int, c: Routed) -> float:
    """Merged gate and up product, one SwiGLU, down product."""
    return product_seconds(T, c.H, 2 * c.F) + one_pass(2 * 3 * T * c.F) + product_seconds(T, c.F, c.H)


def union(T: int, c: Routed) -> float:
    """Share of the experts that T tokens of random routing choose."""
    return 1 - (1 - c.K / c.E) ** T


def decode_seconds(T: int, c: Routed) -> float:
    weights = 2 * union(T, c) * c.F * c.H
    return one_pass(2 * weights + 2 * T * c.H) + one_pass(weights) + one_pass(8 * 4 * T * c.H)


def masked_seconds(T: int, c: Routed) -> float:
    return dense_seconds(T, c) + LAUNCH  # the mask [T, E]


def product_span(T: int, rows: int, columns: int, gpu: GPU) -> Span:
    """``product_seconds`` from a low to a high end."""
    size, flops = 2 * (rows * columns + T * (rows + columns)), 2 * T * rows * columns
    low = max(size / gpu.bandwidth.high, flops / gpu.bf16.high)
    return together(gpu.launch, Span(low, max(size / gpu.bandwidth.low, flops / gpu.bf16.low)))


def dense_span(T: int, c: Routed, gpu: GPU) -> Span:
    between = Launch(2 * 3 * T * c.F).seconds(gpu)
    return together(product_span(T, c.H, 2 * c.F, gpu), between, product_span(T, c.F, c.H, gpu))


def decode_span(T: int, c: Routed, gpu: GPU) -> Span:
    """Both products read at a share of the copy rate at the high end: few tokens leave little in flight."""
    weights = 2 * union(T, c) * c.F * c.H
    products = [Launch(size).seconds(gpu) for size in (2 * weights + 2 * T * c.H, weights)]
    slow = together(*(Span(part.low, part.high / DECODE_SHARE) for part in products))
    return together(slow, Launch(8 * 4 * T * c.H).seconds(gpu))


def token_sums_span(T: int, c: Routed, width: int, gpu: GPU, form: str = "") -> Span:
    """A grouped product with rows of ``width`` and the sums of its rows [S, H], in parts that fit the workspace."""
    S, rows = T * c.K, 2 * T * c.K * c.H
    parts = -(-rows // SUM_WORKSPACE)
    form = form or grouped_mm_form(S, c.E, width, c.H, torch.bfloat16, "cuda")
    product = down_launch(form, S, c.E, width, -(-c.H // parts)).seconds(gpu)
    return times(parts, together(product, Launch((rows + 2 * T * c.H) / parts).seconds(gpu)))


def grouped_up_span(T: int, c: Routed, gpu: GPU, form: str = "") -> Span:
    """The sort, and the up product."""
    form = form or grouped_up_form(T * c.K, c.E, c.s, c.H, torch.bfloat16, "cuda")
    return together(times(3, Launch(30.0 * T * c.K).seconds(gpu)), up_launch(form, T * c.K, c.E, c.s, c.H).seconds(gpu))


def grouped_span(T: int, c: Routed, gpu: GPU, up: str = "", down: str = "") -> Span:
    """Sort, up product, down product, and the sums of a token's rows, with those forms of the products; empty: those that run."""
    return together(grouped_up_span(T, c, gpu, up), token_sums_span(T, c, c.s, gpu, down))


def token_sums(T: int, c: Routed, width: int) -> float:
    return token_sums_span(T, c, width, H200).middle


def grouped_up_seconds(T: int, c: Routed) -> float:
    return grouped_up_span(T, c, H200).middle


def grouped_seconds(T: int, c: Routed) -> float:
    return grouped_span(T, c, H200).middle


def routed_seconds(T: int, c: Routed) -> float:
    """The path that ``pick_path`` takes for T tokens, with the router's product and its top-K before it."""
    path = pick_path(T, c.E, c.s, c.K, c.H, torch.bfloat16, "cuda", dense_view=True).path
    seconds = {"decode": decode_seconds, "masked": masked_seconds, "grouped": grouped_seconds}[path](T, c)
    return seconds + product_seconds(T, c.H, c.E) + one_pass(4 * T * c.E)
