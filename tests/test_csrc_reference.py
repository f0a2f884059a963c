"""The C oracle against reference.py and autograd through it, in float64.

Two implementations that share no code: a mistake in one shows here. The tolerance is 1e-10 relative (plus 1e-12): both sides
sum at most a few thousand float64 terms, in different orders. Looser ones are explained where they stand.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotmoe_kernels import reference

SOURCE = Path(__file__).resolve().parents[1] / "csrc_reference"
OK, NULL, BAD_SIZE, BAD_SCALAR, BAD_VALUE, NO_MEMORY, SINGULAR = 0, -1, -2, -3, -4, -5, -6
SHAPES = [(1, 1), (5, 1), (2, 9), (63, 7), (97, 53)]  # [F, E] or [T, E]
ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}
SCALARS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
ARRAYS = {"double": torch.float64, "int64_t": torch.int64, "int32_t": torch.int32, "uint8_t": torch.uint8}


class Library:
    """The functions of dotmoe_reference.h: `library.sinkhorn(...)` takes ints, floats, tensors, None for NULL."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        header = re.sub(r"/\*.*?\*/", "", (SOURCE / "dotmoe_reference.h").read_text(), flags=re.S)
        for name, arguments in re.findall(r"^int dotmoe_(\w+)\(([^)]*)\);", header, flags=re.M):
            kinds = [re.fullmatch(r"(?:const )?(\w+) (\*?)\w+", " ".join(a.split())).groups() for a in arguments.split(",")]
            function = getattr(library, f"dotmoe_{name}")
            function.argtypes = [ctypes.c_void_p if star else SCALARS[kind] for kind, star in kinds]
            setattr(self, name, self._caller(name, function, kinds))

    @staticmethod
    def _caller(name, function, kinds):
        def call(*values, status: int = OK) -> None:
            passed = []
            assert len(values) == len(kinds), f"{name} takes {len(kinds)} arguments, not {len(values)}"
            for value, (kind, star) in zip(values, kinds, strict=True):
                if isinstance(value, Tensor) and star:
                    assert value.is_contiguous(), f"{name} takes dense arrays"
                    assert value.dtype == ARRAYS[kind], f"{name}: {value.dtype} for {kind}"
                    value = value.data_ptr()
                passed.append(value)
            assert function(*passed) == status

        return call


