"""Transport: affinity A [F, E] -> plan P [F, E], by Sinkhorn-Knopp, with its own two gradients.

    maximise <A, P> + tau H(P)  over  P 1 = 1, P^T 1 = c;      P_ie = exp(X_ie + f_i + g_e), X = A / tau

f = log u [F] and g = log v [E] are the log-potentials. A step from g_{t-1}: f = -LSE_e(X + g_{t-1}), then
g_t = g_{t-1} + log c - log q with q the column sums of softmax_e(X + g_{t-1}).

Forward: the first step is taken in the log domain, the others as two products with a fixed K = softmax_e(X + g_ref) in [0, 1]
and v = exp(g - g_ref); K is taken anew (absorption) when log v has spread too far. One softmax gives the plan at the end.
Backward keeps only A and the potentials g_0..g_T, O(T E) memory, and recomputes the rest.
All in float32, or float64 for a float64 affinity. Cost: about 4 T F E flops forward, 8 T F E backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import first_order
from ._checks import compute_dtype, require, require_finite, require_float, require_same, require_shape, require_tensor
from .reference import SinkhornInfo

_ABSORB = 40.0  # take K anew once log v spreads further than this
_SAFE = 60.0  # a wider spread may lose or overflow float32 products: use the log domain


class _Solution(NamedTuple):
    plan: Tensor  # [F, E]
    log_u: Tensor  # [F]
    history: Tensor  # [n + 1, E]: g_0 .. g_n
    error: Tensor  # []


def _log_step(x: Tensor, g: Tensor, log_c: Tensor) -> tuple[Tensor, Tensor]:
    """One step in the log domain, columns by their maximum: (g_t, log q)."""
    log_q = torch.logsumexp(torch.log_softmax(x + g, -1), 0)  # [E]
    return g + (log_c - log_q), log_q


def _products(k: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(v [E] -> K v [F], u [F] -> K^T u [E]); on a CPU by NumPy, whose matrix-vector products are the faster ones."""
    if k.device.type != "cpu":
        return lambda v: torch.mv(k, v), lambda u: torch.mv(k.T, u)
    array = k.numpy()
    return lambda v: torch.from_numpy(array @ v.numpy()), lambda u: torch.from_numpy(u.numpy() @ array)


def _spread(x: Tensor) -> float:
    low, high = torch.aminmax(x)
    return float(high - low)


def _solve(x: Tensor, c: Tensor, g: Tensor, num_iters: int, tol: float, final: str) -> _Solution:
    """Sinkhorn of one layer. x [F, E] = A / tau, c [E], g [E] = g_0."""
    log_c = c.log()
    history = [g]
    # first step: q can underflow to 0 from a cold start, and then its logarithm needs a column maximum
    k, ref = torch.softmax(x + g, -1), g
    times, transposed_times = _products(k)
    q = k.sum(0)
    if float(q.min()) > 1e-30:
        g, log_q = g + (log_c - q.log()), q.log()
    else:
        g, log_q = _log_step(x, g, log_c)
    history.append(g)
    while len(history) <= num_iters and not (tol > 0 and float((log_q - log_c).expm1().abs().max()) <= tol):
        shift = g - ref
        spread = _spread(shift)
        if not spread <= _ABSORB:
            k, ref = torch.softmax(x + g, -1), g
            times, transposed_times = _products(k)
            shift = torch.zeros_like(g)
        v = shift.exp()
        q = transposed_times(times(v).reciprocal_())  # column sums over v
        step = log_c - q.log()
        if not _spread(step) <= _SAFE:  # a column of K that underflowed
            g, log_q = _log_step(x, g, log_c)
        else:
            log_q = log_c - step + shift
            g = ref + step
        history.append(g)
    del k, times, transposed_times
    if final == "row":
        y = x + g
        plan = torch.softmax(y, -1)
        log_u = plan.amax(-1).log() - y.amax(-1)  # -LSE, read off each row's largest entry
        error = (plan.sum(0) / c - 1).abs().max()
    else:
        log_u = -torch.logsumexp(x + history[-2], -1)
        plan = torch.exp(x + log_u[:, None] + g)
        error = (plan.sum(1) - 1).abs().max()
    return _Solution(plan, log_u, torch.stack(history), error)


