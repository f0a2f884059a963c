"""Experts: the routed FFN with 25 % of its neurons active, and the dense FFN that it replaces. Which is faster at T tokens?

The weights are drawn once for a shape and dtype. Ours has ``down_proj`` as a converted model stores it; the peers get
their own stock layout. The dense FFN answers another question than the sparse ones, so it is compared with all experts active.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench import memory, shapes, training
from bench.curves import CURVE
from bench.experts import (
    DTYPES,
    dense,
    dense_merged,
    ffn_info,
    layouts,
    masked_dense,
    reference_rows,
    relative_error,
    stock_experts,
)
from bench.paired import Case, Group, cases, missing
from bench.shapes import Shape
from tests.shapes import expert_weights, normal, routed_indices, uniform

_OWN_PATHS = ("ours-decode", "ours-grouped", "ours-masked")
_DENSE = ("dense", "dense-merged")
_TRANSFORMERS = ("transformers-eager", "transformers-grouped_mm", "transformers-batched_mm")
IMPLS = ("ours", *_OWN_PATHS, *_DENSE, "eager-masked-dense", *_TRANSFORMERS)
_CURVE_IMPLS = ("ours", "dense", "dense-merged", "transformers-grouped_mm")
_CURVE_TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 8192, 16384)
# in 16 bits, more tokens take minutes on a processor without instructions for them
_BACKWARD_TOKENS = {"float32": (16, 512, 2048), "bfloat16": (16, 512)}
_MOST_GATHERED = 2e9  # bytes of expert weights that batched_mm may copy


@lru_cache(maxsize=1)
def weights(shape: Shape, dtype: str) -> dict[str, Tensor]:
    """One FFN in every layout that somebody needs."""
    return layouts(shape, *expert_weights(shape.E, shape.s, shape.H, seed=0, dtype=DTYPES[dtype]))


def _prepare(shape: Shape, T: int, dtype: str) -> Case:
    w = weights(shape, dtype)
    x = normal(T, shape.H, seed=3, dtype=DTYPES[dtype])
    indices = routed_indices(T, shape.K, shape.E, seed=4)
    ones = torch.ones(T, shape.K, dtype=DTYPES[dtype])
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.expert_ffn(x, w["gate_up"], w["down"], indices, ones),
        "dense": lambda: dense(x, w),
        "dense-merged": lambda: dense_merged(x, w),
        "eager-masked-dense": lambda: masked_dense(x, w, indices, shape.E),
    }
    for name in _OWN_PATHS:
        run[name] = partial(dk.expert_ffn, x, w["gate_up"], w["down"], indices, ones, path=name.removeprefix("ours-"))
    skipped = {}
    if T > 64:
        skipped["ours-decode"] = "the path of a few tokens"
    gathered = T * shape.K * 3 * shape.s * shape.H * x.element_size()
    for name in _TRANSFORMERS:
        if reason := missing("transformers"):
            skipped[name] = reason
        elif name.endswith("batched_mm") and gathered > _MOST_GATHERED:
            skipped[name] = f"copies the weights of every slot: {gathered / 1e9:.0f} GB"
        else:
            run[name] = partial(stock_experts(shape, w, name.removeprefix("transformers-")), x, indices, ones)
    checked = {name: call for name, call in run.items() if name not in skipped}
    # the reference in float64 for a few tokens only: on all of them it would take longer than the bench
    few = min(T, 4)
    wide = {name: w[name] for name in ("gate_up", "down")}
    expected = reference_rows(x[:few], wide, indices[:few])
    everyone = torch.arange(shape.E).expand(few, -1)
    expected_dense = reference_rows(x[:few], wide, everyone)

    def error(name: str, found: Tensor) -> float:
        return relative_error(found[:few], expected_dense if name in _DENSE else expected)

    return Case(checked, error, 1e-5 if dtype == "float32" else 2e-2, skipped=skipped)


# --- training ---------------------------------------------------------------------------------------------------------------

# for the rest see bench/training.py; eager writes a gradient of all weights for every expert, 90 times the time of ours
BACKWARD = tuple(name for name in training.IMPLS if name not in ("transformers-sonicmoe", "transformers-eager"))
_WEIGHED = 2048  # tokens; with fewer the gradients of the weights are nearly all of the peak


def _backward_inputs(shape: Shape, T: int, dtype: str) -> training.Inputs:
    x, dy = (normal(T, shape.H, seed=seed, dtype=DTYPES[dtype]) for seed in (3, 5))
    return training.Inputs(x, dy, routed_indices(T, shape.K, shape.E, seed=4), uniform(T, shape.K, seed=6, dtype=DTYPES[dtype]))


def memory_call(name: str) -> Callable[[], Any]:
    """For ``bench.memory``: "IMPL SHAPE DTYPE T", forward and backward."""
    impl, size, dtype, T = name.split()

    def call(shape: Shape, T: int) -> Callable[[], Any]:
        inputs = _backward_inputs(shape, T, dtype)
        return partial(training.steps(shape, weights(shape, dtype), inputs, (impl,))[0][impl], inputs.dy)

    call(shapes.TINY, 64)()
    return call(shapes.NAMED[size], int(T))


def _prepare_backward(shape: Shape, T: int, dtype: str) -> Case:
    """Forward and backward to x, all weights and the routing weights: the fine-tune of the sparse model."""
    w, inputs = weights(shape, dtype), _backward_inputs(shape, T, dtype)
    case = training.case(shape, w, inputs, BACKWARD, tolerance=1e-5 if dtype == "float32" else 2e-2)
    if T >= _WEIGHED:
        for name in case.run:
            peak = memory.peak_extra_bytes("bench.bench_experts", f"{name} {shape.name} {dtype} {T}")
            case.extra[name] = {"peak_bytes": peak}
    return case


def _groups() -> list[Group]:
    def ffn(prefix: str, shape: Shape, T: int, dtype: str, rounds: int, budget: float) -> Group:
        name = f"{prefix}experts-{shape.name}-{dtype}-T{T}"
        return Group(name, IMPLS, partial(_prepare, shape, T, dtype), ffn_info(shape, T, dtype), rounds, budget)

    def curve(shape: Shape, T: int, dtype: str) -> Group:
        info = {**ffn_info(shape, T, dtype), "T": T, "s": shape.s}
        return Group(f"{CURVE}{shape.name}-{dtype}-T{T}", _CURVE_IMPLS, partial(_prepare, shape, T, dtype), info, 9, 2.5)

    def backward(prefix: str, shape: Shape, T: int, dtype: str, rounds: int, budget: float) -> Group:
        name = f"{prefix}experts-backward-{shape.name}-{dtype}-T{T}"
        info = {**ffn_info(shape, T, dtype, 3), "gradient_bytes": training.gradient_bytes(shape, T, DTYPES[dtype].itemsize)}
        return Group(name, BACKWARD, partial(_prepare_backward, shape, T, dtype), info, rounds, budget)

    groups = [ffn("quick-", shapes.TINY, T, "float32", 5, 1.0) for T in (1, 16, 64)]
    groups.append(backward("quick-", shapes.TINY, 64, "float32", 5, 1.0))
    for dtype in DTYPES:
        groups += [ffn("", shapes.CPU, T, dtype, 15, 4.0) for T in (1, 4, 16, 64, 512)]
        groups += [backward("", shapes.CPU, T, dtype, 7, 8.0) for T in _BACKWARD_TOKENS[dtype]]
    groups += [ffn("", shapes.L3, 1, dtype, 11, 6.0) for dtype in DTYPES]
    groups += [curve(shape, T, "bfloat16") for shape in shapes.WIDTHS for T in _CURVE_TOKENS]
    groups += [curve(shapes.WIDTHS[2], T, "float32") for T in _CURVE_TOKENS if T <= 4096]
    return groups


@cases(_groups())
def test_experts(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
