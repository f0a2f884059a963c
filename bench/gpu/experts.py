"""The routed FFN's benches on a GPU, bf16, 25 % of the neurons active, the dense FFN beside it.

Weights and inputs are drawn on the device. The float64 reference is computed for the first and the last tokens. A call of a
few tokens takes the host longer than the device, so up to 64 tokens ours and the dense FFN are also replayed as CUDA graphs.
The baseline "dense-merged" is one product for gate and up, silu(gate) * up fused by torch.compile for that very shape (Liger's
kernel would copy the two halves of the product first), and the down product.

Not here: triton_kernels, whose fused SwiGLU is another function (interleaved, up + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import dotmoe_kernels as dk
from bench import shapes
from bench.experts import (
    LIBRARIES,
    dense,
    dense_merged,
    ends,
    ffn_info,
    layouts,
    library_call,
    masked_dense,
    reference_rows,
    relative_error,
    silu_and_mul,
    stock_experts,
    without_transformers,
)
from bench.paired import OURS, Case, Group
from bench.shapes import Shape
from dotmoe_kernels._backend import use_triton
from dotmoe_kernels.experts.grouped.operators import grouped_ffn_op
from dotmoe_kernels.experts.masked.operators import expert_mask_op, masked_view_up_op

DTYPE = "bfloat16"
SHAPES = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
TELLING, TOKENS = (1, 4, 8192), (2, 8, 16, 64, 256, 1024, 4096, 16384)
FEW, MOST_MASKED, MANY = 64, 2048, 1024  # tokens: of "decode" and graphs; of "masked"; from where the reductions are compared

_REDUCTIONS = ("rows", "chunks", "dense", "atomics")
_TRANSFORMERS = ("eager", "grouped_mm", "batched_mm", "sonicmoe")
_MOST_GATHERED = 8e9  # bytes of expert weights that batched_mm may copy
_DENSE = ("dense", "dense-merged", "dense-merged-graph")


def draw(*shape: int, seed: int, device: str, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) * scale


def draw_indices(T: int, shape: Shape, device: str) -> Tensor:
    """K distinct experts a token, [T, K]"""
    generator = torch.Generator(device).manual_seed(4)
    return torch.rand(T, shape.E, generator=generator, device=device).argsort(-1)[:, : shape.K].contiguous()


@lru_cache(maxsize=1)
def weights(shape: Shape, device: str) -> dict[str, Tensor]:
    gate_up = draw(shape.E, 2 * shape.s, shape.H, seed=0, device=device, scale=shape.H**-0.5)
    down = draw(shape.E, shape.s, shape.H, seed=1, device=device, scale=shape.s**-0.5)
    return layouts(shape, gate_up, down.transpose(1, 2))


def compiled_silu_and_mul() -> Callable[[Tensor], Tensor]:
    """For one shape: what was compiled before is dropped, since a function that many shapes compiled falls back to eager."""
    torch.compiler.reset()
    return torch.compile(silu_and_mul, dynamic=False, fullgraph=True)


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph, captured when it is first wanted."""
    held: list[Any] = []

    def replay() -> Tensor:
        if not held:
            call()  # compiles
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = call()
            held.extend((graph, output))
        held[0].replay()
        return held[1]

    return replay


def _judge(x: Tensor, w: dict[str, Tensor], indices: Tensor) -> Callable[[str, Any], float]:
    rows = ends(len(x))
    everyone = torch.arange(w["gate_up"].shape[0], device=x.device).expand(len(rows), -1)
    sparse, full = (reference_rows(x[rows], w, chosen) for chosen in (indices[rows], everyone))

    def error(name: str, found: Tensor) -> float:
        if not bool(found.isfinite().all()):
            return float("inf")
        return relative_error(found[rows], full if name in _DENSE else sparse)

    return error


# --- the op ------------------------------------------------------------------------------------------------------------


def forward_impls(T: int) -> tuple[str, ...]:
    few, graph = T <= FEW, ("ours-graph",) if T <= FEW else ()
    masked = ("ours-masked", "ours-masked-triton-up") if T <= MOST_MASKED else ()
    reductions = tuple(f"ours-grouped-{how}" for how in _REDUCTIONS) if T >= MANY else ()
    return (
        OURS,
        *graph,
        *(("ours-decode",) if few else ()),
        *masked,
        "ours-grouped",
        *reductions,
        *(_DENSE if few else _DENSE[:2]),
        "eager-masked-dense",
        *(f"transformers-{name}" for name in _TRANSFORMERS),
        *LIBRARIES,
    )


