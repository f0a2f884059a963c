"""The transport as torch operators, one a pass: Triton's kernels, which are imported when one is first called, and PyTorch where
those do not run.

    dotmoe_kernels::sinkhorn          affinity -> plan, log_u, log_v, history, count, error
    dotmoe_kernels::sinkhorn_unroll   dL/dP -> dA, d capacity, d tau, d init through the steps taken
    dotmoe_kernels::sinkhorn_implicit dL/dP -> dA, d capacity, d tau at the fixed point

All on a batch of layers: affinity [L, F, E], capacity [L, E], tau [L], init [L, E].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._backend import use_triton
from .cpu import adjoint_layers, solve_layers


def _in_triton(computed: Tensor) -> bool:
    """Whether there are kernels for this, which has the dtype that is computed in."""
    return use_triton(computed) and computed.dtype == torch.float32


@torch.library.custom_op("dotmoe_kernels::sinkhorn", mutates_args=())
def sinkhorn_op(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    init: Tensor,
    num_iters: int,
    tol: float,
    exact_rows: bool,
    unroll: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> plan [L, F, E], log_u [L, F], log_v [L, E], history [L, T + 1, E], count [L] int64, error [L]."""
    if not _in_triton(capacity):
        final = "row" if exact_rows else "column"
        plan, log_u, log_v, histories, count, error = solve_layers(affinity, capacity, tau, init, num_iters, tol, final)
        history = log_v[:, None].repeat(1, num_iters + 1, 1)  # what lies beyond a stop is written too
        for whole, taken in zip(history, histories, strict=True):
            whole[: len(taken)] = taken
        return plan, log_u, log_v, history, count, error
    from .gpu.streaming import solve

    return solve(affinity, capacity, tau, init, num_iters, tol, exact_rows)


@sinkhorn_op.register_fake
def _(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    init: Tensor,
    num_iters: int,
    tol: float,
    exact_rows: bool,
    unroll: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    L, F, E = affinity.shape
    new = capacity.new_empty
    count = torch.empty(L, dtype=torch.int64, device=affinity.device)
    return new((L, F, E)), new((L, F)), new((L, E)), new((L, num_iters + 1, E)), count, new((L,))


@torch.library.custom_op("dotmoe_kernels::sinkhorn_unroll", mutates_args=())
def unroll_op(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    plan: Tensor,
    history: Tensor,
    count: Tensor,
    grad: Tensor,
    exact_rows: bool,
    needs_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dA [L, F, E], d capacity [L, E], d tau [L] (0 unless needed), d init [L, E]."""
    if not _in_triton(capacity):
        histories = [steps[: n + 1] for steps, n in zip(history, count.tolist(), strict=True)]
        return adjoint_layers(affinity, capacity, tau, plan, histories, grad, "row" if exact_rows else "column", needs_tau)
    from .gpu.adjoint import unrolled_adjoint

    return unrolled_adjoint(affinity, capacity, tau, plan, history, count, grad, exact_rows, needs_tau)


@unroll_op.register_fake
def _(
    affinity: Tensor,
    capacity: Tensor,
    tau: Tensor,
    plan: Tensor,
    history: Tensor,
    count: Tensor,
    grad: Tensor,
    exact_rows: bool,
    needs_tau: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = capacity.new_empty
    return affinity.new_empty(affinity.shape), new(capacity.shape), new(tau.shape), new(capacity.shape)


@torch.library.custom_op("dotmoe_kernels::sinkhorn_implicit", mutates_args=())
def implicit_op(affinity: Tensor, tau: Tensor, plan: Tensor, grad: Tensor, needs_tau: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> dA [L, F, E], d capacity [L, E], d tau [L] (0 unless needed)."""
    if not _in_triton(plan):
        capacity = plan.new_zeros(plan.shape[0], plan.shape[2])  # its values are in the plan
        return adjoint_layers(affinity, capacity, tau, plan, None, grad, "row", needs_tau)[:3]
    from .gpu.gram import implicit_gradient

    return implicit_gradient(affinity, tau, plan, grad, needs_tau)


@implicit_op.register_fake
def _(affinity: Tensor, tau: Tensor, plan: Tensor, grad: Tensor, needs_tau: bool) -> tuple[Tensor, Tensor, Tensor]:
    L, F, E = plan.shape
    return affinity.new_empty(affinity.shape), plan.new_empty((L, E)), plan.new_empty((L,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    affinity, capacity, tau, _, _, _, ctx.exact_rows, ctx.unroll = inputs
    plan, _, _, history, count, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(affinity, capacity, tau, plan, history, count)


def _backward(ctx: Any, grad: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    affinity, capacity, tau, plan, history, count = ctx.saved_tensors
    needs_tau = bool(ctx.needs_input_grad[2])
    if ctx.unroll:
        da, dc, dtau, dinit = unroll_op(affinity, capacity, tau, plan, history.detach(), count, grad, ctx.exact_rows, needs_tau)
        return da, dc, dtau, dinit, None, None, None, None
    da, dc, dtau = implicit_op(affinity, tau, plan, grad, needs_tau)
    return da, dc, dtau, None, None, None, None, None


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("sinkhorn has no second derivative; differentiate it once, or use dotmoe_kernels.reference")


sinkhorn_op.register_autograd(_backward, setup_context=_save)
unroll_op.register_autograd(_refuse)
implicit_op.register_autograd(_refuse)
