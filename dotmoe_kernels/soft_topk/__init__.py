"""LapSum soft top-k: p in (0, 1)^E with sum exactly k, the differentiable top-k of SoftMoE.

    p_i = Phi(r_i / alpha - b), Phi(z) = e^z / 2 for z <= 0 and 1 - e^-z / 2 above, b such that sum_i p_i = k

``cpu.py`` solves it in PyTorch, ``gpu.py`` in one Triton kernel a pass (up to 512 experts), ``operators.py`` has those as torch
operators.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import is_direct, use_triton
from .._checks import compute_dtype, has_values, is_number, require, require_finite, require_float, require_same
from . import cpu
from .operators import soft_top_k_op

MOST_EXPERTS = 512  # what the kernels sort on the chip


def row_values(scores: Tensor, k: float | Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    """(k, temperature) [...] in float64 for scores [..., E]; the values are checked on a CPU."""
    batch, E = scores.shape[:-1], scores.shape[-1]
    given: list[Tensor] = []
    for name, value in (("k", k), ("temperature", temperature)):
        if isinstance(value, Tensor):
            require(value.dim() == 0 or value.shape == batch, name, f"of shape {list(value.shape)}", f"[] or {list(batch)}")
            require_same(value, name, scores, "scores", dtype=False)
            given.append(value.double().expand(batch))
        else:
            require(is_number(value), name, repr(value), "a number or a tensor")
            given.append(torch.full(batch, float(value), dtype=torch.float64, device=scores.device))
    ks, temperatures = given
    if has_values(scores) and ks.numel():
        require(bool(((ks > 0) & (ks < E)).all()), "k", k, f"strictly between 0 and E = {E}")
        positive = (temperatures > 0) & temperatures.isfinite()
        require(bool(positive.all()), "temperature", temperature, "positive and finite")
    return ks, temperatures


def soft_top_k(scores: Tensor, k: float | Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """LapSum: p_i = Phi(scores_i / temperature - b) with b such that sum_i p_i = k.

    Args:
        scores: [..., E] floating point, finite.
        k: in (0, E), need not be whole: a number or a tensor [] or [...].
        temperature: alpha > 0: a number or a tensor [] or [...].

    Returns:
        p [..., E] in [0, 1], float32 (float64 for float64 scores); the sum is k to 1e-6 E.

    Raises:
        ValueError: a wrong rank, shape or dtype; on CPU also NaN or infinite scores, k outside (0, E), temperature <= 0.

    Computed in float64, and rounded at the end: the differences of scores of 1e4 would cost float32 its digits. On a GPU
    float64 scores and more than 512 experts take the PyTorch route.

    Gradient: to scores, k and temperature, through the implicit b. A second derivative is refused.

    Source: LapSum (arXiv 2503.06242), as used by SoftMoE (arXiv 2606.17952).
    """
    require_float(scores, "scores", 1, "[..., E]", at_least=True)
    require_finite(scores, "scores")
    return solve_soft_top_k(scores, *row_values(scores, k, temperature))


def solve_soft_top_k(scores: Tensor, ks: Tensor, temperatures: Tensor) -> Tensor:
    """``soft_top_k`` of ``row_values``, without a look at the scores' values."""
    dtype, E = compute_dtype(scores), scores.shape[-1]
    if use_triton(scores) and dtype == torch.float32 and E <= MOST_EXPERTS:
        rows = scores.reshape(-1, E), ks.reshape(-1), temperatures.reshape(-1)
        if is_direct(*rows):
            from .gpu import forward

            return forward(*rows)[0].view(scores.shape)
        return soft_top_k_op(*rows)[0].view(scores.shape)
    return cpu.SoftTopK.apply(scores.double(), ks, temperatures).to(dtype)
