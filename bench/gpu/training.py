"""Forward and backward of the routed FFN on a GPU, the fine-tune of the sparse model, in bf16.

Everybody's gradients go to x, to all weights and to the routing weights. No CUDA graphs: at these token counts the device is the
slower side.
"""

from __future__ import annotations

from functools import partial

from bench import shapes, training
from bench.experts import ffn_info
from bench.gpu import experts as gpu_experts
from bench.gpu.experts import draw, draw_indices
from bench.paired import Case, Group
from bench.shapes import Shape

TOKENS = (8192, 2048)


def _training(shape: Shape, T: int, device: str) -> Case:
    x, dy = (draw(T, shape.H, seed=seed, device=device) for seed in (3, 5))
    routing = draw(T, shape.K, seed=6, device=device).sigmoid()
    inputs = training.Inputs(x, dy, draw_indices(T, shape, device), routing)
    merged = gpu_experts.compiled_silu_and_mul()
    return training.case(shape, gpu_experts.weights(shape, device), inputs, tolerance=2e-2, swiglu=merged)


def training_groups(
    device: str = "cuda", sizes: tuple[Shape, ...] = (shapes.L3, shapes.COARSE, shapes.MID), tokens: tuple[int, ...] = TOKENS
) -> list[Group]:
    return [
        Group(
            f"training {shape.name} T {T}",
            training.IMPLS,
            partial(_training, shape, T, device),
            {**ffn_info(shape, T, gpu_experts.DTYPE, 3), "gradient_bytes": training.gradient_bytes(shape, T, 2)},
        )
        for T in tokens
        for shape in sizes
    ]
