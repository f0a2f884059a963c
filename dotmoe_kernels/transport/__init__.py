"""Transport: affinity A [F, E] -> plan P [F, E], by Sinkhorn-Knopp, with its own two gradients.

    maximise <A, P> + tau H(P)  over  P 1 = 1, P^T 1 = c;      P_ie = exp(X_ie + f_i + g_e), X = A / tau

f = log u [F] and g = log v [E] are the log-potentials. A step from g_{t-1}: f = -LSE_e(X + g_{t-1}), then
g_t = g_{t-1} + log c - log q with q the column sums of softmax_e(X + g_{t-1}).

Every forward keeps the potentials g_0..g_T; every backward keeps only A, the plan and those, and recomputes the rest. All in
float32, or float64 for a float64 affinity.

    cpu   PyTorch, layer after layer: scaling (forward and exact adjoint), implicit (gradient at the fixed point)
    gpu   Triton: streaming or persistent, and ending (forward), adjoint with plain and product (exact adjoint), gram (at the fixed
          point)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._autograd import first_order
from .._backend import is_direct, use_triton
from .._checks import (
    compute_dtype,
    has_values,
    is_integer,
    is_number,
    require,
    require_finite,
    require_float,
    require_grid,
    require_same,
    require_shape,
    require_tensor,
)
from ..reference import SinkhornInfo
from .cpu import adjoint_layers, solve_layers
from .operators import sinkhorn_op


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, affinity: Tensor, capacity: Tensor, tau: Tensor, init: Tensor, options: tuple[int, float, str, str, bool]
    ) -> tuple[Tensor, ...]:
        """affinity [L, F, E], capacity [L, E], tau [L], init [L, E]."""
        num_iters, tol, final, _, info = options
        plan, log_u, log_v, histories, count, error = solve_layers(affinity, capacity, tau, init, num_iters, tol, final, info)
        ctx.options = options
        ctx.save_for_backward(affinity, capacity, tau, plan, *histories)
        ctx.mark_non_differentiable(log_u, log_v, count, error)
        return plan, log_u, log_v, count, error

    @staticmethod
    @first_order("sinkhorn")
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        affinity, capacity, tau, plan, *histories = ctx.saved_tensors
        _, _, final, mode, _ = ctx.options
        steps = histories if mode == "unroll" else None
        return *adjoint_layers(affinity, capacity, tau, plan, steps, grad, final, ctx.needs_input_grad[2]), None


def _temperatures(tau: float | Tensor, affinity: Tensor) -> Tensor:
    """tau as [...] in the dtype of the computation, checked."""
    batch, dtype = affinity.shape[:-2], compute_dtype(affinity)
    if isinstance(tau, Tensor):
        require(tau.dim() == 0 or tau.shape == batch, "tau", f"of shape {list(tau.shape)}", f"a float or shape {list(batch)}")
        require_same(tau, "tau", affinity, "affinity", dtype=False)
        taus = tau.to(dtype).expand(batch)
    else:
        require(is_number(tau), "tau", repr(tau), "a positive number or a tensor")
        taus = torch.full(batch, float(tau), dtype=dtype, device=affinity.device)
    if has_values(affinity) and taus.numel():
        require(bool((taus > 0).all() & taus.isfinite().all()), "tau", tau, "positive and finite")
    return taus


def _capacities(capacity: Tensor | None, affinity: Tensor) -> Tensor:
    """The capacities as [..., E] in the dtype of the computation, checked."""
    batch, (F, E), dtype = affinity.shape[:-2], affinity.shape[-2:], compute_dtype(affinity)
    if capacity is None:
        return torch.full((*batch, E), F / E, dtype=dtype, device=affinity.device)
    require_tensor(capacity, "capacity", "[E] or [..., E]")
    fits = tuple(capacity.shape) in ((E,), (*batch, E))
    require(fits, "capacity", f"of shape {list(capacity.shape)}", f"[{E}] or {[*batch, E]}")
    require_same(capacity, "capacity", affinity, "affinity", dtype=False)
    capacities = capacity.to(dtype).expand(*batch, E)
    if has_values(affinity) and capacities.numel():
        require(bool((capacities > 0).all()), "capacity", capacity.tolist(), "positive entries")
        total = capacities.double().sum(-1)
        require(bool(((total - F).abs() <= 1e-4 * F).all()), "capacity", f"summing to {total.tolist()}", f"sum F = {F}")
    return capacities


def sinkhorn(
    affinity: Tensor,
    capacity: Tensor | None = None,
    *,
    tau: float | Tensor = 1.0,
    num_iters: int = 50,
    tol: float = 0.0,
    init: Tensor | None = None,
    final: str = "row",
    backward: str = "unroll",
    return_info: bool = False,
) -> Any:
    """Entropic transport plan of neurons to experts: argmax <A, P> + tau H(P) over P 1 = 1, P^T 1 = c.

    A step is one row update and one column update of the log-potentials. A layer stops once every column sum of a step is
    within ``tol`` of its capacity (relative; 0 takes all the steps); that step's update is still applied.

    Args:
        affinity: [..., F, E] float32, bfloat16, float16 or float64, any strides: affinity of neuron i to expert e.
        capacity: [E] or [..., E], positive, each layer's summing to F. None: F / E each, which may be fractional.
        tau: temperature, in the units of ``affinity``: a positive float or a tensor [...], one a layer.
        num_iters: most steps taken, at least 1.
        tol: relative column error at which a layer stops.
        init: [..., E] log_v to start from (``SinkhornInfo.log_v`` of an earlier call; rescale it when tau moves). None: zeros.
        final: "row" ends with exact rows (the error is in the columns), "column" with exact columns.
        backward: "unroll" is the exact adjoint of the steps taken; "implicit" is the gradient at the fixed point: exact at
            convergence, one small solve, and none for ``init``.
        return_info: also return ``SinkhornInfo(log_u [..., F], log_v [..., E], num_iters [...] int64, error [...])``, error
            being the largest relative error of the returned plan's inexact marginal.

    Returns:
        plan [..., F, E] float32 (float64 for a float64 affinity), or (plan, info).

    Raises:
        ValueError: a wrong rank, shape or dtype; on CPU tensors also NaN or infinite values, tau <= 0, a capacity that is not
            positive or does not sum to F; on a GPU more than 65,535 layers.

    Gradient: to affinity, tau, capacity and init (unroll only). A second derivative is refused.

    Source: eq. 1 of DOT-MoE (arXiv 2606.01666); Cuturi 2013 (arXiv 1306.0895); absorption as in Schmitzer 2019
    (arXiv 1610.06519); implicit gradient as in Eisenberger et al. 2022 (arXiv 2205.06688).
    """
    require_float(affinity, "affinity", 2, "[..., F, E]", at_least=True)
    batch, (F, E) = affinity.shape[:-2], affinity.shape[-2:]
    require(F >= 1 and E >= 1, "affinity", f"of shape {list(affinity.shape)}", "at least one neuron and one expert")
    require(
        is_integer(num_iters) and num_iters >= 1,
        "num_iters",
        num_iters,
        "an integer of at least 1",
    )
    require(is_number(tol) and tol >= 0, "tol", tol, "a number of at least 0")
    require(final in ("row", "column"), "final", repr(final), '"row" or "column"')
    require(backward in ("unroll", "implicit"), "backward", repr(backward), '"unroll" or "implicit"')
    require_finite(affinity, "affinity")
    dtype, device = compute_dtype(affinity), affinity.device
    taus = _temperatures(tau, affinity)
    capacities = _capacities(capacity, affinity)
    if init is None:
        start = torch.zeros((*batch, E), dtype=dtype, device=device)
    else:
        require_float(init, "init", len(batch) + 1, "[..., E]")
        require_shape(init, "init", (*batch, E), "[..., E]")
        require_same(init, "init", affinity, "affinity", dtype=False)
        require_finite(init, "init")
        start = init.to(dtype)

    # capacities are used as given: a sum that is off by rounding only moves the error it reports
    L, num_iters = batch.numel(), int(num_iters)
    in_triton = use_triton(affinity) and dtype == torch.float32
    if in_triton:
        require_grid(L, "affinity", affinity, "layers (the product of the leading sizes)")
    tensors = affinity.reshape(L, F, E), capacities.reshape(L, E), taus.reshape(L), start.reshape(L, E)
    # a graph takes the operators on a CPU too: how many steps there are hangs on values
    if in_triton and is_direct(*tensors):
        from .gpu.streaming import solve

        plan, log_u, log_v, _, count, error = solve(*tensors, num_iters, float(tol), final == "row")
    elif in_triton or torch.compiler.is_compiling():
        plan, log_u, log_v, _, count, error = sinkhorn_op(*tensors, num_iters, float(tol), final == "row", backward == "unroll")
    else:
        with torch.autocast(device.type, enabled=False):
            plan, log_u, log_v, count, error = _Sinkhorn.apply(*tensors, (num_iters, float(tol), final, backward, return_info))
    plan = plan.view(*batch, F, E)
    if not return_info:
        return plan
    log_u, log_v, error = log_u.detach(), log_v.detach(), error.detach()
    info = SinkhornInfo(log_u.view(*batch, F), log_v.view(*batch, E), count.view(batch), error.view(batch))
    return plan, info
