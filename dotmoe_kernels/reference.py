"""The whole method in plain PyTorch: the file to read first.

A dense FFN of F neurons becomes E experts of F / E neurons, of which a router picks K for every token. Which neuron
belongs to which expert is learned by optimal transport (DOT-MoE, arXiv 2606.01666). One section a step:

    transport     affinity A [F, E] -> soft plan P [F, E]              (eq. 1)
    rounding      P -> expert_of [F], exactly c_e neurons an expert    (eq. 2)
    permutation   expert_of -> the order in which the neurons are stored (eq. 6)
    routing       router logits Z [T, E] -> K experts a token          (eq. 3, 5)
    soft_topk     LapSum and its truncation: SoftMoE (arXiv 2606.17952)
    dispatch      tokens -> slots sorted by expert
    experts       the routed FFN, and the masked dense FFN that learns (eq. 4)
    losses        distillation from the dense model                    (eq. 5)

Every function is differentiable by autograd and works in the dtype it is given (float64 included). Nothing here checks
its arguments or tries to be fast: the public functions of the same names do. They are tested against this file.
Shapes: T tokens, H hidden, F FFN width, E experts, s = F / E, K experts a token, S = T K slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# --- transport: maximise <A, P> + tau H(P) over P 1 = 1, P^T 1 = c -------------------------------------------------------


class SinkhornInfo(NamedTuple):
    """What a Sinkhorn call found besides the plan; P = exp(A / tau + log_u + log_v)."""

    log_u: Tensor  # [..., F]
    log_v: Tensor  # [..., E]
    num_iters: Tensor  # [...] int64, column updates applied
    error: Tensor  # [...] largest relative marginal error of the returned plan


def sinkhorn(
    affinity: Tensor,
    capacity: Tensor | None = None,
    *,
    tau: float | Tensor = 1.0,
    num_iters: int = 50,
    tol: float = 0.0,
    init: Tensor | None = None,
    final: str = "row",
) -> tuple[Tensor, SinkhornInfo]:
    """Entropic transport plan [..., F, E] by log-domain Sinkhorn-Knopp; rows sum to 1, column e to capacity c_e."""
    F, E = affinity.shape[-2:]
    x = affinity / (tau[..., None, None] if isinstance(tau, Tensor) else tau)  # [..., F, E]
    c = torch.as_tensor(F / E if capacity is None else capacity, dtype=x.dtype, device=x.device).expand(*x.shape[:-2], E)
    g = torch.zeros_like(c) if init is None else init  # log v, [..., E]
    f = -torch.logsumexp(x + g[..., None, :], -1)  # log u, [..., F]
    steps = torch.zeros(x.shape[:-2], dtype=torch.int64, device=x.device)
    active = torch.ones_like(steps, dtype=torch.bool)
    for _ in range(num_iters):
        if not bool(active.any()):
            break
        f = torch.where(active[..., None], -torch.logsumexp(x + g[..., None, :], -1), f)
        log_q = g + torch.logsumexp(x + f[..., None], -2)  # log of the column sums, [..., E]
        g = torch.where(active[..., None], g + c.log() - log_q, g)
        steps = steps + active
        active = active & (((log_q - c.log()).expm1().abs().amax(-1) > tol) if tol > 0 else True)
    if final == "row":
        f = -torch.logsumexp(x + g[..., None, :], -1)
    plan = torch.exp(x + f[..., None] + g[..., None, :])
    error = (plan.sum(-2) / c - 1).abs().amax(-1) if final == "row" else (plan.sum(-1) - 1).abs().amax(-1)
    return plan, SinkhornInfo(f.detach(), g.detach(), steps, error.detach())


# --- rounding: the plan's entries in descending order; take (i, e) if i is free and e has room ---------------------------


def greedy_assignment(scores: Tensor, capacity: list[int]) -> Tensor:
    """expert_of [F] of scores [F, E]; equal scores are visited in row-major order."""
    F, E = scores.shape
    room, expert_of, left = list(capacity), [-1] * F, F
    for pair in torch.sort(scores.flatten(), descending=True, stable=True).indices.tolist():
        i, e = divmod(pair, E)
        if expert_of[i] < 0 and room[e] > 0:
            expert_of[i], room[e], left = e, room[e] - 1, left - 1
            if left == 0:
                break
    return torch.tensor(expert_of, dtype=torch.int64, device=scores.device)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Forward ``hard``, backward ``soft``: hard + (soft - sg soft)."""
    return hard.to(soft.dtype) + (soft - soft.detach())