def _unrolled_adjoint(
    x: Tensor, c: Tensor, history: Tensor, plan: Tensor, grad: Tensor, final: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact adjoint of the steps taken: (dX [F, E], d log c [E], d g_0 [E]).

    With K = softmax_e(X + g_T), v_t = exp(g_t - g_T), u_t = 1 / (K v_{t-1}) and z_t = gbar / (K^T u_t), step t is
    fbar = -u_t (K z_t) and gbar <- -v_{t-1} K^T(u_t fbar), and all steps together contribute to dX the product
    -K * [u_t, u_t fbar_t]_t [z_t, v_{t-1}]_t^T of rank 2T. The steps whose v_{t-1} spreads too far go one by one."""
    steps = history.shape[0] - 1
    w = plan * grad
    if final == "row":
        dx = w - plan * w.sum(1, keepdim=True)
        fbar_last = None
    else:
        dx = w
        fbar_last = w.sum(1)
    gbar = dx.sum(0)
    dlogc = torch.zeros_like(gbar)
    shift = history[:-1] - history[-1]  # [T, E]
    low, high = torch.aminmax(shift, dim=1)
    wide = (high - low > _SAFE).nonzero()
    plain = int(wide[-1]) + 1 if wide.numel() else 0  # steps 1..plain in the log domain
    if plain < steps:
        k = plan if final == "row" else torch.softmax(x + history[-1], -1)
        times, transposed_times = _products(k)
        v = (shift - low[:, None])[plain:].exp()  # [T, E]; the scale of a v cancels in u v
        u = (v @ k.T).reciprocal_()  # [T, F]
        inverse_q = (u @ k).reciprocal_()  # [T, E]
        uf, z = torch.empty_like(u), torch.empty_like(v)
        for t in range(steps - plain - 1, -1, -1):
            dlogc += gbar
            torch.mul(gbar, inverse_q[t], out=z[t])
            fbar = times(z[t]).mul_(u[t]).neg_()
            if fbar_last is not None:
                fbar, fbar_last = fbar + fbar_last, None
            torch.mul(u[t], fbar, out=uf[t])
            gbar = transposed_times(uf[t]).mul_(v[t]).neg_()
        dx = torch.addcmul(dx, k, torch.cat((u, uf)).T @ torch.cat((z, v)), value=-1)
    for t in range(plain - 1, -1, -1):
        dlogc += gbar
        log_s = torch.log_softmax(x + history[t], -1)
        q = torch.softmax(log_s, 0)  # each column of S over its sum: exp(g_t - g_{t-1}) / c, without its rounding
        fbar = -(q @ gbar)
        if fbar_last is not None:
            fbar, fbar_last = fbar + fbar_last, None
        s = log_s.exp_()
        dx = dx - q * gbar - s * fbar[:, None]
        gbar = -(s.T @ fbar)
    return dx, dlogc, gbar


def _implicit_gradient(plan: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient at the fixed point: (dX [F, E], d c [E] with <q, dc> = 0, which is what the unrolled steps give).

    [diag(q) - P^T diag(1/r) P] y = b - P^T(a / r), x = (a - P y) / r, dX = P * (G - x - y), with r, q the actual sums of P,
    a = sum_e P G and b = sum_i P G. The matrix is built as a Laplacian, whose null vector 1 is exact, and solved in float64."""
    w = plan * grad
    r, q = plan.sum(1), plan.sum(0)
    a, b = w.sum(1), w.sum(0)
    scaled = plan / r[:, None]
    gram = (scaled.T @ plan).double()
    gram.fill_diagonal_(0)
    laplacian = torch.diag(gram.sum(1)) - (gram + gram.T) / 2
    qd = q.double()
    ridge = 1e-12 * qd.mean()
    laplacian = laplacian + torch.diag(ridge.expand(len(q))) + torch.outer(qd, qd) / qd.sum()
    rhs = (b - scaled.T @ a).double()
    y = torch.linalg.solve(laplacian, rhs - rhs.mean()).to(plan.dtype)
    xi = (a - plan @ y) / r
    return plan * (grad - xi[:, None] - y), y - torch.dot(q, y) / q.sum()


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, affinity: Tensor, capacity: Tensor, tau: Tensor, init: Tensor, options: tuple[int, float, str, str]
    ) -> tuple[Tensor, ...]:
        """affinity [L, F, E], capacity [L, E], tau [L], init [L, E]."""
        num_iters, tol, final, _ = options
        layers = [
            _solve(a.to(c.dtype) / t, c, g, num_iters, tol, final) for a, c, t, g in zip(affinity, capacity, tau, init, strict=True)
        ]
        count = torch.tensor([len(s.history) - 1 for s in layers], dtype=torch.int64, device=affinity.device)
        if layers:
            plan = torch.stack([s.plan for s in layers]) if len(layers) > 1 else layers[0].plan[None]
            log_u, error = torch.stack([s.log_u for s in layers]), torch.stack([s.error for s in layers])
            log_v = torch.stack([s.history[-1] for s in layers])
        else:
            plan, log_v = capacity.new_zeros(affinity.shape), torch.zeros_like(capacity)
            log_u, error = capacity.new_zeros(affinity.shape[:2]), torch.zeros_like(tau)
        ctx.options = options
        ctx.save_for_backward(affinity, capacity, tau, plan, *(s.history for s in layers))
        ctx.mark_non_differentiable(log_u, log_v, count, error)
        return plan, log_u, log_v, count, error

    @staticmethod
    @first_order("sinkhorn")
    def backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        affinity, capacity, tau, plan, *histories = ctx.saved_tensors
        _, _, final, mode = ctx.options
        daffinity, dcapacity = torch.zeros_like(plan), torch.zeros_like(capacity)
        dtau, dinit = torch.zeros_like(tau), torch.zeros_like(capacity)
        for n, history in enumerate(histories):
            x = affinity[n].to(plan.dtype) / tau[n]
            if mode == "unroll":
                dx, dlogc, dinit[n] = _unrolled_adjoint(x, capacity[n], history, plan[n], grad[n], final)
                dcapacity[n] = dlogc / capacity[n]
            else:
                dx, dcapacity[n] = _implicit_gradient(plan[n], grad[n])
            if ctx.needs_input_grad[2]:
                dtau[n] = -(x * dx).sum() / tau[n]
            torch.div(dx, tau[n], out=daffinity[n])
        return daffinity.to(affinity.dtype), dcapacity, dtau, dinit, None


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
            positive or does not sum to F.

    Gradient: to affinity, tau, capacity and init (unroll only). A second derivative is refused.

    Source: eq. 1 of DOT-MoE (arXiv 2606.01666); Cuturi 2013 (arXiv 1306.0895); absorption as in Schmitzer 2019
    (arXiv 1610.06519); implicit gradient as in Eisenberger et al. 2022 (arXiv 2205.06688).
    """
    require_float(affinity, "affinity", 2, "[..., F, E]", at_least=True)
    batch, (F, E) = affinity.shape[:-2], affinity.shape[-2:]
    require(F >= 1 and E >= 1, "affinity", f"of shape {list(affinity.shape)}", "at least one neuron and one expert")
    require(
        isinstance(num_iters, int) and not isinstance(num_iters, bool) and num_iters >= 1,
        "num_iters",
        num_iters,
        "an integer of at least 1",
    )
    require(isinstance(tol, int | float) and tol >= 0, "tol", tol, "a number of at least 0")
    require(final in ("row", "column"), "final", repr(final), '"row" or "column"')
    require(backward in ("unroll", "implicit"), "backward", repr(backward), '"unroll" or "implicit"')
    require_finite(affinity, "affinity")
    dtype, device = compute_dtype(affinity), affinity.device

    if isinstance(tau, Tensor):
        require(tau.dim() == 0 or tau.shape == batch, "tau", f"of shape {list(tau.shape)}", f"a float or shape {list(batch)}")
        require_same(tau, "tau", affinity, "affinity", dtype=False)
        taus = tau.to(dtype).expand(batch)
    else:
        require(isinstance(tau, int | float), "tau", repr(tau), "a positive number or a tensor")
        taus = torch.full(batch, float(tau), dtype=dtype, device=device)
    if device.type == "cpu" and taus.numel():
        require(bool((taus > 0).all() & taus.isfinite().all()), "tau", tau, "positive and finite")
    if capacity is None:
        capacities = torch.full((*batch, E), F / E, dtype=dtype, device=device)
    else:
        require_tensor(capacity, "capacity", "[E] or [..., E]")
        require(
            tuple(capacity.shape) in ((E,), (*batch, E)),
            "capacity",
            f"of shape {list(capacity.shape)}",
            f"[{E}] or {[*batch, E]}",
        )
        require_same(capacity, "capacity", affinity, "affinity", dtype=False)
        capacities = capacity.to(dtype).expand(*batch, E)
        if device.type == "cpu" and capacities.numel():
            require(bool((capacities > 0).all()), "capacity", capacity.tolist(), "positive entries")
            total = capacities.double().sum(-1)
            require(bool(((total - F).abs() <= 1e-4 * F).all()), "capacity", f"summing to {total.tolist()}", f"sum F = {F}")
    if init is None:
        start = torch.zeros((*batch, E), dtype=dtype, device=device)
    else:
        require_float(init, "init", len(batch) + 1, "[..., E]")
        require_shape(init, "init", (*batch, E), "[..., E]")
        require_same(init, "init", affinity, "affinity", dtype=False)
        require_finite(init, "init")
        start = init.to(dtype)

    # capacities are used as given: a sum that is off by rounding only moves the error it reports
    plan, log_u, log_v, count, error = _Sinkhorn.apply(
        affinity.reshape(-1, F, E),
        capacities.reshape(-1, E),
        taus.reshape(-1),
        start.reshape(-1, E),
        (num_iters, float(tol), final, backward),
    )
    plan = plan.view(*batch, F, E)
    if not return_info:
        return plan
    info = SinkhornInfo(log_u.view(*batch, F), log_v.view(*batch, E), count.view(batch), error.view(batch))
    return plan, info
