"""Layer after layer in PyTorch: what the operators do without Triton, and both passes of the CPU's own autograd step.

affinity [L, F, E], capacity [L, E], tau [L], init [L, E]; the history of a layer ends with the steps that it took
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .implicit import implicit_gradient
from .scaling import solve, unrolled_adjoint


def solve_layers(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    init: Tensor,
    num_iters: int,
    tol: float,
    final: str,
    info: bool = True,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor]:
    """-> plan [L, F, E], log_u [L, F], log_v [L, E], a history [n + 1, E] a layer, count [L] int64, error [L]."""
    layers = [
        solve(a.to(c.dtype) / t, c, g, num_iters, tol, final, info=info)
        for a, c, t, g in zip(affinity, capacity, tau, init, strict=True)
    ]
    count = torch.tensor([len(s.history) - 1 for s in layers], dtype=torch.int64, device=affinity.device)
    if not layers:
        empty = capacity.new_zeros(affinity.shape), capacity.new_zeros(affinity.shape[:2]), torch.zeros_like(capacity)
        return *empty, [], count, torch.zeros_like(tau)
    plan = torch.stack([s.plan for s in layers]) if len(layers) > 1 else layers[0].plan[None]
    log_u, error = torch.stack([s.log_u for s in layers]), torch.stack([s.error for s in layers])
    return plan, log_u, torch.stack([s.history[-1] for s in layers]), [s.history for s in layers], count, error


def adjoint_layers(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    plan: Tensor,
    histories: Sequence[Tensor] | None,
    grad: Tensor,
    final: str,
    needs_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dA [L, F, E], d capacity [L, E], d tau [L] (0 unless needed), d init [L, E]: through the steps taken, or at the fixed
    point where there are no histories."""
    daffinity, dcapacity = torch.zeros_like(plan), torch.zeros_like(capacity)
    dtau, dinit = torch.zeros_like(tau), torch.zeros_like(capacity)
    for n in range(len(plan)):
        x = affinity[n].to(plan.dtype) / tau[n]
        if histories is not None:
            dx, dlogc, dinit[n] = unrolled_adjoint(x, capacity[n], histories[n], plan[n], grad[n], final)
            dcapacity[n] = dlogc / capacity[n]
        else:
            dx, dcapacity[n] = implicit_gradient(plan[n], grad[n])
        if needs_tau:
            dtau[n] = -(x * dx).sum() / tau[n]
        torch.div(dx, tau[n], out=daffinity[n])
    return daffinity.to(affinity.dtype), dcapacity, dtau, dinit