# --- permutation: the neurons sorted by expert --------------------------------------------------------------------------


def neuron_order(expert_of: Tensor) -> Tensor:
    """order [..., F]: neuron order[n] is stored at position n."""
    return torch.sort(expert_of, dim=-1, stable=True).indices


def expert_blocks(gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, order: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """gate, up [F, H] and down [H, F] -> gate_up_proj [E, 2s, H] (gate rows first) and down_proj [E, H, s]."""
    F, H = gate_proj.shape
    gate, up = (w[order].view(num_experts, F // num_experts, H) for w in (gate_proj, up_proj))
    return torch.cat((gate, up), 1), down_proj.T[order].view(num_experts, F // num_experts, H).transpose(1, 2)


# --- routing: K experts a token ------------------------------------------------------------------------------------------


class Routing(NamedTuple):
    """Which experts each token visits; index E marks an empty slot, whose weight is 0."""

    indices: Tensor  # [T, K] int64, best first
    weights: Tensor  # [T, K]
    probs: Tensor  # [T, E] Q = softmax(Z), or the soft top-k
    load: Tensor  # [E] share of the routed slots that each expert received
    balance_loss: Tensor  # [] E sum_e load_e mean_t Q_te; 1 when balanced
    z_loss: Tensor  # [] mean_t logsumexp(Z_t)^2


def _routing(logits: Tensor, q: Tensor, probs: Tensor, indices: Tensor, weights: Tensor, valid: Tensor) -> Routing:
    """Load and losses over the valid [T] tokens; a padding token has no slots."""
    E = logits.shape[-1]
    indices = torch.where(valid[:, None], indices, E)
    weights = torch.where(indices < E, weights, 0)
    count = torch.zeros(E + 1, dtype=q.dtype, device=q.device).index_add(
        0, indices.flatten(), torch.ones_like(weights).flatten().detach()
    )[:E]
    load = count / count.sum().clamp(min=1)
    tokens = valid.sum().clamp(min=1)
    balance = E * (load * (torch.where(valid[:, None], q, 0).sum(0) / tokens)).sum()
    z = torch.where(valid, torch.logsumexp(logits, -1) ** 2, 0).sum() / tokens
    return Routing(indices, weights, probs, load, balance, z)


def route_top_k(
    router_logits: Tensor,
    top_k: int,
    *,
    weights: str = "unit",
    mask: Tensor | None = None,
    num_zero_experts: int = 0,
    zero_share: float = 2.0,
) -> Routing:
    """The K largest logits of each token, ties to the lower index. Unit weights: forward 1, backward softmax (eq. 3).

    The last columns may be of zero experts: choosing one is an empty slot. The balance is then that of the two groups (ZEDA)."""
    q = torch.softmax(router_logits, -1)  # [T, E]
    indices = torch.sort(router_logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    chosen = q.gather(1, indices)  # [T, K]
    if weights == "unit":
        chosen = straight_through(torch.ones_like(chosen), chosen)
    elif weights == "renormalized":
        chosen = chosen / chosen.sum(-1, keepdim=True)
    valid = torch.ones_like(indices[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    routing = _routing(router_logits, q, q, indices, chosen, valid)
    if not num_zero_experts:
        return routing
    E, Z = router_logits.shape[-1] - num_zero_experts, zero_share * num_zero_experts
    mean = torch.where(valid[:, None], q, 0).sum(0) / valid.sum().clamp(min=1)
    of_experts, of_zeros = (routing.load[part].sum() * mean[part].sum() for part in (slice(E), slice(E, None)))
    return routing._replace(
        indices=routing.indices.clamp(max=E),
        weights=torch.where(routing.indices < E, routing.weights, 0),
        balance_loss=(E + Z) * (of_experts / E + of_zeros / Z),
    )


# --- soft_topk: p = LapSum(r, k) in (0, 1)^E with sum exactly k --------------------------------------------------------


def soft_top_k(scores: Tensor, k: float | Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """p_i = Phi(r_i / alpha - b), Phi the Laplace distribution function and b such that sum_i p_i = k. scores [..., E].

    b is found by bisection, then made differentiable by one Newton step, whose derivative is the implicit one."""
    k = torch.as_tensor(k, dtype=scores.dtype, device=scores.device)[..., None]
    z = scores / torch.as_tensor(temperature, dtype=scores.dtype, device=scores.device)[..., None]

    def phi(x: Tensor) -> Tensor:
        return torch.where(x <= 0, 0.5 * torch.exp(torch.clamp(x, max=0)), 1 - 0.5 * torch.exp(-torch.clamp(x, min=0)))

    with torch.no_grad():
        reach = math.log(2 * scores.shape[-1]) + 60.0
        low = z.amin(-1, keepdim=True) - reach
        high = z.amax(-1, keepdim=True) + reach
        for _ in range(200):
            middle = (low + high) / 2
            more = phi(z - middle).sum(-1, keepdim=True) > k
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        b = (low + high) / 2
        density = torch.softmax(-(z - b).abs(), -1)  # dPhi, normalised: stays finite where every density underflows
        scale = 0.5 * torch.exp(torch.logsumexp(-(z - b).abs(), -1, keepdim=True))
    # implicit: db = <h, dz> - dk / scale;  dp_i = scale h_i (dz_i - db)
    shift = (density * z).sum(-1, keepdim=True)
    p = phi(z.detach() - b)
    return p + scale * density * ((z - z.detach()) - (shift - shift.detach())) + density * (k - k.detach())


def route_soft_top_k(
    scores: Tensor,
    k: float | Tensor,
    *,
    temperature: float | Tensor,
    threshold: float,
    max_active: int,
    mask: Tensor | None = None,
) -> Routing:
    """SoftMoE: the experts with p > threshold, at least one and at most max_active a token, weighted by p itself."""
    E = scores.shape[-1]
    p = soft_top_k(scores, k, temperature=temperature)  # [T, E]
    indices = torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :max_active]
    chosen = p.gather(1, indices)
    keep = chosen > threshold
    keep[:, :1] = True
    valid = torch.ones_like(scores[:, 0], dtype=torch.bool) if mask is None else mask.bool()
    q = p / p.sum(-1, keepdim=True)
    return _routing(scores, q, p, torch.where(keep, indices, E), torch.where(keep, chosen, 0), valid)


# --- dispatch: slot p of the expert-sorted order serves routed pair source[p] = t K + j ---------------------------------


class Slots(NamedTuple):
    """Expert-sorted slots; expert e owns [offsets[e], offsets[e + 1]); empty slots come last."""

    token: Tensor  # [S] int64
    source: Tensor  # [S] int64
    offsets: Tensor  # [E + 1] int32


def dispatch_tokens(indices: Tensor, num_experts: int) -> Slots:
    """Stable counting sort of the T K routed pairs by expert."""
    flat = indices.flatten()
    source = torch.sort(flat, stable=True).indices
    count = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat((count.new_zeros(1), count.cumsum(0))).to(torch.int32)
    return Slots(source // max(indices.shape[1], 1), source, offsets)


def scatter_tokens(x: Tensor, slots: Slots) -> Tensor:
    """x [T, H] -> xs [S, H], rows of empty slots zero."""
    used = torch.arange(slots.token.numel(), device=x.device) < slots.offsets[-1]
    return torch.where(used[:, None], x[slots.token], 0)


def gather_tokens(ys: Tensor, slots: Slots, weights: Tensor) -> Tensor:
    """y [T, H]: the weighted sum of each token's slots."""
    used = torch.arange(slots.token.numel(), device=ys.device) < slots.offsets[-1]
    rows = torch.where(used[:, None], ys, 0) * weights.flatten()[slots.source][:, None].to(ys.dtype)
    return ys.new_zeros(weights.shape[0], ys.shape[1]).index_add(0, slots.token, rows)


# --- experts -------------------------------------------------------------------------------------------------------------


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """a [S, Kdim], b [E, Kdim, N] -> [S, N]: rows [offsets[e], offsets[e + 1]) meet b[e]; rows beyond the last are zero."""
    bounds = offsets.tolist()
    parts = [a[bounds[e] : bounds[e + 1]] @ b[e] for e in range(b.shape[0])]
    return torch.cat([*parts, a.new_zeros(a.shape[0] - bounds[-1], b.shape[2])])


def expert_ffn(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    indices: Tensor,
    weights: Tensor,
    *,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """y_t = sum_j w_tj Down_e (act(Gate_e x_t) * (Up_e x_t)), e = indices[t, j]. x [T, H] -> [T, H]."""
    slots = dispatch_tokens(indices, gate_up_proj.shape[0])
    gate, up = grouped_mm(scatter_tokens(x, slots), gate_up_proj.transpose(1, 2), slots.offsets).chunk(2, -1)  # [S, s] each
    return gather_tokens(grouped_mm(activation(gate) * up, down_proj.transpose(1, 2), slots.offsets), slots, weights)


def masked_ffn(
    x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor,
    down_proj: Tensor,
    expert_of: Tensor,
    indices: Tensor,
    *,
    plan: Tensor | None = None,
    probs: Tensor | None = None,
    weights: Tensor | None = None,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Y^ = (U * (R_ste M_ste^T)) Wd^T (eq. 4): hard in the forward, gradients to plan P [F, E] and probs Q [T, E]."""
    E = int(expert_of.max()) + 1 if plan is None and probs is None else (plan if plan is not None else probs).shape[-1]  # type: ignore[union-attr]
    E = max(E, int(indices.max()) if indices.numel() else 0)
    m = torch.nn.functional.one_hot(expert_of, E).to(x.dtype)  # [F, E]
    w = torch.ones_like(indices, dtype=x.dtype) if weights is None else weights.to(x.dtype)
    r = x.new_zeros(x.shape[0], E + 1).scatter_add(1, indices, w)[:, :E]  # [T, E]; column E collects the empty slots
    if plan is not None:
        m = straight_through(m, plan.to(x.dtype))
    if probs is not None:
        r = straight_through(r, probs.to(x.dtype))
    u = activation(x @ gate_proj.T) * (x @ up_proj.T)  # [T, F]
    return (u * (r @ m.T)) @ down_proj.T


# --- losses: 2.0 kl + 1.0 ce + 1e-3 z + 1e-2 balance (eq. 5) --------------------------------------------------------------


def distillation_losses(
    teacher_logits: Tensor, logits: Tensor, labels: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean KL(dense || sparse) over the valid tokens, and mean next-token cross-entropy. logits [B, N, V], labels [B, N]."""
    valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    log_p, log_q = torch.log_softmax(teacher_logits, -1), torch.log_softmax(logits, -1)
    kl = torch.where(valid, (log_p.exp() * (log_p - log_q)).sum(-1), 0).sum() / valid.sum().clamp(min=1)
    nll = -log_q[:, :-1].gather(-1, labels[:, 1:, None])[..., 0]
    target = valid[:, 1:] & valid[:, :-1]
    return kl, torch.where(target, nll, 0).sum() / target.sum().clamp(min=1)
