"""The inputs that tests and benches share. Everything is drawn on the CPU from a seed, so every device sees the same numbers."""

from __future__ import annotations

import torch
from torch import Tensor

AWKWARD = [(63, 7), (1000, 37), (296, 148), (16, 1), (5, 5)]  # F, E
PATHS = ["auto", "grouped", "decode", "masked"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def capacities(F: int, E: int, *batch: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Positive, fractional, uneven by a factor of up to three, summing to F. [*batch, E]"""
    c = 0.5 + uniform(*batch, E, seed=seed)
    return (c * (F / c.sum(-1, keepdim=True))).to(dtype)


def integer_capacities(F: int, E: int, *, seed: int) -> Tensor:
    """Uneven, some zero where there is room for it, summing to F. [E] int64"""
    expert = torch.randint(0, max(E - E // 4, 1), (F,), generator=generator(seed))  # the last quarter of the experts stays empty
    return torch.bincount(expert, minlength=E)


def clustered(F: int, E: int, *, seed: int, strength: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Noise plus a hidden balanced assignment: the affinity of a training that has nearly ended. [F, E]"""
    home = torch.randperm(F, generator=generator(seed)) % E
    return normal(F, E, seed=seed + 1, dtype=dtype) + strength * torch.nn.functional.one_hot(home, E).to(dtype)


def routed_indices(T: int, K: int, E: int, *, seed: int, empty: float = 0.0) -> Tensor:
    """K distinct experts a token, [T, K] int64; a share ``empty`` of the slots is unused (index E)."""
    g = generator(seed)
    if T == 0:
        return torch.zeros(0, K, dtype=torch.int64)
    indices = torch.rand(T, E, generator=g).argsort(-1)[:, :K]
    return torch.where(torch.rand(T, K, generator=g) < empty, E, indices)


def dense_ffn(F: int, H: int, *, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """gate_proj [F, H], up_proj [F, H] and down_proj [H, F], of unit output variance."""
    gate, up = (normal(F, H, seed=seed + i, scale=H**-0.5, dtype=dtype) for i in range(2))
    return gate, up, normal(H, F, seed=seed + 2, scale=F**-0.5, dtype=dtype)


def expert_weights(E: int, s: int, H: int, *, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """gate_up_proj [E, 2s, H], and down_proj [E, H, s] as the transpose of a contiguous [E, s, H]."""
    gate_up = normal(E, 2 * s, H, seed=seed, scale=H**-0.5, dtype=dtype)
    return gate_up, normal(E, s, H, seed=seed + 1, scale=s**-0.5, dtype=dtype).transpose(1, 2)


def balanced_expert_of(F: int, E: int, *, seed: int) -> Tensor:
    """A random assignment of F neurons to E experts of equal size. [F] int64"""
    return torch.randperm(F, generator=generator(seed)) % E