def _masked_triton_up(x: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
    """The masked path with the up product and the mask in one kernel of ours."""
    hidden = masked_view_up_op(x, w["gate_up"], expert_mask_op(indices, None, w["gate_up"].shape[0], torch.float32), "silu")
    return hidden @ w["down"].transpose(1, 2).reshape(hidden.shape[1], -1)


def _dense_merged(w: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return partial(dense_merged, w=w, swiglu=compiled_silu_and_mul())


def _without_gradient(case: Case) -> Case:
    case.run = {name: torch.no_grad()(call) for name, call in case.run.items() if name not in case.skipped}
    return case


def _forward(shape: Shape, T: int, device: str) -> Case:
    w = weights(shape, device)
    x, indices = draw(T, shape.H, seed=3, device=device), draw_indices(T, shape, device)
    ones = torch.ones(T, shape.K, device=device)
    ffn = partial(dk.expert_ffn, x, w["gate_up"], w["down"], indices, ones)
    merged = _dense_merged(w)
    run: dict[str, Callable[[], Any]] = {
        OURS: ffn,
        "ours-graph": replayed(ffn),
        **{f"ours-{path}": partial(ffn, path=path) for path in ("decode", "masked", "grouped")},
        "ours-masked-triton-up": lambda: _masked_triton_up(x, w, indices),
        "dense": lambda: dense(x, w),
        "dense-merged": lambda: merged(x),
        "dense-merged-graph": replayed(lambda: merged(x)),
        "eager-masked-dense": lambda: masked_dense(x, w, indices, shape.E),
    }
    for how in _REDUCTIONS:
        run[f"ours-grouped-{how}"] = partial(grouped_ffn_op, x, w["gate_up"], w["down"], indices, ones, "silu", how)
    impls, skipped = forward_impls(T), {}
    for name in impls:
        if name.endswith("-graph") and device != "cuda":
            skipped[name] = "needs a GPU"
        elif name.startswith(("ours-masked-triton", "ours-grouped-")) and not use_triton(x):
            skipped[name] = "needs Triton's kernels"
    for name in _TRANSFORMERS:
        if reason := without_transformers(name, shape, T, _MOST_GATHERED):
            skipped[f"transformers-{name}"] = reason
        else:
            run[f"transformers-{name}"] = partial(stock_experts(shape, w, name), x, indices, ones.to(x.dtype))
    for name in LIBRARIES:
        call = library_call(name, x, w, indices, ones)
        if isinstance(call, str):
            skipped[name] = call
        else:
            run[name] = call
    return _without_gradient(Case({name: run[name] for name in impls if name in run}, _judge(x, w, indices), 2e-2, skipped=skipped))


# --- the block with its router -----------------------------------------------------------------------------------------


def block_impls(T: int) -> tuple[str, ...]:
    graph = ("ours-graph",) if T <= FEW else ()
    return OURS, *graph, *(_DENSE[1:] if T <= FEW else _DENSE[1:2]), "transformers-grouped_mm"


def _block(shape: Shape, T: int, device: str) -> Case:
    """Router product, top K, experts. The dense FFN needs no router."""
    w = weights(shape, device)
    x, router = draw(T, shape.H, seed=3, device=device), draw(shape.E, shape.H, seed=5, device=device, scale=shape.H**-0.5)
    merged = _dense_merged(w)

    def ours() -> Tensor:
        routing = dk.route_top_k(functional.linear(x, router), shape.K)
        return dk.expert_ffn(x, w["gate_up"], w["down"], routing.indices, routing.weights)

    run: dict[str, Callable[[], Any]] = {
        OURS: ours,
        "ours-graph": replayed(ours),
        "dense-merged": lambda: merged(x),
        "dense-merged-graph": replayed(lambda: merged(x)),
    }
    skipped = {} if device == "cuda" else {name: "needs a GPU" for name in block_impls(T) if name.endswith("-graph")}
    stock = "transformers-grouped_mm"
    if reason := without_transformers("grouped_mm", shape, T, _MOST_GATHERED):
        skipped[stock] = reason
    else:
        experts = stock_experts(shape, w, "grouped_mm")

        def with_stock_router() -> Tensor:
            """Softmax in float32 and top K as Qwen3-MoE has them, the selected experts with weight 1."""
            chosen = functional.linear(x, router).float().softmax(-1).topk(shape.K, -1).indices
            return experts(x, chosen, torch.ones_like(chosen, dtype=x.dtype))

        run[stock] = with_stock_router
    with torch.no_grad():
        indices = dk.route_top_k(functional.linear(x, router), shape.K).indices
    # of two equal logits another router may take the other
    case = Case(run, _judge(x, w, indices), 2e-2, frozenset({stock}), skipped)
    return _without_gradient(case)


def expert_groups(
    device: str = "cuda",
    sizes: tuple[Shape, ...] = SHAPES,
    tokens: tuple[tuple[int, ...], tuple[int, ...]] = (TELLING, TOKENS),
) -> list[Group]:
    """The telling token counts of every shape first, each with its block; then the others."""
    groups = []
    for first, counts in zip((True, False), tokens, strict=True):
        for shape in sizes:
            groups += [
                Group(
                    f"experts {shape.name} T {T}", forward_impls(T), partial(_forward, shape, T, device), ffn_info(shape, T, DTYPE)
                )
                for T in counts
            ]
            if first:
                groups += [
                    Group(f"block {shape.name} T {T}", block_impls(T), partial(_block, shape, T, device), _block_info(shape, T))
                    for T in counts
                ]
    return groups


def _block_info(shape: Shape, T: int) -> dict[str, Any]:
    info = ffn_info(shape, T, DTYPE)
    return {**info, "flops": info["flops"] + 2 * T * shape.H * shape.E, "bytes": info["bytes"] + 2 * shape.H * shape.E}
