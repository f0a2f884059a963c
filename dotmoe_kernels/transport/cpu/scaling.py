"""Sinkhorn and its exact adjoint by stabilised scaling, in PyTorch: the CPU's implementation, and that of float64 everywhere.

    K = softmax_e(X + g_ref) [F, E] in [0, 1], v = exp(g - g_ref) [E];   a step: u = 1 / (K v), q = K^T u, v <- c / q

The first step is taken in the log domain, the others as two products with a fixed K, which is taken anew (absorption) when log v
has spread too far. K, or one more softmax, gives the plan at the end. The backward keeps only A and the potentials g_0..g_T, O(T E)
memory, and recomputes the rest. All in float32, or float64 for a float64 affinity. Cost: about 4 T F E flops forward, 8 T F E
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ABSORB = 40.0  # take K anew once log v spreads further than this
_CLOSE = 10.0  # up to this spread K gives the plan itself: what it has lost lies below 1e-33
_TINY = 1e-37  # just above the float32 denormals
SAFE = 60.0  # a wider spread may lose or overflow float32 products: use the log domain


class Solution(NamedTuple):
    plan: Tensor  # [F, E]
    log_u: Tensor  # [F], or [0] where it was not asked for
    history: Tensor  # [n + 1, E]: g_0 .. g_n
    error: Tensor  # []


def _log_step(x: Tensor, g: Tensor, log_c: Tensor) -> tuple[Tensor, Tensor]:
    """One step in the log domain, columns by their maximum: (g_t, log q)."""
    log_q = torch.logsumexp(torch.log_softmax(x + g, -1), 0)  # [E]
    return g + (log_c - log_q), log_q


def _products(k: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """(v [E] -> K v [F], u [F] -> K^T u [E]), as matrix products: on a CPU torch runs those on every core, but mv on one.
    NumPy's are faster still, yet two thread pools that take turns wait milliseconds for each other."""
    F, E = k.shape
    halves = k.view(2, F // 2, E) if F % 2 == 0 else k[None]

    def times(v: Tensor) -> Tensor:
        return torch.mm(v[None], k.T)[0]

    def transposed_times(u: Tensor) -> Tensor:
        return torch.bmm(u.view(len(halves), 1, -1), halves).sum(0)[0]

    return times, transposed_times


def _spread(x: Tensor) -> float:
    low, high = torch.aminmax(x)
    return float(high - low)


def _kernel(x: Tensor, g: Tensor) -> Tensor:
    """K = softmax_e(x + g) [F, E], without the denormal entries, on which a CPU's products crawl."""
    k = torch.softmax(x + g, -1)
    if float(k.amin()) < _TINY:
        torch.threshold_(k, _TINY, 0.0)
    return k


def solve(x: Tensor, c: Tensor, g: Tensor, num_iters: int, tol: float, final: str, *, info: bool = True) -> Solution:
    """Sinkhorn of one layer. x [F, E] = A / tau, c [E], g [E] = g_0; without ``info`` log_u is left empty."""
    log_c = c.log()
    history = [g]
    # first step: q can underflow to 0 from a cold start, and then its logarithm needs a column maximum
    k, ref = _kernel(x, g), g
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
            k, ref = _kernel(x, g), g
            times, transposed_times = _products(k)
            shift = torch.zeros_like(g)
        v = shift.exp()
        q = transposed_times(times(v).reciprocal_())  # column sums over v
        step = log_c - q.log()
        if not _spread(step) <= SAFE:  # a column of K that underflowed
            g, log_q = _log_step(x, g, log_c)
        else:
            log_q = log_c - step + shift
            g = ref + step
        history.append(g)
    del times, transposed_times
    log_u = x.new_empty(0)
    if final == "row":
        shift = g - ref
        low, high = torch.aminmax(shift)
        if float(high - low) <= _CLOSE:  # K is near enough that none of its zeros would show
            plan = k.mul_((shift - high).exp())
            plan.div_(plan.sum(-1, keepdim=True))
        else:
            plan = torch.softmax(x + g, -1)
        if info:
            log_u = plan.amax(-1).log() - (x + g).amax(-1)  # -LSE, read off each row's largest entry
        error = (plan.sum(0) / c - 1).abs().max()
    else:  # the last column update again, as a softmax: through rounded potentials the columns would miss their sums by |x| eps
        y = x + history[-2]
        log_s = torch.log_softmax(y, -1)
        if info:
            log_u = log_s.amax(-1) - y.amax(-1)  # -LSE
        plan = torch.softmax(log_s, 0)
        history[-1] = history[-2] + (log_c - (log_s.amax(0) - plan.amax(0).log()))
        plan.mul_(c)
        error = (plan.sum(1) - 1).abs().max()
    return Solution(plan, log_u, torch.stack(history), error)


def unrolled_adjoint(
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
    wide = (high - low > SAFE).nonzero()
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
        dx.addcmul_(k, torch.cat((u, uf)).T @ torch.cat((z, v)), value=-1)
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