@pytest.fixture(scope="session")
def compiler() -> str:
    found = next((path for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no C compiler: neither $CC nor cc, gcc or clang was found")
    return found


@pytest.fixture(scope="session")
def c(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Library:
    path = tmp_path_factory.mktemp("csrc_reference") / "libdotmoe_reference.so"
    sources = [str(file) for file in sorted(SOURCE.glob("*.c")) if file.name != "check.c"]
    flags = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, "-o", str(path), *sources, "-lm"], check=True)
    return Library(path)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randint(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def like(*tensors: Tensor) -> list[Tensor]:
    """Outputs to be written: NaN, so that an element left out shows; integers get a value that is never right."""
    return [torch.full_like(t, math.nan if t.is_floating_point() else -7).detach().contiguous() for t in tensors]


def number() -> Tensor:
    return torch.full((), math.nan, dtype=torch.float64)


def check(got: Tensor, wanted: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, wanted.detach(), rtol=rtol, atol=atol)


def gradients(output: Tensor, dy: Tensor, *inputs: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((output * dy).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g.contiguous() for i, g in zip(inputs, found, strict=True)]


# --- transport -----------------------------------------------------------------------------------------------------------


def uneven(F: int, E: int) -> Tensor:
    share = torch.linspace(1.0, 3.0, E, dtype=torch.float64)
    return share * F / share.sum()


def run_sinkhorn(c: Library, a: Tensor, capacity, tau: float, num_iters: int, tol=0.0, init=None, final="row"):
    """plan, log_u, log_v, taken, error, history"""
    F, E = a.shape
    plan, u, v, history = like(a, a[:, 0], a[0], a.new_empty(num_iters + 1, E))
    taken, error = torch.zeros((), dtype=torch.int64), number()
    c.sinkhorn(F, E, a, capacity, tau, num_iters, tol, init, int(final == "column"), plan, u, v, taken, error, history)
    return plan, u, v, int(taken), error, history


@pytest.mark.parametrize("final", ["row", "column"])
@pytest.mark.parametrize(("num_iters", "tol"), [(0, 0.0), (1, 0.0), (9, 0.0), (40, 1e-3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sinkhorn(c, shape, num_iters, tol, final):
    F, E = shape
    for options in ({}, {"capacity": uneven(F, E), "init": randn(E, seed=1)}):
        a, capacity, init = randn(F, E).requires_grad_(), options.get("capacity"), options.get("init")
        tau = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        inputs = [a, tau] + [t.requires_grad_() for t in options.values()]
        wanted, info = reference.sinkhorn(a, capacity, tau=tau, num_iters=num_iters, tol=tol, init=init, final=final)
        plan, u, v, taken, error, history = run_sinkhorn(c, a, capacity, 0.4, num_iters, tol, init, final)
        assert taken == int(info.num_iters)
        check(plan, wanted)
        check(u, info.log_u)
        check(v, info.log_v)
        check(error, info.error)  # the difference of a sum and 1: only the absolute part of the tolerance means something
        dplan = randn(F, E, seed=2)
        da, dc, dg = like(a, a[0], a[0])
        dtau = number()
        c.sinkhorn_backward(F, E, a, capacity, 0.4, taken, history, int(final == "column"), dplan, da, dtau, dc, dg)
        for got, grad in zip((da, dtau, dc, dg), gradients(wanted, dplan, *inputs), strict=False):
            check(got, grad)


def test_sinkhorn_stops_after_applying_the_update(c):
    a = randn(63, 7)
    _, _, v, taken, error, history = run_sinkhorn(c, a, None, 0.3, 200, tol=1e-6)
    _, _, previous, _, _, _ = run_sinkhorn(c, a, None, 0.3, taken - 1)
    assert 1 < taken < 200
    assert float(error) < 1e-6
    check(history[taken], v)
    check(history[taken - 1], previous)
    assert history[taken + 1 :].isnan().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_implicit_gradient_is_the_unrolled_one_at_the_fixed_point(c, shape):
    F, E = shape
    a, capacity = randn(F, E).requires_grad_(), uneven(F, E).requires_grad_()
    tau = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    plan, info = reference.sinkhorn(a, capacity, tau=tau, num_iters=400, tol=1e-15)
    assert float(info.error) < 1e-13
    dplan = randn(F, E, seed=3)
    da, dc = like(a, capacity)
    dtau = number()
    c.sinkhorn_implicit_backward(F, E, a, 0.7, 1e-13, plan.detach(), dplan, da, dtau, dc)
    # 1e-9: the ridge of 1e-13 moves the solution by about as much over the smallest eigenvalue of the system
    for got, grad in zip((da, dtau, dc), gradients(plan, dplan, a, tau, capacity), strict=True):
        check(got, grad, rtol=1e-9, atol=1e-10)


def test_implicit_gradient_of_a_hard_plan_is_zero(c):
    plan = torch.nn.functional.one_hot(torch.arange(12) % 4, 4).to(torch.float64)
    a, dplan = randn(12, 4), randn(12, 4, seed=1)
    (da,) = like(a)
    c.sinkhorn_implicit_backward(12, 4, a, 0.1, 1e-12, plan, dplan, da, None, None)
    assert float(da.abs().max()) < 1e-12
    c.sinkhorn_implicit_backward(12, 4, a, 0.1, 0.0, plan, dplan, da, None, None, status=SINGULAR)


def test_sinkhorn_far_from_balance_stays_finite(c):
    """Columns 1e4 below their rows: every column sum underflows, and the log-domain potentials do not."""
    a = randn(30, 4) + torch.tensor([0.0, -1e4, 1e4, 3.0], dtype=torch.float64)
    plan, *_, error, history = run_sinkhorn(c, a, None, 1.0, 60)
    assert float(error) < 1e-6
    (da,) = like(a)
    c.sinkhorn_backward(30, 4, a, None, 1.0, 60, history, 0, randn(30, 4), da, None, None, None)
    assert da.isfinite().all()
    check(plan, reference.sinkhorn(a, num_iters=60)[0])


@pytest.mark.parametrize(
    ("status", "change"),
    [
        (BAD_SIZE, {"F": 0}),
        (BAD_SIZE, {"F": 2**61, "E": 8}),
        (BAD_SIZE, {"num_iters": 2**62}),
        (NULL, {"affinity": None}),
        (NULL, {"plan": None}),
        (BAD_SCALAR, {"tau": 0.0}),
        (BAD_SCALAR, {"tau": math.nan}),
        (BAD_SCALAR, {"tau": math.inf}),
        (BAD_SCALAR, {"num_iters": -1}),
        (BAD_SCALAR, {"tol": -1.0}),
        (BAD_SCALAR, {"final": 2}),
        (BAD_VALUE, {"affinity": torch.full((4, 2), math.nan, dtype=torch.float64)}),
        (BAD_VALUE, {"tau": 1e-308, "affinity": torch.full((4, 2), 10.0, dtype=torch.float64)}),
        (BAD_VALUE, {"capacity": torch.tensor([4.0, 0.0], dtype=torch.float64)}),
        (BAD_VALUE, {"capacity": torch.tensor([4.0, 1.0], dtype=torch.float64)}),
        (BAD_VALUE, {"init": torch.tensor([0.0, math.inf], dtype=torch.float64)}),
    ],
)
def test_sinkhorn_rejects(c, status, change):
    a = randn(4, 2)
    plan, u, v, history = like(a, a[:, 0], a[0], a.new_empty(6, 2))
    arguments = {"F": 4, "E": 2, "affinity": a, "capacity": None, "tau": 1.0, "num_iters": 5, "tol": 0.0, "init": None}
    arguments |= {"final": 0, "plan": plan, "u": u, "v": v, "taken": torch.zeros((), dtype=torch.int64), "error": number()}
    arguments["history"] = history
    c.sinkhorn(*arguments.values())
    c.sinkhorn(*(arguments | change).values(), status=status)


def test_sinkhorn_gradients_reject(c):
    a, history, plan = randn(4, 2), torch.zeros(2, 2, dtype=torch.float64), torch.full((4, 2), 0.5, dtype=torch.float64)
    (da,) = like(a)
    c.sinkhorn_backward(4, 2, a, None, 1.0, -1, history, 0, a, da, None, None, None, status=BAD_SIZE)
    c.sinkhorn_backward(4, 2, a, None, 1.0, 1, None, 0, a, da, None, None, None, status=NULL)
    c.sinkhorn_backward(4, 2, a, None, 1.0, 1, history, 0, a, None, None, None, None, status=NULL)
    c.sinkhorn_backward(4, 2, a, None, 1.0, 1, history * math.nan, 0, a, da, None, None, None, status=BAD_VALUE)
    c.sinkhorn_implicit_backward(4, 2, a, 1.0, -1.0, plan, a, da, None, None, status=BAD_SCALAR)
    c.sinkhorn_implicit_backward(4, 2, a, 1.0, 1e-12, -plan, a, da, None, None, status=BAD_VALUE)
    c.sinkhorn_implicit_backward(4, 2, a, 1.0, 1e-12, 0 * plan, a, da, None, None, status=BAD_VALUE)


# --- rounding ------------------------------------------------------------------------------------------------------------


def default_capacity(F: int, E: int) -> list[int]:
    return [F // E + (e < F % E) for e in range(E)]


def check_rounding(c: Library, scores: Tensor, capacity: list[int] | None) -> None:
    F, E = scores.shape
    wanted = reference.greedy_assignment(scores, capacity or default_capacity(F, E))
    greedy, proposed = like(wanted, wanted)
    rounds, proposals = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    given_capacity = None if capacity is None else torch.tensor(capacity)
    c.greedy_assignment(F, E, scores, given_capacity, greedy)
    c.proposal_assignment(F, E, scores, given_capacity, proposed, rounds, proposals)
    assert greedy.tolist() == wanted.tolist()
    assert proposed.tolist() == wanted.tolist()
    assert F <= int(proposals) <= F * E
    gap = number()
    c.assignment_gap(F, E, scores, greedy, gap)
    check(gap, (scores.amax(1) - scores.gather(1, wanted[:, None])[:, 0]).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding(c, shape):
    F, E = shape
    check_rounding(c, randn(F, E), None)
    check_rounding(c, randint(3, F, E).to(torch.float64), None)  # mostly ties
    check_rounding(c, torch.zeros(F, E, dtype=torch.float64), None)
    check_rounding(c, randn(F, E), [0] * (E - 1) + [F])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rounding_with_any_capacity(c, data):
    F, E = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    cuts = sorted(data.draw(st.lists(st.integers(0, F), min_size=E - 1, max_size=E - 1)))
    capacity = [b - a for a, b in zip([0, *cuts], [*cuts, F], strict=True)]
    values = data.draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0]), min_size=F * E, max_size=F * E))
    check_rounding(c, torch.tensor(values, dtype=torch.float64).view(F, E), capacity)


def test_rounding_rejects(c):
    scores, expert_of = randn(4, 2), torch.zeros(4, dtype=torch.int64)
    for name, rest in (("greedy_assignment", []), ("proposal_assignment", [None, None])):
        function = getattr(c, name)
        function(0, 2, scores, None, expert_of, *rest, status=BAD_SIZE)
        function(2**62, 4, scores, None, expert_of, *rest, status=BAD_SIZE)
        function(4, 2, None, None, expert_of, *rest, status=NULL)
        function(4, 2, scores, None, None, *rest, status=NULL)
        for capacity in ([2, 1], [2, 3], [-1, 5], [2**62, 2**62]):
            function(4, 2, scores, torch.tensor(capacity), expert_of, *rest, status=BAD_VALUE)
        function(4, 2, scores * math.nan, None, expert_of, *rest, status=BAD_VALUE)
    c.assignment_gap(4, 2, scores, expert_of + 2, number(), status=BAD_VALUE)
    c.assignment_gap(4, 2, scores, expert_of, None, status=NULL)


# --- permutation ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("F", "E"), [(0, 3), *SHAPES])
def test_neuron_order(c, F, E):
    expert_of = randint(E, F)
    wanted = reference.neuron_order(expert_of)
    order, inverse = like(wanted, wanted)
    c.neuron_order(F, E, expert_of, order)
    c.inverse_order(F, order, inverse)
    assert order.tolist() == wanted.tolist()
    assert inverse.tolist() == torch.argsort(wanted).tolist()


@pytest.mark.parametrize(("F", "E", "H"), [(1, 1, 1), (12, 1, 5), (12, 4, 5), (21, 7, 3)])
def test_expert_blocks(c, F, E, H):
    expert_of = torch.arange(F)[torch.randperm(F, generator=torch.Generator().manual_seed(0))] % E
    gate, up, down = randn(F, H), randn(F, H, seed=1), randn(H, F, seed=2)
    order = reference.neuron_order(expert_of)
    wanted = reference.expert_blocks(gate, up, down, order, E)
    both, blocks = like(*(w.contiguous() for w in wanted))
    c.expert_blocks(F, E, H, order, gate, up, down, both, blocks)
    assert torch.equal(both, wanted[0])
    assert torch.equal(blocks, wanted[1])
    back = like(gate, up, down)
    c.dense_weights(F, E, H, order, both, blocks, *back)
    assert all(torch.equal(b, w) for b, w in zip(back, (gate, up, down), strict=True))


def test_permutation_rejects(c):
    out, w = torch.zeros(4, dtype=torch.int64), randn(4, 4)
    c.neuron_order(-1, 2, out, out, status=BAD_SIZE)
    c.neuron_order(4, 2, None, out, status=NULL)
    c.neuron_order(4, 2, torch.tensor([0, 1, 2, 0]), out, status=BAD_VALUE)
    c.inverse_order(4, torch.tensor([0, 1, 1, 2]), out, status=BAD_VALUE)
    c.inverse_order(4, torch.tensor([0, 1, 4, 2]), out, status=BAD_VALUE)
    c.expert_blocks(4, 3, 4, torch.arange(4), w, w, w, w, w, status=BAD_SIZE)
    c.dense_weights(4, 2, 4, torch.arange(4), None, w, w, w, w, status=NULL)


# --- routing -------------------------------------------------------------------------------------------------------------

MODES = ["unit", "softmax", "renormalized"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", ["all", "some", "none"])
@pytest.mark.parametrize(("T", "E", "K"), [(0, 4, 2), (1, 1, 1), (63, 7, 3), (97, 53, 13), (6, 5, 5)])
@pytest.mark.parametrize("ties", [False, True])
def test_route_top_k(c, T, E, K, mask, mode, ties):
    logits = (randint(3, T, E).to(torch.float64) if ties else 2 * randn(T, E)).requires_grad_()
    valid = {"all": None, "some": randint(2, T, seed=1).to(torch.uint8), "none": torch.zeros(T, dtype=torch.uint8)}[mask]
    wanted = reference.route_top_k(logits, K, weights=mode, mask=valid)
    indices, weights, probs, load = like(*wanted[:4])
    balance, z = number(), number()
    c.route_top_k(T, E, K, logits, valid, MODES.index(mode), indices, weights, probs, load, balance, z)
    assert indices.tolist() == wanted.indices.tolist()
    for got, tensor in zip((weights, probs, load, balance, z), wanted[1:], strict=True):
        check(got, tensor)
    dweights, dprobs = randn(T, K, seed=2), randn(T, E, seed=3)
    loss = (wanted.weights * dweights).sum() + (wanted.probs * dprobs).sum()
    loss = loss + 0.6 * wanted.balance_loss - 0.2 * wanted.z_loss
    (dlogits,) = like(logits)
    c.route_top_k_backward(T, E, K, logits, valid, MODES.index(mode), indices, load, dweights, dprobs, 0.6, -0.2, dlogits)
    check(dlogits, torch.autograd.grad(loss, logits)[0])


def test_route_top_k_of_a_forbidden_expert(c):
    """-inf logits: never chosen before a finite one, probability 0, gradient 0."""
    logits = randn(9, 4)
    logits[:, 1] = -math.inf
    wanted = reference.route_top_k(logits.requires_grad_(), 2, weights="renormalized")
    indices, weights, probs, load, dlogits = like(*wanted[:4], logits)
    c.route_top_k(9, 4, 2, logits, None, 2, indices, weights, probs, load, number(), number())
    assert indices.tolist() == wanted.indices.tolist()
    c.route_top_k_backward(9, 4, 2, logits, None, 2, indices, load, randn(9, 2), None, 0.0, 1.0, dlogits)
    check(dlogits, torch.autograd.grad((wanted.weights * randn(9, 2)).sum() + wanted.z_loss, logits)[0])


def test_route_top_k_rejects(c):
    logits = randn(3, 4)
    indices, weights = torch.zeros(3, 2, dtype=torch.int64), randn(3, 2)
    probs, load, one = randn(3, 4), torch.zeros(4, dtype=torch.float64), number()
    outputs = (indices, weights, probs, load, one, one)
    c.route_top_k(-1, 4, 2, logits, None, 0, *outputs, status=BAD_SIZE)
    c.route_top_k(3, 0, 2, logits, None, 0, *outputs, status=BAD_SIZE)
    c.route_top_k(3, 4, 2, None, None, 0, *outputs, status=NULL)
    c.route_top_k(3, 4, 2, logits, None, 0, indices, weights, probs, None, one, one, status=NULL)
    for K, mode in ((0, 0), (5, 0), (2, 3), (2, -1)):
        c.route_top_k(3, 4, K, logits, None, mode, *outputs, status=BAD_SCALAR)
    for bad in (math.nan, math.inf):
        c.route_top_k(3, 4, 2, logits.clone().fill_diagonal_(bad), None, 0, *outputs, status=BAD_VALUE)
    c.route_top_k(3, 4, 2, logits - math.inf, None, 0, *outputs, status=BAD_VALUE)
    c.route_top_k_backward(3, 4, 2, logits, None, 0, indices + 5, load, weights, None, 0.0, 0.0, probs, status=BAD_VALUE)
    c.route_top_k_backward(3, 4, 2, logits, None, 0, indices, load, weights, None, 0.0, 0.0, None, status=NULL)


# --- soft_topk -----------------------------------------------------------------------------------------------------------


def run_soft_top_k(c: Library, r: Tensor, k: Tensor, alpha: Tensor, dp: Tensor) -> list[Tensor]:
    """p, dscores, dk, dtemperature"""
    p, dr, dk, dalpha = outputs = like(r, r, k, alpha)
    c.soft_top_k(*r.shape, r, k, alpha, p)
    c.soft_top_k_backward(*r.shape, r, k, alpha, dp, dr, dk, dalpha)
    return outputs


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("shape", [(0, 4), *SHAPES])
def test_soft_top_k(c, shape, ties):
    T, E = shape
    r = (randint(3, T, E).to(torch.float64) if ties else randn(T, E)).requires_grad_()
    k = (E * (0.02 + 0.96 * torch.sigmoid(2 * randn(T, seed=1)))).requires_grad_()
    alpha = torch.exp(0.5 * randn(T, seed=2)).requires_grad_()
    p = reference.soft_top_k(r, k, temperature=alpha)
    dp = randn(T, E, seed=3)
    got = run_soft_top_k(c, r, k, alpha, dp)
    for tensor, wanted in zip(got, (p, *gradients(p, dp, r, k, alpha)), strict=True):
        check(tensor, wanted)


@pytest.mark.parametrize("k", [1.0, 2.0, 3.0, 4.0])
def test_soft_top_k_of_whole_k(c, k):
    """The branch d = 0. Gaps of a few temperatures: the reference's bisection loses e^(gap / 2) digits in b."""
    r = torch.tensor([[3.0, -2.0, 0.5, 1.5, -4.0]], dtype=torch.float64, requires_grad=True)
    ks, alpha = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (k, 0.5))
    p = reference.soft_top_k(r, ks, temperature=alpha)
    dp = randn(1, 5)
    for tensor, wanted in zip(run_soft_top_k(c, r, ks, alpha, dp), (p, *gradients(p, dp, r, ks, alpha)), strict=True):
        check(tensor, wanted)


def test_soft_top_k_of_whole_k_in_a_wide_gap(c):
    """b is the middle of the gap, so both ends share dk; no finite e^b exists, and sum p = k holds over a range of b."""
    r = torch.tensor([[-1e4, 0.0, 1e4]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    dp = torch.tensor([[4.0, 2.0, 1.0]], dtype=torch.float64)
    p, dr, dk, dalpha = run_soft_top_k(c, r, one, one, dp)
    assert p.tolist() == [[0.0, 0.0, 1.0]]
    assert dk.tolist() == [1.5]
    assert dr.tolist() == [[0.0, 0.0, 0.0]]
    assert dalpha.tolist() == [0.0]


def test_soft_top_k_beside_a_wide_gap(c):
    """b lies beside the low end, then the high end of the gap: p is exactly a third there, whatever the gap."""
    r = torch.tensor([[0.0, 0.0, 0.0, 1e6], [-1e6, 0.0, 0.0, 0.0]], dtype=torch.float64)
    p, _, dk, _ = run_soft_top_k(c, r, torch.full((2,), 2.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64), r * 0 + 1)
    check(p, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1], [0, 2 / 3, 2 / 3, 2 / 3]], dtype=torch.float64), rtol=1e-15, atol=1e-15)
    check(dk, torch.ones_like(dk), rtol=1e-15)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_soft_top_k_of_extreme_scores(c, data):
    E = data.draw(st.integers(1, 12))
    r = torch.tensor([data.draw(st.lists(st.floats(-1e6, 1e6), min_size=E, max_size=E))], dtype=torch.float64)
    whole = st.integers(1, E - 1).map(float) if E > 1 else st.just(0.5)
    k = torch.tensor([data.draw(st.floats(1e-12, E * (1 - 1e-12)) | whole)], dtype=torch.float64)
    alpha = torch.tensor([data.draw(st.sampled_from([1e-3, 1.0, 1e3]))], dtype=torch.float64)
    p, dr, dk, dalpha = run_soft_top_k(c, r, k, alpha, randn(1, E))
    assert all(t.isfinite().all() for t in (p, dr, dk, dalpha))
    assert float(p.min()) >= 0
    assert float(p.max()) <= 1
    assert abs(float(p.sum() - k)) <= 1e-14 * E
    order = torch.argsort(r[0])
    assert (p[0][order].diff() >= 0).all()


def test_soft_top_k_rejects(c):
    r, k, alpha = randn(2, 3), torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    (p,) = like(r)
    c.soft_top_k(2, 0, r, k, alpha, p, status=BAD_SIZE)
    c.soft_top_k(2, 3, r, None, alpha, p, status=NULL)
    c.soft_top_k(2, 3, r, k, alpha, None, status=NULL)
    for bad in (0.0, 3.0, math.nan):
        c.soft_top_k(2, 3, r, k * bad, alpha, p, status=BAD_VALUE)
    for bad in (0.0, -1.0, math.inf, math.nan):
        c.soft_top_k(2, 3, r, k, alpha * bad, p, status=BAD_VALUE)
    c.soft_top_k(2, 3, r * math.nan, k, alpha, p, status=BAD_VALUE)
    c.soft_top_k(2, 3, r, k, alpha * 1e-305, p, status=BAD_VALUE)
    c.soft_top_k_backward(2, 3, r, k, alpha, None, p, k, alpha, status=NULL)


# --- dispatch ------------------------------------------------------------------------------------------------------------


def routed_indices(T: int, K: int, E: int) -> Tensor:
    """[T, K] with empty slots (index E), and expert 1 empty where there are three or more."""
    indices = randint(E + 1, T, K, seed=4)
    return torch.where(indices == 1, 0, indices) if E > 2 else indices


ROUTED = [(0, 3, 4, 2), (1, 1, 1, 1), (63, 5, 7, 3), (29, 4, 53, 13), (8, 3, 1, 1), (6, 2, 4, 0)]  # T, H, E, K


def run_dispatch(c: Library, indices: Tensor, E: int) -> reference.Slots:
    T, K = indices.shape
    token, source = like(indices.flatten(), indices.flatten())
    offsets = torch.full((E + 1,), -7, dtype=torch.int32)
    c.dispatch_tokens(T, K, E, indices, token, source, offsets)
    return reference.Slots(token, source, offsets)


@pytest.mark.parametrize(("T", "H", "E", "K"), ROUTED)
def test_dispatch(c, T, H, E, K):
    indices = routed_indices(T, K, E)
    wanted, slots = reference.dispatch_tokens(indices, E), run_dispatch(c, indices, E)
    assert all(torch.equal(a, b) for a, b in zip(slots, wanted, strict=True))
    S, used = T * K, int(slots.offsets[-1])
    x, ys, weights = (t.requires_grad_() for t in (randn(T, H), randn(S, H, seed=1), randn(T, K, seed=2)))
    dxs, dy = randn(S, H, seed=3), randn(T, H, seed=4)
    scattered, gathered = reference.scatter_tokens(x, wanted), reference.gather_tokens(ys, wanted, weights)
    xs, y, dx, dys, dweights = like(ys, x, x, ys, weights)
    c.scatter_tokens(T, H, S, used, slots.token, x, xs)
    c.scatter_tokens_backward(T, H, S, used, slots.token, dxs, dx)
    c.gather_tokens(T, H, K, used, slots.source, ys, weights, y)
    c.gather_tokens_backward(T, H, K, used, slots.source, ys, weights, dy, dys, dweights)
    check(xs, scattered)
    check(y, gathered)
    for got, wanted_grad in zip(
        (dx, dys, dweights), gradients(scattered, dxs, x) + gradients(gathered, dy, ys, weights), strict=True
    ):
        check(got, wanted_grad)


def test_dispatch_rejects(c):
    indices, slots = torch.tensor([[0, 2], [1, 3]]), torch.zeros(4, dtype=torch.int64)
    offsets, x = torch.zeros(4, dtype=torch.int32), randn(4, 3)
    (xs,) = like(x)
    c.dispatch_tokens(-1, 2, 3, indices, slots, slots, offsets, status=BAD_SIZE)
    c.dispatch_tokens(2**30, 2, 3, indices, slots, slots, offsets, status=BAD_SIZE)
    c.dispatch_tokens(2, 2, 3, None, slots, slots, offsets, status=NULL)
    c.dispatch_tokens(2, 2, 2, indices, slots, slots, offsets, status=BAD_VALUE)
    c.dispatch_tokens(2, 2, 3, indices - 1, slots, slots, offsets, status=BAD_VALUE)
    c.scatter_tokens(4, 3, 4, 5, slots, x, xs, status=BAD_SCALAR)
    c.scatter_tokens(4, 3, 4, 4, slots + 4, x, xs, status=BAD_VALUE)
    c.scatter_tokens_backward(4, 2**62, 4, 4, slots, x, xs, status=BAD_SIZE)
    c.gather_tokens(2, 3, 2, -1, slots, x, x, xs, status=BAD_SCALAR)
    c.gather_tokens(2, 3, 2, 4, slots - 1, x, x, xs, status=BAD_VALUE)
    c.gather_tokens_backward(2, 3, 2, 4, slots, x, x, None, xs, None, status=NULL)


# --- experts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activate(c, name):
    x = torch.cat((torch.linspace(-9, 9, 301, dtype=torch.float64), torch.tensor([-1e3, 1e3, 0.0], dtype=torch.float64)))
    y, slope = like(x, x)
    c.activate(list(ACTIVATIONS).index(name), x.numel(), x, y, slope)
    x.requires_grad_()
    wanted = ACTIVATIONS[name](x)
    check(y, wanted)
    check(slope, gradients(wanted, torch.ones_like(x), x)[0])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("bounds", "S"), [([0, 0], 0), ([0, 1], 1), ([0, 4, 4, 9], 12), ([0, 0, 0, 0], 5)])
def test_grouped_mm(c, bounds, S, transposed):
    E, D, N = len(bounds) - 1, 5, 3
    a, b = randn(S, D).requires_grad_(), randn(E, N, D, seed=1).transpose(1, 2) if transposed else randn(E, D, N, seed=1)
    b.requires_grad_()
    offsets = torch.tensor(bounds, dtype=torch.int32)
    wanted = reference.grouped_mm(a, b, offsets)
    dy = randn(S, N, seed=2)
    y, da, db = like(wanted, a, torch.empty(E, N, D, dtype=torch.float64))
    stored = b.detach().transpose(1, 2).contiguous() if transposed else b.detach()
    db = db if transposed else db.transpose(1, 2).contiguous()
    c.grouped_mm(S, D, N, E, a, stored, *b.stride(), offsets, y)
    c.grouped_mm_backward(S, D, N, E, a, stored, *b.stride(), offsets, dy, da, db)
    check(y, wanted)
    for got, grad in zip((da, db.transpose(1, 2) if transposed else db), gradients(wanted, dy, a, b), strict=True):
        check(got, grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("T", "H", "E", "K"), ROUTED)
def test_expert_ffn(c, T, H, E, K, name):
    s, code = 3, list(ACTIVATIONS).index(name)
    x, gate_up, down = randn(T, H), randn(E, 2 * s, H, seed=1), randn(E, H, s, seed=2)
    weights, dy, indices = randn(T, K, seed=3), randn(T, H, seed=4), routed_indices(T, K, E)
    inputs = [t.requires_grad_() for t in (x, gate_up, down, weights)]
    wanted = reference.expert_ffn(x, gate_up, down, indices, weights, activation=ACTIVATIONS[name])
    y, *grads = like(x, *inputs)
    c.expert_ffn(T, H, E, s, K, x, gate_up, down, indices, weights, code, y)
    c.expert_ffn_backward(T, H, E, s, K, x, gate_up, down, indices, weights, code, dy, *grads)
    check(y, wanted)
    for got, grad in zip(grads, gradients(wanted, dy, *inputs), strict=True):
        check(got, grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("T", "H", "E", "K"), ROUTED)
def test_masked_ffn(c, T, H, E, K, weighted, name):
    F, code = 2 * E + 1, list(ACTIVATIONS).index(name)
    x, gate, up, down = randn(T, H), randn(F, H, seed=1), randn(F, H, seed=2), randn(H, F, seed=3)
    plan, probs, weights = randn(F, E, seed=4), randn(T, E, seed=5), randn(T, K, seed=6) if weighted else None
    expert_of, indices, dy = randint(E, F), routed_indices(T, K, E), randn(T, H, seed=7)
    inputs = [t.requires_grad_() for t in (x, gate, up, down, plan, probs)] + ([weights.requires_grad_()] if weighted else [])
    wanted = reference.masked_ffn(
        x, gate, up, down, expert_of, indices, plan=plan, probs=probs, weights=weights, activation=ACTIVATIONS[name]
    )
    y, *grads = like(x, *inputs)
    c.masked_ffn(T, H, F, E, K, x, gate, up, down, expert_of, indices, weights, code, y)
    arguments = (T, H, F, E, K, x, gate, up, down, expert_of, indices, weights, code, dy)
    c.masked_ffn_backward(*arguments, *grads[:6], grads[6] if weighted else None)
    check(y, wanted)
    for got, grad in zip(grads, gradients(wanted, dy, *inputs), strict=True):
        check(got, grad)


def test_all_experts_make_the_dense_ffn(c):
    T, H, E, s = 6, 5, 4, 3
    x, gate, up, down = randn(T, H), randn(E * s, H, seed=1), randn(E * s, H, seed=2), randn(H, E * s, seed=3)
    expert_of, indices = torch.arange(E * s) % E, torch.arange(E).repeat(T, 1)
    gate_up, blocks = reference.expert_blocks(gate, up, down, reference.neuron_order(expert_of), E)
    y, masked = like(x, x)
    weights = torch.ones(T, E, dtype=torch.float64)
    c.expert_ffn(T, H, E, s, E, x, gate_up.contiguous(), blocks.contiguous(), indices, weights, 0, y)
    c.masked_ffn(T, H, E * s, E, E, x, gate, up, down, expert_of, indices, None, 0, masked)
    wanted = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    check(y, wanted)
    check(masked, wanted)


def test_experts_reject(c):
    x, w, indices, expert_of = randn(2, 4), randn(4, 4), torch.zeros(2, 1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    y, weights, offsets = torch.zeros(2, 4, dtype=torch.float64), randn(2, 1), torch.tensor([0, 1, 2], dtype=torch.int32)
    c.activate(3, 4, x, y, None, status=BAD_SCALAR)
    c.activate(0, -1, x, y, None, status=BAD_SIZE)
    grouped = (2, 2, 2, 2, x, w, 4, 2, 1)
    c.grouped_mm(*grouped, None, y, status=NULL)
    c.grouped_mm(2, 2, 2, 2, x, w, -4, 2, 1, offsets, y, status=BAD_SIZE)
    for bad in ([1, 1, 2], [0, 2, 1], [0, 1, 3]):
        c.grouped_mm(*grouped, torch.tensor(bad, dtype=torch.int32), y, status=BAD_VALUE)
        c.grouped_mm_backward(*grouped, torch.tensor(bad, dtype=torch.int32), y, y, None, status=BAD_VALUE)
    c.expert_ffn(2, 4, 2, 1, 1, x, w, w, indices, weights, 9, y, status=BAD_SCALAR)
    c.expert_ffn(2, 4, 2, 1, 1, x, w, w, indices + 3, weights, 0, y, status=BAD_VALUE)
    c.expert_ffn(2, 4, 2, 1, 1, x, w, w, None, weights, 0, y, status=NULL)
    c.expert_ffn(2, 4, 2, 2**62, 1, x, w, w, indices, weights, 0, y, status=BAD_SIZE)
    c.expert_ffn_backward(2, 4, 2, 1, 1, x, w, w, indices, weights, 0, None, y, None, None, None, status=NULL)
    c.masked_ffn(2, 4, 4, 2, 1, x, w, w, w, expert_of + 2, indices, None, 0, y, status=BAD_VALUE)
    c.masked_ffn(2, 4, 4, 2, 1, x, w, w, w, expert_of, indices + 3, None, 0, y, status=BAD_VALUE)
    c.masked_ffn(2, 4, 4, 2, 1, x, w, w, w, expert_of, indices, None, 0, None, status=NULL)
    gradient = (None,) * 7
    c.masked_ffn_backward(2, 4, 4, 2, 1, x, w, w, w, expert_of, indices, None, -1, y, *gradient, status=BAD_SCALAR)
    c.masked_ffn_backward(2, 4, 4, 0, 1, x, w, w, w, expert_of, indices, None, 0, y, *gradient, status=BAD_SIZE)


# --- the library's own driver ----------------------------------------------------------------------------------------------


def test_make_check(compiler, tmp_path):
    """check.c under the sanitizers; without them where the compiler has no sanitizer runtime."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    sanitize = ["-fsanitize=address,undefined", "-o", str(tmp_path / "probe"), str(probe)]
    plain = subprocess.run([compiler, *sanitize], capture_output=True).returncode != 0
    command = ["make", "-C", str(SOURCE), f"BUILD={tmp_path}", f"CC={compiler}", *(["SANITIZE="] if plain else []), "check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* passed, 0 failed$", done.stdout, flags=re.M)
