"""soft_top_k (LapSum) and route_soft_top_k (SoftMoE). Against root finding by scipy, finite differences and the reference."""

import math

import numpy as np
import pytest
import torch
from checks import (
    DEVICES,
    SECOND,
    assert_finite,
    assert_no_wrong_second_derivative,
    assert_same,
    compare,
    error,
    value_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq
from shapes import normal, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import reference


def laplace(x):
    return np.where(x <= 0, 0.5 * np.exp(np.minimum(x, 0)), 1 - 0.5 * np.exp(-np.maximum(x, 0)))


def by_root_finding(scores, k, temperature):
    """p of one row [E], float64."""
    z = np.asarray(scores, dtype=np.float64) / temperature
    b = brentq(lambda b: laplace(z - b).sum() - k, z.min() - 60, z.max() + 60, xtol=1e-14, rtol=1e-15, maxiter=500)
    return torch.from_numpy(laplace(z - b))


def batch(T, E, *, seed):
    return {
        "scores": normal(T, E, seed=seed + 1),
        "k": 0.2 + (E - 0.4) * uniform(T, seed=seed),
        "temperature": 0.3 + uniform(T, seed=seed + 2),
    }


def soft(scores, k, temperature):
    return dk.soft_top_k(scores, k, temperature=temperature)


def plain(scores, k, temperature):
    return reference.soft_top_k(scores, k, temperature=temperature)


# --- oracles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("E", [1, 2, 3, 7, 37, 148])
def test_root_finding_agrees(E):
    tensors = batch(20, E, seed=E)
    p = soft(**tensors)
    for t in range(20):
        expected = by_root_finding(tensors["scores"][t], tensors["k"][t].item(), tensors["temperature"][t].item())
        torch.testing.assert_close(p[t], expected, rtol=1e-9, atol=1e-11)
    single = soft(**{n: t.float() for n, t in tensors.items()})
    torch.testing.assert_close(single.double(), p, rtol=0, atol=5e-6)


@pytest.mark.parametrize("k", [1, 2.0, 3, 0.5, 3.999])
@pytest.mark.parametrize("temperature", [1, 0.1, 5.0])
def test_numbers_for_k_and_temperature(k, temperature):
    scores = normal(5, 4, seed=1)
    expected = torch.stack([by_root_finding(row, k, temperature) for row in scores])
    torch.testing.assert_close(dk.soft_top_k(scores, k, temperature=temperature), expected, rtol=1e-8, atol=1e-10)


def test_temperature_defaults_to_one():
    scores = normal(5, 4, seed=2)
    assert torch.equal(dk.soft_top_k(scores, 2), dk.soft_top_k(scores, 2, temperature=1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("T", "E"), [(63, 7), (10, 148), (4, 2), (3, 1), (50, 37)])
def test_value_and_gradients_equal_the_reference(T, E, dtype, device):
    tensors = {n: t.to(dtype) for n, t in batch(T, E, seed=3).items()}
    floor = 1e-9 if dtype == torch.float64 else 5e-6
    compare(soft, plain, device=device, floor=floor, **tensors)


@pytest.mark.parametrize("case", ["batch", "numbers", "integer k", "extreme k"])
def test_gradcheck(case):
    tensors = batch(5, 6, seed=4)
    if case == "numbers":
        tensors["k"], tensors["temperature"] = (torch.tensor(v, dtype=torch.float64) for v in (2.5, 0.7))
    elif case == "integer k":
        tensors["k"] = torch.arange(1, 6, dtype=torch.float64)
    elif case == "extreme k":
        tensors["k"] = torch.tensor([1e-3, 6 - 1e-3, 1e-2, 5.99, 3.0], dtype=torch.float64)
    torch.autograd.gradcheck(soft, [t.requires_grad_() for t in tensors.values()])


def test_gradcheck_with_ties():
    scores = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([1.7, 1.3], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s, k: dk.soft_top_k(s, k), (scores, k))


@SECOND
def test_no_wrong_second_derivative(how):
    functions = (lambda scores, f=f: f(scores, torch.tensor(2.0), torch.tensor(1.0)) for f in (soft, plain))
    assert_no_wrong_second_derivative(*functions, normal(3, 5, seed=5), how)


# --- invariants --------------------------------------------------------------------------------------------------------


@given(E=st.integers(1, 60), share=st.floats(0.01, 0.99), log_t=st.floats(-3, 2), scale=st.floats(0, 50), seed=st.integers(0, 999))
def test_invariants(E, share, log_t, scale, seed):
    scores, k, temperature = normal(3, E, seed=seed, scale=scale), share * E, math.exp(log_t)
    p = dk.soft_top_k(scores, k, temperature=temperature)
    assert ((p >= 0) & (p <= 1)).all()
    assert (p.sum(-1) - k).abs().max() <= 1e-11 * E
    single = dk.soft_top_k(scores.float(), k, temperature=temperature)
    assert ((single >= 0) & (single <= 1)).all()
    assert (single.double().sum(-1) - k).abs().max() <= 1e-6 * E
    order = scores.argsort(-1)
    assert (p.gather(-1, order).diff(dim=-1) >= -1e-15).all(), "p rises with the score"
    torch.testing.assert_close(dk.soft_top_k(scores + 3.0, k, temperature=temperature), p, rtol=0, atol=1e-8)
    torch.testing.assert_close(dk.soft_top_k(scores.flip(-1), k, temperature=temperature), p.flip(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("E", [7, 37, 148, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_k(dtype, E, device):
    scores = normal(50, E, seed=10, scale=3.0, dtype=dtype).to(device)
    for k in (1, E / 4, E - 1, 0.01, E - 0.01):
        if 0 < k < E:
            p = dk.soft_top_k(scores, k)
            assert (p.double().sum(-1) - k).abs().max() <= 1e-6 * E


def test_gradients_keep_the_sum():
    """sum p = k whatever the scores and the temperature are, so only k moves it."""
    results = {n: t.requires_grad_() for n, t in batch(20, 9, seed=11).items()}
    ds, dk_, dt = torch.autograd.grad(soft(**results).sum(), list(results.values()))
    assert ds.abs().max() < 1e-12
    assert (dk_ - 1).abs().max() < 1e-12
    assert dt.abs().max() < 1e-12


def test_low_temperature_is_top_k_and_high_temperature_is_uniform():
    scores = normal(20, 9, seed=12)
    hard = torch.zeros_like(scores).scatter_(1, scores.topk(3).indices, 1.0)
    torch.testing.assert_close(dk.soft_top_k(scores, 3, temperature=1e-5), hard, rtol=0, atol=1e-2)
    torch.testing.assert_close(dk.soft_top_k(scores, 3, temperature=1e6), torch.full_like(scores, 1 / 3), rtol=0, atol=1e-5)


# --- extremes (design: integer k with wide gaps, k at both ends, equal scores) -----------------------------------------

EXTREMES = {
    "integer k, wide gap": ([-1e4, 0.0, 1e4], 1, [0.0, 0.0, 1.0]),
    "integer k, two wide gaps": ([-1e4, 0.0, 1e4], 2, [0.0, 1.0, 1.0]),
    "half an expert": ([-1e4, 0.0, 1e4], 1.5, [0.0, 0.5, 1.0]),
    "a quarter": ([-1e4, 0.0, 1e4], 1.25, [0.0, 0.25, 1.0]),
    "three quarters": ([-1e4, 0.0, 1e4], 1.75, [0.0, 0.75, 1.0]),
    "a pair far above": ([1e4, 1e4, 0.0, -1e4], 1, [0.5, 0.5, 0.0, 0.0]),
    "equal scores": ([3.0, 3.0, 3.0, 3.0], 1, [0.25] * 4),
    "equal large scores": ([1e4, 1e4, 1e4, 1e4], 3.5, [0.875] * 4),
    "k near 0": ([0.0, 1.0, 2.0], 1e-6, None),
    "k near E": ([0.0, 1.0, 2.0], 3 - 1e-3, None),
    "k near 0, wide gap": ([-1e4, 0.0, 1e4], 1e-6, [0.0, 0.0, 1e-6]),
    "k near E, wide gap": ([-1e4, 0.0, 1e4], 3 - 1e-3, [0.999, 1.0, 1.0]),
    "two clusters": ([0.0] * 6 + [1e4] * 2, 2, [0.0] * 6 + [1.0] * 2),
    "two clusters, more": ([0.0] * 6 + [1e4] * 2, 5, [0.5] * 6 + [1.0] * 2),
    "one expert": ([7.0], 0.3, [0.3]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(("scores", "k", "expected"), EXTREMES.values(), ids=EXTREMES.keys())
def test_extremes(scores, k, expected, dtype, device):
    scores = torch.tensor([scores], dtype=dtype, device=device, requires_grad=True)
    k_, temperature = (torch.tensor([v], dtype=dtype, device=device, requires_grad=True) for v in (k, 1.0))
    p = dk.soft_top_k(scores, k_, temperature=temperature)
    expected = torch.tensor([expected], dtype=torch.float64) if expected else by_root_finding(scores[0].tolist(), k, 1.0)[None]
    E = scores.shape[1]
    torch.testing.assert_close(p.detach().double().cpu(), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 1e-6 * E)
    assert abs(p.double().sum().item() - k) <= 1e-6 * E
    for e in range(E):
        gradients = torch.autograd.grad(p[0, e], (scores, k_, temperature), retain_graph=True)
        assert all(torch.isfinite(g).all() for g in gradients)
        assert abs(gradients[0].sum().item()) < 1e-6, "a common shift of the scores changes nothing"
    assert torch.autograd.grad(p.sum(), k_)[0].item() == pytest.approx(1.0, abs=1e-5)


def test_relative_accuracy_where_p_is_tiny():
    p = dk.soft_top_k(torch.tensor([0.0, 20.0, 40.0]), 1e-3)
    expected = by_root_finding([0.0, 20.0, 40.0], 1e-3, 1.0)
    torch.testing.assert_close(p.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_wide_scores_stay_finite(dtype):
    scores = normal(50, 37, seed=20, scale=1e4, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    for temperature in (1e-3, 1.0, 1e3):
        for k in (1, 9, 9.25, 36):
            results = value_and_gradients(
                lambda scores, k=k, temperature=temperature: dk.soft_top_k(scores, k, temperature=temperature), {"scores": scores}
            )
            assert_finite(results)


# --- layouts, repeatability --------------------------------------------------------------------------------------------


def test_leading_dimensions():
    scores = normal(2, 3, 9, seed=30)
    k = 1 + uniform(2, 3, seed=31)
    whole = dk.soft_top_k(scores, k, temperature=k)
    assert whole.shape == (2, 3, 9)
    assert error(whole[1, 2], dk.soft_top_k(scores[1, 2], k[1, 2], temperature=k[1, 2])) < 1e-12
    assert error(dk.soft_top_k(scores, 2)[1, 2], dk.soft_top_k(scores[1, 2], 2.0)) < 1e-12
    assert dk.soft_top_k(scores[0, 0], 2).shape == (9,)


def test_scalar_tensors():
    scores = normal(4, 9, seed=32)
    compare(soft, plain, floor=1e-9, scores=scores, k=torch.tensor(2.5).double(), temperature=torch.tensor(0.4).double())


def test_any_strides():
    scores = normal(20, 6, seed=33)
    for z in (scores.T.contiguous().T, torch.zeros(40, 13, dtype=torch.float64)[::2, 1::2].copy_(scores)):
        found, expected = (value_and_gradients(lambda scores: dk.soft_top_k(scores, 2), {"scores": s}) for s in (z, scores))
        assert all(error(found[name], expected[name]) < 1e-13 for name in expected)
    expanded = scores[:, :1].expand(20, 6)
    torch.testing.assert_close(dk.soft_top_k(expanded, 2), torch.full_like(scores, 1 / 3), rtol=0, atol=1e-12)


def test_no_rows():
    scores = torch.zeros(0, 6, requires_grad=True)
    p = dk.soft_top_k(scores, 2)
    assert p.shape == (0, 6)
    p.sum().backward()
    assert scores.grad.shape == (0, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(device):
    tensors = {n: t.float().to(device) for n, t in batch(63, 37, seed=34).items()}
    first = value_and_gradients(soft, tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(soft, tensors))


def test_autocast_changes_nothing():
    scores = normal(20, 6, seed=35, dtype=torch.float32)
    expected = dk.soft_top_k(scores, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dk.soft_top_k(scores, 2), expected)


# --- SoftMoE routing ---------------------------------------------------------------------------------------------------


def truncated(scores, k, *, temperature, threshold, max_active):
    """Row by row: the experts above the threshold, the best first; the best one always."""
    rows = []
    for row in scores:
        p = by_root_finding(row, k, temperature)
        best = sorted(range(len(p)), key=lambda e: (-row[e].item(), e))[:max_active]
        rows.append([(e, p[e].item()) for i, e in enumerate(best) if i == 0 or p[e] > threshold])
    return rows


@pytest.mark.parametrize("max_active", [1, 3, 5, 9])
@pytest.mark.parametrize("threshold", [0.05, 0.4, 0.999])
def test_keeps_the_largest_above_the_threshold(threshold, max_active):
    scores, options = normal(40, 9, seed=40), {"temperature": 0.5, "threshold": threshold, "max_active": max_active}
    routing = dk.route_soft_top_k(scores, 2.5, **options)
    assert routing.indices.shape == routing.weights.shape == (40, max_active)
    assert routing.indices.dtype == torch.int64
    expected = truncated(scores, 2.5, **options)
    for t, row in enumerate(expected):
        n = len(row)
        assert routing.indices[t].tolist() == [e for e, _ in row] + [9] * (max_active - n)
        assert routing.weights[t, :n].tolist() == pytest.approx([w for _, w in row], abs=1e-9)
        assert (routing.weights[t, n:] == 0).all()
    if threshold == 0.4 and max_active > 1:
        assert len({len(row) for row in expected}) > 1, "the number of experts should vary by token"
    assert error(routing.probs, dk.soft_top_k(scores, 2.5, temperature=0.5)) < 1e-12


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_soft_routing_equals_the_reference(dtype, masked):
    tensors = {n: t.to(dtype) for n, t in batch(40, 9, seed=41).items()}
    mask = uniform(40, seed=42) < 0.7 if masked else None
    options = {"threshold": 0.2, "max_active": 4, "mask": mask}

    def run(route):
        def function(scores, k, temperature):
            routing = route(scores, k, temperature=temperature, **options)
            return routing.weights, routing.balance_loss, routing.z_loss

        return function

    compare(run(dk.route_soft_top_k), run(reference.route_soft_top_k), floor=1e-9 if dtype == torch.float64 else 1e-5, **tensors)
    found, expected = (r.route_soft_top_k(**tensors, **options) for r in (dk, reference))
    assert torch.equal(found.indices, expected.indices)
    assert error(found.load, expected.load) < 1e-6


def test_the_truncation_is_constant_in_the_backward():
    tensors = {n: t.requires_grad_() for n, t in batch(30, 9, seed=43).items()}
    routing = dk.route_soft_top_k(**tensors, threshold=0.3, max_active=4)
    cotangent = normal(30, 4, seed=44)
    found = torch.autograd.grad((routing.weights * cotangent).sum(), list(tensors.values()))
    used = routing.indices < 9
    chosen = soft(**tensors).gather(1, torch.where(used, routing.indices, 0))
    expected = torch.autograd.grad((chosen * used * cotangent).sum(), list(tensors.values()))
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < 1e-11


def test_soft_routing_of_padding():
    scores, mask = normal(20, 6, seed=45), uniform(20, seed=46) < 0.6
    options = {"temperature": 0.5, "threshold": 0.1, "max_active": 3}
    all_, only = dk.route_soft_top_k(scores, 2, mask=mask, **options), dk.route_soft_top_k(scores[mask], 2, **options)
    assert (all_.indices[~mask] == 6).all()
    assert (all_.weights[~mask] == 0).all()
    assert torch.equal(all_.indices[mask], only.indices)
    for name in ("load", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(all_, name), getattr(only, name), rtol=1e-10, atol=1e-12)


def test_soft_routing_of_no_tokens():
    routing = dk.route_soft_top_k(torch.zeros(0, 6), 2, temperature=0.5, threshold=0.1, max_active=3)
    assert routing.indices.shape == routing.weights.shape == (0, 3)
    assert routing.load.tolist() == [0.0] * 6
    assert (routing.balance_loss.item(), routing.z_loss.item()) == (0, 0)


def test_soft_routing_ties_go_to_the_lower_index():
    routing = dk.route_soft_top_k(torch.zeros(2, 5), 2, temperature=1.0, threshold=0.1, max_active=3)
    assert routing.indices.tolist() == [[0, 1, 2]] * 2


# --- bad inputs --------------------------------------------------------------------------------------------------------

BAD = {
    "zero k": ("k", {"k": 0}),
    "negative k": ("k", {"k": -0.5}),
    "k of every expert": ("k", {"k": 4}),
    "k above every expert": ("k", {"k": 4.5}),
    "NaN k": ("k", {"k": math.nan}),
    "one bad k in a tensor": ("k", {"k": torch.tensor([1.0, 2.0, 4.0])}),
    "k of the wrong shape": ("k", {"k": torch.ones(2)}),
    "zero temperature": ("temperature", {"temperature": 0.0}),
    "negative temperature": ("temperature", {"temperature": -1.0}),
    "NaN temperature": ("temperature", {"temperature": math.nan}),
    "one bad temperature in a tensor": ("temperature", {"temperature": torch.tensor([1.0, 0.0, 1.0])}),
    "NaN scores": ("scores", {"scores": torch.full((3, 4), math.nan)}),
    "integer scores": ("scores", {"scores": torch.zeros(3, 4, dtype=torch.int64)}),
    "scores of rank 0": ("scores", {"scores": torch.tensor(1.0)}),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(name, arguments):
    arguments = {"scores": torch.zeros(3, 4), "k": 2, "temperature": 1.0, **arguments}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dk.soft_top_k(arguments["scores"], arguments["k"], temperature=arguments["temperature"])


BAD_ROUTING = {
    "zero k": ("k", {"k": 0}),
    "k of every expert": ("k", {"k": 4}),
    "zero temperature": ("temperature", {"temperature": 0.0}),
    "NaN scores": ("scores", {"scores": torch.full((3, 4), math.nan)}),
    "scores of rank 1": ("scores", {"scores": torch.zeros(4)}),
    "no active experts": ("max_active", {"max_active": 0}),
    "more active experts than experts": ("max_active", {"max_active": 5}),
    "NaN threshold": ("threshold", {"threshold": math.nan}),
    "mask of the wrong length": ("mask", {"mask": torch.ones(5, dtype=torch.bool)}),
}


@pytest.mark.parametrize(("name", "arguments"), BAD_ROUTING.values(), ids=BAD_ROUTING.keys())
def test_bad_routing_input(name, arguments):
    arguments = {
        "scores": torch.zeros(3, 4), "k": 2, "temperature": 1.0, "threshold": 0.1, "max_active": 2, **arguments
    }  # fmt: skip
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dk.route_soft_top_k(arguments.pop("scores"), arguments.pop("k"), **arguments)
