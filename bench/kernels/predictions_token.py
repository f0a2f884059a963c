"""PREDICTED times of a whole model's decode step on one H200, in bfloat16, as one CUDA graph: arithmetic, nobody measured them.

A pass takes the longer of its bytes over the copy rate and a launch of a graph (``conversion/speeds.py``). Of a layer, as
``torch.compile`` leaves it: the products for queries, keys and values, the positions with the cache's new row, attention, the
product behind it, and two norms, each with the sum before it; then the FFN: sparse the router and the decode kernels, dense two
products and what lies between. Before and after all layers the embedding, the last norm and the head.

The limit is the weights that the step must read, and the cache, over the copy rate.
"""

from __future__ import annotations

from typing import Any

from bench import shapes
from bench.kernels.registry import BANDWIDTH
from bench.shapes import Backbone
from dotmoe_kernels.conversion.speeds import LAUNCHES, dense_seconds, one_pass, product_seconds, routed_seconds, union

CONTEXT = 512  # tokens in the cache
BACKBONES = (shapes.L3_MODEL, shapes.Q25_MODEL, shapes.SMOLLM2)
TOKENS = (1, 8)  # sequences, a token each
AROUND = 8  # launches of a layer beside its FFN
DENSE = 3  # of the dense FFN
ENDS = 3


def _cache(b: Backbone) -> float:
    """Bytes of one layer's keys and values of a sequence."""
    return 2.0 * 2 * CONTEXT * b.kv_heads * b.head_size


def around_seconds(T: int, b: Backbone) -> float:
    """Of a layer beside its FFN."""
    H, queries, keys = b.ffn.H, b.heads * b.head_size, b.kv_heads * b.head_size
    products = product_seconds(T, H, queries) + 2 * product_seconds(T, H, keys) + product_seconds(T, queries, H)
    rows = 2 * one_pass(2 * 3 * T * H) + one_pass(2 * 2 * T * (queries + keys))
    return products + rows + one_pass(T * _cache(b))


def token_seconds(T: int, b: Backbone, *, sparse: bool) -> float:
    """A step of T sequences."""
    ffn = routed_seconds(T, b.ffn) if sparse else dense_seconds(T, b.ffn)
    ends = 2 * one_pass(2 * 2 * T * b.ffn.H) + product_seconds(T, b.ffn.H, b.vocabulary)
    return b.layers * (around_seconds(T, b) + ffn) + ends


def limit_seconds(T: int, b: Backbone, *, sparse: bool) -> float:
    experts = union(T, b.ffn) * b.ffn.E if sparse else b.ffn.E
    return (2 * b.read(experts) + b.layers * T * _cache(b)) / BANDWIDTH


def launches(b: Backbone, *, sparse: bool) -> int:
    return b.layers * (AROUND + (sum(LAUNCHES.values()) if sparse else DENSE)) + ENDS


def tokens() -> list[dict[str, Any]]:
    rows = []
    for b, T in [(b, T) for b in BACKBONES for T in TOKENS]:
        found: dict[str, Any] = {"shape": f"{b.name} T {T}"}
        for name, sparse in (("sparse", True), ("dense", False)):
            found[f"{name}_limit_seconds"] = limit_seconds(T, b, sparse=sparse)
            found[f"{name}_predicted_seconds"] = token_seconds(T, b, sparse=sparse)
            found[f"{name}_launches"] = launches(b, sparse=sparse)
        found["limit_times_dense"] = found["dense_limit_seconds"] / found["sparse_limit_seconds"]
        found["predicted_times_dense"] = found["dense_predicted_seconds"] / found["sparse_predicted_seconds"]
        rows.append(found)
    return rows


def table() -> list[list[str]]:
    """``tokens`` under its header."""
    rows = [["shape", "launches", "limit", "ours", "dense's launches", "limit", "dense", "dense / ours", "of the limits"]]
    for row in tokens():
        cells = [row["shape"]]
        for name in ("sparse", "dense"):
            times = [f"{1e3 * row[f'{name}_{what}_seconds']:.3f} ms" for what in ("limit", "predicted")]
            cells += [str(row[f"{name}_launches"]), *times]
        rows.append([*cells, f"{row['predicted_times_dense']:.2f}x", f"{row['limit_times_dense']:.2f}x"])
    return rows
