"""Transport: 50 Sinkhorn steps on an F x E affinity, float32. How fast is the plan, its gradient, and a warm start?

Every implementation takes 50 row and 50 column updates. POT begins with the columns, ``ot.solve_batch`` ends with them: each is
compared with the float64 reference of its own order. A peer that loses its digits, or takes another path, is timed and marked.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench import memory, shapes
from bench.paired import Case, Group, cases, missing
from dotmoe_kernels import reference
from tests.shapes import normal

STEPS = 50


def loop_step(x: Tensor, g: Tensor, log_c: Tensor) -> Tensor:
    """One step of the logsumexp loop: rows, then columns."""
    f = -torch.logsumexp(x + g, -1)
    return log_c - torch.logsumexp(x + f[:, None], 0)


def loop(affinity: Tensor, tau: float, steps: int = STEPS, step: Callable[..., Tensor] = loop_step) -> Tensor:
    """The log-domain loop as one writes it in PyTorch; autograd goes through it."""
    F, E = affinity.shape
    x = affinity / tau
    log_c = torch.full((E,), F / E, dtype=x.dtype).log()
    g = torch.zeros_like(log_c)
    for _ in range(steps):
        g = step(x, g, log_c)
    f = -torch.logsumexp(x + g, -1)
    return torch.exp(x + f[:, None] + g)


@lru_cache(maxsize=1)
def compiled_step() -> Callable[..., Tensor]:
    return torch.compile(loop_step, dynamic=False)


# --- the plan -----------------------------------------------------------------------------------------------------------

_POT_SINKHORN = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling", "greenkhorn")
_POT = tuple(
    f"pot-{backend}-{method}"
    for backend in ("numpy", "torch")
    for method in (*_POT_SINKHORN, "solve", "batch-sinkhorn", "batch-log_sinkhorn")
)
FORWARD = ("ours", "eager-loop", "compiled-loop", *_POT, "geomloss-numpy", "geomloss-torch")


def _pot(name: str, affinity: Tensor, tau: float) -> Callable[[], Any]:
    """POT on the cost max A - A >= 0 with probability marginals; the plan is F times too small, which the check makes up for."""
    ot = importlib.import_module("ot")
    _, backend, method = name.split("-", 2)
    F, E = affinity.shape
    cost, a, b = affinity.max() - affinity, torch.full((F,), 1 / F), torch.full((E,), 1 / E)
    m, p, q = (t.numpy() if backend == "numpy" else t for t in (cost, a, b))
    if method == "solve":
        return lambda: ot.solve(m, p, q, reg=tau, max_iter=STEPS, tol=0).plan
    if method.startswith("batch-"):
        inner = method.removeprefix("batch-")
        return lambda: ot.solve_batch(m[None], tau, p[None], q[None], max_iter=STEPS, tol=0, method=inner, grad="detach").plan[0]
    # one inner step for each of the outer ones: 50 in all
    options = {"numInnerItermax": 1} if method == "sinkhorn_epsilon_scaling" else {}
    return lambda: ot.sinkhorn(p, q, m, tau, method=method, numItermax=STEPS, stopThr=0, warn=False, **options)


def _geomloss(name: str, affinity: Tensor, tau: float) -> Callable[[], Any]:
    """geomloss anneals the temperature over its steps and averages the two updates: another path to the same plan."""
    ot = importlib.import_module("geomloss.ot")
    F, E = affinity.shape
    cost, a, b = affinity.max() - affinity, torch.full((F,), 1 / F), torch.full((E,), 1 / E)
    m, p, q = (t.numpy() if name.endswith("numpy") else t for t in (cost, a, b))
    return lambda: ot.solve(m, reg=tau, a=p, b=q, max_iter=STEPS).plan


def _forward(F: int, E: int, tau: float) -> Case:
    warnings.filterwarnings("ignore", message=".*(numerical|Numerical|converge|divide by zero|overflow|invalid value).*")
    affinity = normal(F, E, seed=0, dtype=torch.float32)
    wide = affinity.double()
    columns = torch.full((F,), E / F, dtype=torch.float64)
    by_order = {
        "row": reference.sinkhorn(wide, tau=tau, num_iters=STEPS)[0],
        "column": reference.sinkhorn(wide, tau=tau, num_iters=STEPS, final="column")[0],
        "columns first": reference.sinkhorn(wide.T, columns, tau=tau, num_iters=STEPS, final="column")[0].T * (F / E),
    }
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.sinkhorn(affinity, tau=tau, num_iters=STEPS),
        "eager-loop": lambda: loop(affinity, tau),
        "compiled-loop": lambda: loop(affinity, tau, step=compiled_step()),
    }
    skipped = {}
    for name in _POT:
        if reason := missing("ot"):
            skipped[name] = reason
        elif name.endswith("greenkhorn"):
            skipped[name] = f"moves one row or column an iteration: {STEPS} steps would be {STEPS * (F + E):,} Python iterations"
        else:
            run[name] = _pot(name, affinity, tau)
    for name in ("geomloss-numpy", "geomloss-torch"):
        if reason := missing("geomloss"):
            skipped[name] = reason
        else:
            run[name] = _geomloss(name, affinity, tau)

    def error(name: str, plan: Any) -> float:
        p = torch.as_tensor(plan).double()
        order = "row" if name in paired_row else "column" if "batch" in name else "columns first"
        distance = float((p * (F if name.startswith(("pot", "geomloss")) else 1) - by_order[order]).abs().max())
        return distance if distance == distance else float("inf")

    paired_row = {"ours", "eager-loop", "compiled-loop"}
    extra = {
        name: {"result_dtype": "float64", "note": "the NumPy route leaves float32"}
        for name in ("pot-numpy-sinkhorn_epsilon_scaling", "pot-numpy-batch-sinkhorn")
    }
    return Case(run, error, 1e-4, frozenset(set(FORWARD) - paired_row), skipped, extra)


# --- the plan and its gradient --------------------------------------------------------------------------------------------

GRADIENT = ("ours", "ours-implicit", "eager-loop", "compiled-loop", "pot-torch-sinkhorn", "pot-torch-batch-sinkhorn")


def _plan_of(name: str, tau: float) -> Callable[[Tensor], Tensor]:
    """affinity -> plan, differentiable."""
    if name.startswith("ours"):
        backward = "implicit" if name.endswith("implicit") else "unroll"
        return lambda a: dk.sinkhorn(a, tau=tau, num_iters=STEPS, backward=backward)
    if name == "compiled-loop":
        return lambda a: loop(a, tau, step=compiled_step())
    if name == "eager-loop":
        return lambda a: loop(a, tau)
    ot = importlib.import_module("ot")

    def pot(a: Tensor) -> Tensor:
        F, E = a.shape
        p, q, m = torch.full((F,), 1 / F), torch.full((E,), 1 / E), a.detach().max() - a
        if "batch" in name:
            solved = ot.solve_batch(m[None], tau, p[None], q[None], max_iter=STEPS, tol=0, method="sinkhorn", grad="autodiff")
            return F * solved.plan[0]
        return F * ot.sinkhorn(p, q, m, tau, numItermax=STEPS, stopThr=0, warn=False)

    return pot


def _gradient(plan_of: Callable[[Tensor], Tensor], affinity: Tensor, grad: Tensor) -> Tensor:
    leaf = affinity.detach().requires_grad_()
    return torch.autograd.grad(plan_of(leaf), leaf, grad)[0]


def _gradient_inputs(F: int, E: int) -> tuple[Tensor, Tensor]:
    return normal(F, E, seed=0, dtype=torch.float32), normal(F, E, seed=1, dtype=torch.float32)


def memory_call(name: str) -> Callable[[], Any]:
    """For ``bench.memory``: "IMPL F E TAU"."""
    impl, F, E, tau = name.split()
    plan_of = _plan_of(impl, float(tau))
    if impl == "compiled-loop":
        _gradient(plan_of, *_gradient_inputs(int(F), int(E)))  # compiles for this very shape
    _gradient(plan_of, *_gradient_inputs(64, int(E)))
    return partial(_gradient, plan_of, *_gradient_inputs(int(F), int(E)))


def _relative(found: Tensor, expected: Tensor) -> float:
    distance = float((found.double() - expected).norm() / expected.norm())
    return distance if distance == distance else float("inf")


def _forward_backward(F: int, E: int, tau: float) -> Case:
    affinity, grad = _gradient_inputs(F, E)
    expected = _gradient(lambda a: loop(a, tau), affinity.double(), grad.double())
    skipped = {name: reason for name in GRADIENT if name.startswith("pot") and (reason := missing("ot"))}
    names = [name for name in GRADIENT if name not in skipped]
    run: dict[str, Callable[[], Any]] = {name: partial(_gradient, _plan_of(name, tau), affinity, grad) for name in names}
    module = "bench.bench_transport"
    weighed = names if F == shapes.L3.F else ("ours", "eager-loop")  # a process each: just these two in the quick group
    extra = {name: {"peak_bytes": memory.peak_extra_bytes(module, f"{name} {F} {E} {tau}")} for name in weighed}
    may_differ = frozenset(n for n in GRADIENT if n.startswith("pot") or n == "ours-implicit")
    return Case(run, lambda _, found: _relative(found, expected), 1e-3, may_differ, skipped, extra)


BACKWARD = ("ours", "ours-implicit", "ours-forward", "eager-loop")


def _backward(F: int, E: int, tau: float) -> Case:
    affinity, grad = _gradient_inputs(F, E)
    expected = _gradient(lambda a: loop(a, tau), affinity.double(), grad.double())

    def only_backward(name: str) -> Callable[[], Tensor]:
        leaf = affinity.clone().requires_grad_()
        plan = _plan_of(name, tau)(leaf)
        return lambda: torch.autograd.grad(plan, leaf, grad, retain_graph=True)[0]

    run: dict[str, Callable[[], Any]] = {name: only_backward(name) for name in BACKWARD if name != "ours-forward"}
    run["ours-forward"] = lambda: dk.sinkhorn(affinity, tau=tau, num_iters=STEPS)
    plan = reference.sinkhorn(affinity.double(), tau=tau, num_iters=STEPS)[0]

    def error(name: str, found: Tensor) -> float:
        return _relative(found, plan if name == "ours-forward" else expected)

    return Case(run, error, 1e-3, frozenset({"ours-implicit"}))


# --- warm start -------------------------------------------------------------------------------------------------------------

WARM = ("ours", "ours-cold-tol", "ours-cold-50", "eager-cold-50")


def _warm(F: int, E: int, tau: float) -> Case:
    """A has moved a little, as after an optimiser step: to a tolerance of 1e-3 from the last potentials, and from scratch."""
    before = normal(F, E, seed=0, dtype=torch.float32)
    after = before + normal(F, E, seed=1, scale=0.01, dtype=torch.float32)
    init = dk.sinkhorn(before, tau=tau, num_iters=1000, tol=1e-4, return_info=True)[1].log_v
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.sinkhorn(after, tau=tau, num_iters=1000, tol=1e-3, init=init),
        "ours-cold-tol": lambda: dk.sinkhorn(after, tau=tau, num_iters=1000, tol=1e-3),
        "ours-cold-50": lambda: dk.sinkhorn(after, tau=tau, num_iters=STEPS),
        "eager-cold-50": lambda: loop(after, tau),
    }
    steps = {
        "ours": int(dk.sinkhorn(after, tau=tau, num_iters=1000, tol=1e-3, init=init, return_info=True)[1].num_iters),
        "ours-cold-tol": int(dk.sinkhorn(after, tau=tau, num_iters=1000, tol=1e-3, return_info=True)[1].num_iters),
        "ours-cold-50": STEPS,
        "eager-cold-50": STEPS,
    }

    def error(_: str, plan: Tensor) -> float:
        return float((plan.double().sum(0) * (E / F) - 1).abs().max())

    extra = {name: {"steps": count} for name, count in steps.items()}
    return Case(run, error, 2e-3, frozenset({"ours-cold-50", "eager-cold-50"}), extra=extra)


def _info(F: int, E: int, tau: float, passes: int, **more: Any) -> dict[str, Any]:
    """Two products with K [F, E] a step; a pass over the matrix is 2 F E flops and reads it once."""
    return {
        "shape": f"F {F}, E {E}, {STEPS} steps, tau {tau:g}",
        "dtype": "float32",
        "flops": 2 * F * E * passes * STEPS,
        "bytes": 4 * F * E * passes * STEPS,
        **more,
    }


def _groups() -> list[Group]:
    groups = []
    E = shapes.L3.E
    for prefix, F, taus in (("quick-", shapes.L3.F // 4, (1.0,)), ("", shapes.L3.F, (1.0, 0.05))):
        rounds = 5 if prefix else 11
        budget = 1.0 if prefix else 6.0
        for tau in taus:
            for name, impls, prepare, passes in (
                ("sinkhorn", FORWARD, _forward, 2),
                ("sinkhorn-gradient", GRADIENT, _forward_backward, 6),
                ("sinkhorn-backward", BACKWARD, _backward, 4),
            ):
                title = f"{prefix}{name}-tau{tau:g}"
                groups.append(Group(title, impls, partial(prepare, F, E, tau), _info(F, E, tau, passes), rounds, budget))
        groups.append(Group(f"{prefix}sinkhorn-warm", WARM, partial(_warm, F, E, 0.1), _info(F, E, 0.1, 2), rounds, budget))
    return groups


@cases(_groups())
def test_transport(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
