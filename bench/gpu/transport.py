"""The transport's benches on a GPU, batches of layers, 50 Sinkhorn steps, float32.

Layers are rolled copies of one drawn matrix. The float64 reference is computed for the first and the last of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench import shapes
from bench.bench_rounding import argsort_loop
from bench.paired import OURS, Case, Group, missing
from tests.shapes import normal

STEPS, TAU = 50, 0.1
SIZES = (("Q25 x 28", 28, shapes.Q25), ("Q25 x 1", 1, shapes.Q25), ("L3 x 32", 32, shapes.L3))


def layers_of(L: int, F: int, E: int, device: str, seed: int = 0) -> Tensor:
    """[L, F, E]"""
    base = normal(F, E, seed=seed, dtype=torch.float32).to(device)
    return torch.stack([base.roll((7 * layer, layer), (0, 1)) for layer in range(L)])


def loop_step(x: Tensor, g: Tensor, log_c: Tensor) -> Tensor:
    """One step of the logsumexp loop on [..., F, E]: rows, then columns."""
    f = -torch.logsumexp(x + g[..., None, :], -1)
    return log_c - torch.logsumexp(x + f[..., None], -2)


def loop(affinity: Tensor, step: Callable[..., Tensor] = loop_step) -> Tensor:
    """The log-domain loop as one writes it in PyTorch; autograd goes through it."""
    F, E = affinity.shape[-2:]
    x = affinity / TAU
    g = torch.zeros_like(affinity[..., 0, :])
    log_c = torch.full_like(g, F / E).log()
    for _ in range(STEPS):
        g = step(x, g, log_c)
    f = -torch.logsumexp(x + g[..., None, :], -1)
    return torch.exp(x + f[..., None] + g[..., None, :])


@lru_cache(maxsize=1)
def compiled_step() -> Callable[..., Tensor]:
    return torch.compile(loop_step, dynamic=False)


def compiled_loop(affinity: Tensor) -> Tensor:
    return loop(affinity, compiled_step())


def ours(backward: str = "unroll") -> Callable[[Tensor], Tensor]:
    return lambda a: dk.sinkhorn(a, tau=TAU, num_iters=STEPS, backward=backward)


def _relative(found: Tensor, expected: Tensor) -> float:
    distance = float((found.double() - expected).norm() / expected.norm())
    return distance if distance == distance else float("inf")


def _ends(function: Callable[[Tensor], Tensor], *tensors: Tensor) -> Tensor:
    """``function`` in float64, of the first and the last layer, one after the other."""
    picked = [[t[i : i + 1].double() for t in tensors] for i in (0, -1 % tensors[0].shape[0])]
    return torch.cat([function(*layer) for layer in picked])


def _against_ends(expected: Tensor) -> Callable[[str, Any], float]:
    return lambda _, found: _relative(torch.stack((found[0], found[-1])), expected)


def _info(L: int, shape: shapes.Shape, passes: int) -> dict[str, Any]:
    """The limit of a method that streams the affinity: ``passes`` reads or writes of it."""
    size = 4 * L * shape.F * shape.E
    return {"shape": f"{L} x F {shape.F}, E {shape.E}, {STEPS} steps, tau {TAU:g}", "dtype": "float32", "bytes": passes * size}


# --- the plan ----------------------------------------------------------------------------------------------------------

_POT = ("pot-sinkhorn", "pot-sinkhorn_log", "pot-batch-log_sinkhorn")
FORWARD = (OURS, "eager-loop", "compiled-loop", *_POT, "geomloss")


def _pot(name: str, affinity: Tensor) -> Callable[[], Tensor]:
    """POT on the cost max A - A with probability marginals; the plan times F. Without a batch it takes layer after layer."""
    ot = importlib.import_module("ot")
    L, F, E = affinity.shape
    cost = affinity.amax((1, 2), keepdim=True) - affinity
    a, b = torch.full_like(cost[0, :, 0], 1 / F), torch.full_like(cost[0, 0], 1 / E)
    if name.startswith("pot-batch-"):
        method = name.removeprefix("pot-batch-")
        p, q = a.expand(L, F), b.expand(L, E)
        return lambda: F * ot.solve_batch(cost, TAU, p, q, max_iter=STEPS, tol=0, method=method, grad="detach").plan
    method = name.removeprefix("pot-")
    options = {"method": method, "numItermax": STEPS, "stopThr": 0, "warn": False}
    return lambda: F * torch.stack([ot.sinkhorn(a, b, m, TAU, **options) for m in cost])


def _geomloss(affinity: Tensor) -> Callable[[], Tensor]:
    """geomloss anneals the temperature over its steps and averages the two updates: another path to the same plan."""
    ot = importlib.import_module("geomloss.ot")
    F, E = affinity.shape[1:]
    cost = affinity.amax((1, 2), keepdim=True) - affinity
    a, b = torch.full_like(cost[0, :, 0], 1 / F), torch.full_like(cost[0, 0], 1 / E)
    return lambda: F * torch.stack([ot.solve(m, reg=TAU, a=a, b=b, max_iter=STEPS).plan for m in cost])


def _forward(L: int, F: int, E: int, device: str) -> Case:
    affinity = layers_of(L, F, E, device)
    run: dict[str, Callable[[], Any]] = {
        OURS: lambda: ours()(affinity),
        "eager-loop": lambda: loop(affinity),
        "compiled-loop": lambda: compiled_loop(affinity),
    }
    skipped = {}
    for name in FORWARD[3:]:
        if reason := missing("ot" if name in _POT else "geomloss"):
            skipped[name] = reason
        else:
            run[name] = _geomloss(affinity) if name == "geomloss" else _pot(name, affinity)
    may_differ = frozenset(FORWARD) - {OURS, "eager-loop", "compiled-loop"}
    return Case(run, _against_ends(_ends(loop, affinity)), 1e-3, may_differ, skipped)


# --- the plan and its gradient -----------------------------------------------------------------------------------------

GRADIENT = (OURS, "ours-implicit", "eager-loop", "compiled-loop")
BACKWARD = (OURS, "ours-implicit", "ours-forward")


def gradient(plan_of: Callable[[Tensor], Tensor], affinity: Tensor, grad: Tensor) -> Tensor:
    leaf = affinity.detach().requires_grad_()
    return torch.autograd.grad(plan_of(leaf), leaf, grad)[0]


def _forward_backward(L: int, F: int, E: int, device: str) -> Case:
    affinity, grad = layers_of(L, F, E, device), layers_of(L, F, E, device, seed=1)
    plans = {OURS: ours(), "ours-implicit": ours("implicit"), "eager-loop": loop, "compiled-loop": compiled_loop}
    run: dict[str, Callable[[], Any]] = {name: partial(gradient, plan_of, affinity, grad) for name, plan_of in plans.items()}
    # what ours-implicit gives is the gradient at the fixed point, not that of 50 steps
    expected = _ends(partial(gradient, loop), affinity, grad)
    return Case(run, _against_ends(expected), 1e-3, frozenset({"ours-implicit"}))


def _backward(L: int, F: int, E: int, device: str) -> Case:
    affinity, grad = layers_of(L, F, E, device), layers_of(L, F, E, device, seed=1)

    def only_backward(backward: str) -> Callable[[], Tensor]:
        leaf = affinity.detach().requires_grad_()
        plan = ours(backward)(leaf)
        return lambda: torch.autograd.grad(plan, leaf, grad, retain_graph=True)[0]

    run: dict[str, Callable[[], Any]] = {
        OURS: only_backward("unroll"),
        "ours-implicit": only_backward("implicit"),
        "ours-forward": lambda: ours()(affinity),
    }
    by_name = {
        "ours-forward": _against_ends(_ends(loop, affinity)),
        OURS: _against_ends(_ends(partial(gradient, loop), affinity, grad)),
    }

    def error(name: str, found: Any) -> float:
        return by_name.get(name, by_name[OURS])(name, found)

    return Case(run, error, 1e-3, frozenset({"ours-implicit"}))


# --- warm start --------------------------------------------------------------------------------------------------------

WARM = (OURS, "ours-cold-tol", "ours-cold-50", "eager-cold-50")


def _warm(L: int, F: int, E: int, device: str) -> Case:
    """A has moved a little, as after an optimiser step: to a tolerance of 1e-3 from the last potentials, and from scratch."""
    before = layers_of(L, F, E, device)
    after = before + 0.01 * layers_of(L, F, E, device, seed=1)
    init = dk.sinkhorn(before, tau=TAU, num_iters=200, tol=1e-4, return_info=True)[1].log_v
    del before
    warm = partial(dk.sinkhorn, after, tau=TAU, num_iters=STEPS, tol=1e-3, init=init)
    cold = partial(dk.sinkhorn, after, tau=TAU, num_iters=STEPS, tol=1e-3)
    run: dict[str, Callable[[], Any]] = {
        OURS: warm,
        "ours-cold-tol": cold,
        "ours-cold-50": lambda: ours()(after),
        "eager-cold-50": lambda: loop(after),
    }
    steps = {n: int(c(return_info=True)[1].num_iters.max()) for n, c in ((OURS, warm), ("ours-cold-tol", cold))}

    def error(_: str, plan: Tensor) -> float:
        return float((plan.double().sum(1) * (E / F) - 1).abs().max())

    extra = {name: {"steps": count} for name, count in steps.items()}
    return Case(run, error, 2e-3, frozenset(WARM) - {OURS}, extra=extra)


# --- rounding ----------------------------------------------------------------------------------------------------------

ROUNDING = (OURS, "ours-graph", "numpy-argsort-loop")


def _rounding(L: int, F: int, E: int, device: str) -> Case:
    affinity = layers_of(L, F, E, device)
    info = dk.sinkhorn(affinity, tau=TAU, num_iters=STEPS, return_info=True)[1]
    scores = affinity / TAU + info.log_u[..., None] + info.log_v[..., None, :]
    del affinity, info

    def on_host() -> Tensor:
        return torch.stack([torch.from_numpy(argsort_loop(s.cpu().numpy(), F // E)) for s in scores])

    run: dict[str, Callable[[], Any]] = {OURS: lambda: dk.balanced_assignment(scores), "numpy-argsort-loop": on_host}
    skipped = {}
    if device == "cuda":
        dk.balanced_assignment(scores)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = dk.balanced_assignment(scores)

        def replay() -> Tensor:
            graph.replay()
            return captured

        run["ours-graph"] = replay
    else:
        skipped["ours-graph"] = "needs a GPU"
    if L > 1:
        skipped["numpy-argsort-loop"] = f"about a second a layer on the host, {L} layers: see the group of one layer"
    ends = [argsort_loop(scores[i].cpu().numpy(), F // E) for i in (0, -1)]

    def error(_: str, expert_of: Any) -> float:
        found = torch.as_tensor(expert_of).cpu()
        return max(float((found[i].numpy() != end).mean()) for i, end in zip((0, -1), ends, strict=True))

    return Case(run, error, 0.0, frozenset(), skipped)  # the same answer, not a similar one


def transport_groups(device: str = "cuda", sizes: tuple[tuple[str, int, shapes.Shape], ...] = SIZES) -> list[Group]:
    kinds: tuple[tuple[str, tuple[str, ...], Callable[..., Case], int], ...] = (
        ("sinkhorn", FORWARD, _forward, STEPS + 2),
        ("rounding", ROUNDING, _rounding, 1),
        ("warm start", WARM, _warm, 4),
        ("sinkhorn backward", BACKWARD, _backward, STEPS + 3),
        ("sinkhorn gradient", GRADIENT, _forward_backward, 2 * STEPS + 5),
    )
    return [
        Group(f"{kind} {name}", impls, partial(prepare, L, shape.F, shape.E, device), _info(L, shape, passes))
        for name, L, shape in sizes
        for kind, impls, prepare, passes in kinds
    ]
