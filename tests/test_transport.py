"""sinkhorn: affinity -> plan. Against the reference, POT, finite differences, and the invariants of the problem."""

import math

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
from shapes import AWKWARD, capacities, clustered, normal, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, reference

FINAL = ["row", "column"]
BACKWARD = ["unroll", "implicit"]
VANISHING = {"init": 0.5}  # every step shrinks this gradient, but not the terms of order 1 and more that it is the sum of


def upcast(t):
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def problem(F, E, *batch, seed=0, dtype=torch.float64, scale=1.0):
    """Everything that sinkhorn is differentiable in."""
    return {
        "affinity": normal(*batch, F, E, seed=seed, scale=scale, dtype=dtype),
        "tau": 0.5 + uniform(*batch, seed=seed + 1, dtype=dtype),
        "capacity": capacities(F, E, *batch, seed=seed + 2, dtype=dtype),
        "init": normal(*batch, E, seed=seed + 3, scale=0.3, dtype=dtype),
    }


def ours(**options):
    return lambda affinity, tau=1.0, capacity=None, init=None: dk.sinkhorn(affinity, capacity, tau=tau, init=init, **options)


def plain(**options):
    def function(affinity, tau=1.0, capacity=None, init=None):
        return reference.sinkhorn(upcast(affinity), capacity, tau=tau, init=init, **options)[0]

    return function


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize(("F", "E"), AWKWARD)
def test_unroll_equals_autograd_through_the_reference(F, E, final, dtype, device):
    options = {"num_iters": 6, "final": final}
    compare(ours(**options), plain(**options), device=device, scales=VANISHING, **problem(F, E, dtype=dtype))


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("num_iters", [1, 2, 50])
def test_any_number_of_steps(num_iters, final):
    options = {"num_iters": num_iters, "final": final}
    compare(ours(**options), plain(**options), scales=VANISHING, **problem(63, 7, seed=10))


@pytest.mark.parametrize("final", FINAL)
def test_defaults(final):
    affinity = normal(24, 4, seed=20)
    assert error(dk.sinkhorn(affinity), reference.sinkhorn(affinity)[0]) < 1e-12  # tau 1, 50 steps, final row
    equal = torch.full((4,), 6.0, dtype=torch.float64)
    assert torch.equal(
        dk.sinkhorn(affinity, final=final), dk.sinkhorn(affinity, equal, tau=1.0, num_iters=50, tol=0.0, final=final)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_affinity_gives_a_float32_plan(dtype, device):
    affinity = normal(63, 7, seed=30, dtype=dtype)
    assert dk.sinkhorn(affinity.to(device)).dtype == torch.float32
    compare(ours(num_iters=8), plain(num_iters=8), device=device, affinity=affinity)
    assert error(dk.sinkhorn(affinity, num_iters=8), reference.sinkhorn(affinity.double(), num_iters=8)[0]) < 2e-6


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_plan_dtype(dtype, expected):
    assert dk.sinkhorn(normal(6, 3, seed=31, dtype=dtype)).dtype == expected


@pytest.mark.parametrize("backward", BACKWARD)
def test_gradcheck(backward):
    tensors = problem(9, 4, seed=40)

    def function(affinity, tau, raw, init):
        capacity = 9 * torch.softmax(raw, -1)  # finite differences must keep the sum
        return dk.sinkhorn(affinity, capacity, tau=tau, init=init, num_iters=4 if backward == "unroll" else 200, backward=backward)

    inputs = [tensors["affinity"], tensors["tau"] + 0.5, tensors["capacity"].log(), tensors["init"]]
    inputs = [t.requires_grad_() for t in inputs]
    if backward == "implicit":
        inputs[3].requires_grad_(False)  # the fixed point does not depend on where it was started
    torch.autograd.gradcheck(function, inputs, atol=1e-5, rtol=1e-4)


# --- info, stopping, warm start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("final", FINAL)
def test_info(final, device):
    tensors = {n: t.to(device) for n, t in problem(24, 5, 3, seed=50).items()}
    capacity, tau = tensors["capacity"], tensors["tau"]
    tensors["affinity"].requires_grad_()
    plan, info = dk.sinkhorn(
        tensors["affinity"], capacity, tau=tau, init=tensors["init"], num_iters=4, final=final, return_info=True
    )
    assert (info.log_u.shape, info.log_v.shape, info.num_iters.shape, info.error.shape) == ((3, 24), (3, 5), (3,), (3,))
    assert info.num_iters.dtype == torch.int64
    assert info.num_iters.tolist() == [4, 4, 4]
    assert not any(t.requires_grad for t in info)
    rebuilt = torch.exp(tensors["affinity"] / tau[:, None, None] + info.log_u[..., None] + info.log_v[:, None, :])
    torch.testing.assert_close(rebuilt, plan, rtol=1e-10, atol=1e-12)
    expected = (plan.sum(-2) / capacity - 1).abs().amax(-1) if final == "row" else (plan.sum(-1) - 1).abs().amax(-1)
    torch.testing.assert_close(info.error, expected.detach(), rtol=1e-8, atol=1e-12)
    exact = reference.sinkhorn(tensors["affinity"], capacity, tau=tau, init=tensors["init"], num_iters=4, final=final)[1]
    torch.testing.assert_close(info.log_v, exact.log_v, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(info.log_u, exact.log_u, rtol=1e-10, atol=1e-10)


def test_without_info_only_the_plan_is_returned():
    assert isinstance(dk.sinkhorn(normal(6, 3, seed=51)), torch.Tensor)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("final", FINAL)
def test_each_layer_stops_by_itself(final, device):
    affinity = torch.stack([normal(40, 8, seed=60, scale=s) for s in (0.01, 1.0, 4.0)])
    options = {"num_iters": 60, "tol": 1e-5, "final": final}
    plan, info = dk.sinkhorn(affinity.to(device), return_info=True, **options)
    expected_plan, expected = reference.sinkhorn(affinity, **options)
    assert info.num_iters.tolist() == expected.num_iters.tolist()
    assert len(set(info.num_iters.tolist())) == 3, "the layers should need different numbers of steps"
    assert info.num_iters[-1] < 60
    assert error(plan, expected_plan) < 1e-11
    if final == "row":
        assert (info.error <= 1e-5).all()
    for layer, steps in enumerate(info.num_iters.tolist()):  # the step that met the tolerance was still applied
        assert error(plan[layer], dk.sinkhorn(affinity[layer], num_iters=steps, final=final)) < 1e-11
    compare(ours(**options), plain(**options), device=device, affinity=affinity)


def test_tolerance_is_relative_to_the_capacity():
    affinity = normal(1000, 4, seed=62)
    capacity = torch.tensor([1.0, 9.0, 90.0, 900.0], dtype=torch.float64)
    options = {"num_iters": 100, "tol": 1e-4, "return_info": True}
    info = dk.sinkhorn(affinity, capacity, **options)[1]
    expected = reference.sinkhorn(affinity, capacity, num_iters=100, tol=1e-4)[1]
    assert info.num_iters.item() == expected.num_iters.item()


def test_a_loose_tolerance_takes_one_step():
    info = dk.sinkhorn(normal(12, 3, seed=61), tol=1e6, return_info=True)[1]
    assert info.num_iters.item() == 1


def test_zero_tolerance_takes_every_step():
    affinity = torch.zeros(12, 3)  # exact after the first step
    info = dk.sinkhorn(affinity, num_iters=17, return_info=True)[1]
    assert info.num_iters.item() == 17


def test_warm_start_continues():
    affinity, tau = normal(2, 40, 8, seed=70), torch.tensor([0.3, 0.7], dtype=torch.float64)
    info = dk.sinkhorn(affinity, tau=tau, num_iters=5, return_info=True)[1]
    continued = dk.sinkhorn(affinity, tau=tau, num_iters=4, init=info.log_v)
    assert error(continued, dk.sinkhorn(affinity, tau=tau, num_iters=9)) < 1e-12
    converged = dk.sinkhorn(affinity, tau=tau, num_iters=500, return_info=True)[1]
    assert (dk.sinkhorn(affinity, tau=tau, tol=1e-6, init=converged.log_v, return_info=True)[1].num_iters == 1).all()


# --- the implicit gradient ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize(("F", "E"), [(63, 7), (296, 148), (5, 5), (16, 1)])
def test_implicit_gradient_equals_autograd_at_convergence(F, E, final, device):
    tensors = problem(F, E, seed=80)
    del tensors["init"]
    tensors = {n: t.to(device) for n, t in tensors.items()}
    found = value_and_gradients(ours(num_iters=300, final=final, backward="implicit"), tensors)
    expected = value_and_gradients(plain(num_iters=300, final=final), tensors)
    for results in (found, expected):  # the capacities sum to F: their gradient has a meaning up to a constant
        results["gradient of capacity"] -= results["gradient of capacity"].mean()
    for name in ("output 0", "gradient of affinity", "gradient of capacity", "gradient of tau"):
        scale = max(expected[name].abs().max().item(), 1e-3)
        assert (found[name] - expected[name]).abs().max().item() <= 1e-5 * scale, name


def test_implicit_gradient_in_float32():
    affinity = normal(63, 7, seed=81, dtype=torch.float32)
    found = value_and_gradients(ours(num_iters=100, backward="implicit"), {"affinity": affinity})["gradient of affinity"]
    exact = value_and_gradients(plain(num_iters=300), {"affinity": affinity.double()})["gradient of affinity"]
    assert error(found, exact) < 1e-4


def test_implicit_gradient_of_a_batch():
    affinity, tau = normal(3, 24, 4, seed=82), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    options = {"num_iters": 300, "backward": "implicit"}
    compare(ours(**options), plain(num_iters=300), floor=1e-6, affinity=affinity, tau=tau)


def test_implicit_gradient_of_a_hard_plan_vanishes():
    affinity = clustered(48, 6, seed=83, strength=40.0, dtype=torch.float32)
    results = value_and_gradients(lambda affinity: dk.sinkhorn(affinity, tau=0.05, backward="implicit"), {"affinity": affinity})
    assert torch.equal(results["output 0"], results["output 0"].round()), "the plan should be hard"
    assert results["gradient of affinity"].abs().max() < 1e-6


def test_implicit_gradient_of_a_clustered_plan():
    affinity = clustered(120, 6, seed=84)
    tensors = {"affinity": affinity}
    found = value_and_gradients(lambda affinity: dk.sinkhorn(affinity, tau=0.1, num_iters=3000, backward="implicit"), tensors)
    expected = value_and_gradients(lambda affinity: reference.sinkhorn(affinity, tau=0.1, num_iters=3000)[0], tensors)
    assert error(found["gradient of affinity"], expected["gradient of affinity"]) < 1e-4


@SECOND
@pytest.mark.parametrize("backward", BACKWARD)
def test_no_wrong_second_derivative(backward, how):
    assert_no_wrong_second_derivative(ours(backward=backward), plain(), normal(9, 3, seed=85), how)


# --- invariants --------------------------------------------------------------------------------------------------------


@given(F=st.integers(1, 40), E=st.integers(1, 12), tau=st.floats(0.05, 4), seed=st.integers(0, 999), final=st.sampled_from(FINAL))
def test_marginals(F, E, tau, seed, final):
    affinity, capacity = normal(F, E, seed=seed), capacities(F, E, seed=seed)
    plan = dk.sinkhorn(affinity, capacity, tau=tau, num_iters=3, final=final)
    assert plan.shape == (F, E)
    assert (plan >= 0).all()
    exact = plan.sum(-1) if final == "row" else plan.sum(-2) / capacity
    torch.testing.assert_close(exact, torch.ones_like(exact), rtol=0, atol=1e-12)
    both = dk.sinkhorn(affinity, capacity, tau=max(tau, 0.5), num_iters=500, final=final)
    torch.testing.assert_close(both.sum(-1), torch.ones(F, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(both.sum(-2), capacity, rtol=1e-6, atol=0)


@given(F=st.integers(1, 30), E=st.integers(1, 8), seed=st.integers(0, 999))
def test_constants_and_permutations(F, E, seed):
    affinity, capacity = normal(F, E, seed=seed), capacities(F, E, seed=seed)
    plan = dk.sinkhorn(affinity, capacity, num_iters=5)
    assert error(dk.sinkhorn(affinity + normal(F, 1, seed=seed + 1, scale=5), capacity, num_iters=5), plan) < 1e-11
    converged = dk.sinkhorn(affinity, capacity, num_iters=200)
    assert error(dk.sinkhorn(affinity + normal(E, seed=seed + 2), capacity, num_iters=200), converged) < 1e-6
    rows, columns = normal(F, seed=seed + 3).argsort(), normal(E, seed=seed + 4).argsort()
    assert error(dk.sinkhorn(affinity[rows][:, columns], capacity[columns], num_iters=5), plan[rows][:, columns]) < 1e-11


def test_float32_marginals_of_a_full_size_layer():
    plan = dk.sinkhorn(normal(1000, 37, seed=90, dtype=torch.float32), tau=0.3, num_iters=40)
    assert (plan.double().sum(-1) - 1).abs().max() < 1e-5
    assert (plan.double().sum(-2) / (1000 / 37) - 1).abs().max() < 1e-4


@pytest.mark.parametrize(("F", "E", "tau"), [(30, 6, 1.0), (63, 7, 0.3), (20, 20, 0.5)])
def test_pot_agrees(F, E, tau):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    affinity, capacity = normal(F, E, seed=91), capacities(F, E, seed=92)
    expected = ot.bregman.sinkhorn_log(
        torch.ones(F, dtype=torch.float64), capacity, -affinity, reg=tau, numItermax=5000, stopThr=1e-13, warn=False
    )
    assert error(dk.sinkhorn(affinity, capacity, tau=tau, num_iters=2000), expected) < 1e-10
    single = dk.sinkhorn(affinity.float(), capacity.float(), tau=tau, num_iters=300, tol=1e-6)
    assert error(single, expected) < 1e-5


def test_a_low_temperature_approaches_the_linear_assignment():
    ot = pytest.importorskip("ot", reason="POT is not installed")
    affinity = normal(24, 4, seed=93)
    expected = ot.emd(torch.ones(24, dtype=torch.float64), torch.full((4,), 6.0, dtype=torch.float64), -affinity)
    plan = dk.sinkhorn(affinity, tau=0.02, num_iters=5000)
    assert (plan * affinity).sum() == pytest.approx((expected * affinity).sum().item(), rel=1e-3)


# --- layouts, batches, repeatability -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", BACKWARD)
def test_a_batch_equals_its_layers(backward):
    tensors = problem(20, 5, 2, 3, seed=100)
    del tensors["init"]
    options = {"num_iters": 12, "backward": backward}
    whole = value_and_gradients(ours(**options), tensors)
    for index in [(0, 0), (1, 2)]:
        layer = {n: t[index] for n, t in tensors.items()}
        assert error(whole["output 0"][index], ours(**options)(**layer)) < 1e-12
    compare(ours(num_iters=12), plain(num_iters=12), **tensors)


def test_one_capacity_and_one_tau_serve_every_layer():
    affinity, capacity = normal(3, 20, 5, seed=101), capacities(20, 5, seed=102)
    assert error(dk.sinkhorn(affinity, capacity, tau=0.7), dk.sinkhorn(affinity, capacity.expand(3, 5), tau=0.7)) < 1e-12
    compare(ours(num_iters=5), plain(num_iters=5), affinity=affinity, capacity=capacity)


def strided(layout):
    """Affinity [2, 24, 6] in an unusual layout."""
    base = normal(2, 24, 6, seed=110)
    if layout == "transposed":
        return base.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.zeros(2, 48, 13, dtype=base.dtype)[:, ::2, 1::2].copy_(base)
    if layout == "batch last":
        return base.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return base[:, :, :1].expand(2, 24, 6)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "batch last", "expanded"])
@pytest.mark.parametrize("backward", BACKWARD)
def test_any_strides(layout, backward):
    affinity = strided(layout)
    assert not affinity.is_contiguous()
    weight = normal(2, 24, 6, seed=111)

    def run(affinity):
        leaf = affinity.detach().requires_grad_()
        plan = dk.sinkhorn(leaf, num_iters=6, backward=backward)
        return {"plan": plan.detach(), "gradient": torch.autograd.grad((plan * weight).sum(), leaf)[0]}

    found, expected = run(affinity), run(affinity.contiguous())
    assert error(found["plan"], expected["plan"]) < 1e-13
    assert error(found["gradient"], expected["gradient"]) < 1e-12


def test_a_strided_cotangent():
    affinity = normal(24, 6, seed=112).requires_grad_()
    cotangent = normal(6, 24, seed=113).T
    plan = dk.sinkhorn(affinity, num_iters=6)
    found = torch.autograd.grad(plan, affinity, cotangent, retain_graph=True)[0]
    assert error(found, torch.autograd.grad(plan, affinity, cotangent.contiguous(), retain_graph=True)[0]) < 1e-13
    assert error(torch.autograd.grad(plan.sum(), affinity)[0], torch.zeros(24, 6)) < 1e-13  # rows sum to 1; stride-0 cotangent


@pytest.mark.parametrize("backward", BACKWARD)
def test_an_empty_batch(backward):
    affinity = torch.zeros(0, 12, 3, requires_grad=True)
    plan, info = dk.sinkhorn(affinity, backward=backward, tol=1e-3, return_info=True)
    assert plan.shape == (0, 12, 3)
    assert (info.log_u.shape, info.log_v.shape, info.num_iters.shape, info.error.shape) == ((0, 12), (0, 3), (0,), (0,))
    plan.sum().backward()
    assert affinity.grad.shape == affinity.shape


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", BACKWARD)
def test_bitwise_repeatable(backward, device):
    tensors = {n: t.to(device) for n, t in problem(296, 148, seed=120, dtype=torch.float32).items()}
    del tensors["init"]
    function = ours(num_iters=10, backward=backward)
    assert_same(value_and_gradients(function, tensors), value_and_gradients(function, tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.usefixtures("nan_filled")
def test_every_output_is_written(backward, device):
    affinity = normal(2, 63, 7, seed=121, dtype=torch.float32).to(device)
    assert_finite(value_and_gradients(ours(num_iters=5, backward=backward), {"affinity": affinity}))


def test_arguments_are_left_alone():
    tensors = problem(20, 5, 2, seed=122)
    before = {n: t.clone() for n, t in tensors.items()}
    ours(num_iters=3)(**tensors)
    assert_same(before, tensors)


def test_autocast_leaves_the_transport_in_float32():
    affinity = normal(20, 5, seed=123, dtype=torch.float32)
    expected = dk.sinkhorn(affinity)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(dk.sinkhorn(affinity), expected)


def test_no_graph_without_gradients():
    with torch.no_grad():
        assert not dk.sinkhorn(normal(6, 3, seed=124).requires_grad_()).requires_grad
    assert not dk.sinkhorn(normal(6, 3, seed=124)).requires_grad


# --- extremes ----------------------------------------------------------------------------------------------------------


def extreme(name):
    base = normal(24, 6, seed=130)
    if name == "affinity 1e4":
        return base * 1e4
    if name == "one sign 1e4":
        return torch.full((24, 6), 1e4, dtype=torch.float64) + base
    if name == "column 100 below":
        return base - 100.0 * torch.eye(6, dtype=torch.float64)[2]
    if name == "column 1e4 below":
        return base - 1e4 * torch.eye(6, dtype=torch.float64)[2]
    if name == "column 1e4 above":
        return base + 1e4 * torch.eye(6, dtype=torch.float64)[2]
    if name == "row 1e4 below":
        return base - 1e4 * torch.eye(24, dtype=torch.float64)[:, 5:6]
    if name == "identical rows":
        return base[:1].repeat(24, 1)
    if name == "zeros":
        return torch.zeros(24, 6, dtype=torch.float64)
    return clustered(24, 6, seed=131, strength=30.0)


EXTREMES = [
    "affinity 1e4",
    "one sign 1e4",
    "column 100 below",
    "column 1e4 below",
    "column 1e4 above",
    "row 1e4 below",
    "identical rows",
    "zeros",
    "clusters",
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("tau", [1.0, 1e-3])
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_stay_finite(name, tau, final, backward, dtype, device):
    affinity = extreme(name).to(device, dtype)
    tau = torch.tensor(tau, dtype=dtype, device=device)
    results = value_and_gradients(ours(num_iters=5, final=final, backward=backward), {"affinity": affinity, "tau": tau})
    assert_finite(results)
    plan = results["output 0"].double()
    if final == "row":  # a softmax, however large its argument is
        assert (plan.sum(-1) - 1).abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
    else:  # an exponent of this size is known to a few roundings
        roundings = 4 * torch.finfo(dtype).eps * ((affinity.abs().max() / tau).item() + 10)
        if roundings < 0.1:
            assert (plan.sum(-2) / 4 - 1).abs().max() < roundings


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("name", ["column 100 below", "column 1e4 below", "column 1e4 above", "row 1e4 below", "identical rows"])
def test_extremes_equal_the_reference(name, final):
    options = {"num_iters": 5, "final": final}
    compare(ours(**options), plain(**options), affinity=extreme(name))
    compare(ours(**options), plain(**options), affinity=extreme(name).float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("final", FINAL)
def test_a_far_start(final, dtype):
    tensors = {
        "affinity": normal(24, 6, seed=132, dtype=dtype),
        "init": torch.tensor([0.0, -200.0, 300.0, 0.0, 50.0, -1.0], dtype=dtype),
    }
    for num_iters in (1, 4):
        options = {"num_iters": num_iters, "final": final}
        compare(ours(**options), plain(**options), scales=VANISHING, **tensors)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("final", FINAL)
def test_one_expert_takes_everything(final, backward):
    results = value_and_gradients(ours(final=final, backward=backward), {"affinity": normal(16, 1, seed=133, dtype=torch.float32)})
    assert error(results["output 0"], torch.ones(16, 1)) < 1e-6
    assert results["gradient of affinity"].abs().max() < 1e-5


@pytest.mark.parametrize("backward", BACKWARD)
def test_one_neuron(backward):
    compare(ours(num_iters=20, backward=backward), plain(num_iters=20), floor=1e-9, affinity=normal(1, 4, seed=134))


def test_sixteen_bit_extremes():
    for dtype in (torch.float16, torch.bfloat16):
        assert_finite(
            value_and_gradients(
                lambda affinity: dk.sinkhorn(affinity, tau=1e-3), {"affinity": extreme("affinity 1e4").clamp(-1e4, 1e4).to(dtype)}
            )
        )


# --- bad inputs --------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(12, 4)
BAD = {
    "integer affinity": ("affinity", {"affinity": torch.zeros(12, 4, dtype=torch.int64)}),
    "boolean affinity": ("affinity", {"affinity": torch.zeros(12, 4, dtype=torch.bool)}),
    "affinity of rank 1": ("affinity", {"affinity": torch.zeros(12)}),
    "affinity of rank 0": ("affinity", {"affinity": torch.zeros(())}),
    "NaN affinity": ("affinity", {"affinity": GOOD.clone().fill_diagonal_(math.nan)}),
    "infinite affinity": ("affinity", {"affinity": GOOD.clone().fill_diagonal_(math.inf)}),
    "minus infinite affinity": ("affinity", {"affinity": GOOD.clone().fill_diagonal_(-math.inf)}),
    "zero tau": ("tau", {"tau": 0.0}),
    "negative tau": ("tau", {"tau": -1.0}),
    "NaN tau": ("tau", {"tau": math.nan}),
    "negative tau tensor": ("tau", {"affinity": GOOD.expand(2, 12, 4), "tau": torch.tensor([1.0, -1.0])}),
    "tau of the wrong shape": ("tau", {"affinity": GOOD.expand(2, 12, 4), "tau": torch.ones(3)}),
    "capacity that sums to less": ("capacity", {"capacity": torch.full((4,), 2.0)}),
    "capacity that sums to more": ("capacity", {"capacity": torch.full((4,), 3.1)}),
    "negative capacity": ("capacity", {"capacity": torch.tensor([-1.0, 5.0, 5.0, 3.0])}),
    "zero capacity": ("capacity", {"capacity": torch.tensor([0.0, 6.0, 3.0, 3.0])}),
    "NaN capacity": ("capacity", {"capacity": torch.tensor([math.nan, 3.0, 3.0, 3.0])}),
    "capacity of the wrong shape": ("capacity", {"capacity": torch.full((3,), 4.0)}),
    "capacity of the wrong batch": ("capacity", {"affinity": GOOD.expand(2, 12, 4), "capacity": torch.full((3, 4), 3.0)}),
    "one bad layer of capacity": (
        "capacity",
        {"affinity": GOOD.expand(2, 12, 4), "capacity": torch.tensor([[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 4.0]])},
    ),
    "unknown final": ("final", {"final": "rows"}),
    "unknown backward": ("backward", {"backward": "exact"}),
    "no iterations": ("num_iters", {"num_iters": 0}),
    "negative iterations": ("num_iters", {"num_iters": -3}),
    "negative tolerance": ("tol", {"tol": -1e-3}),
    "init of the wrong length": ("init", {"init": torch.zeros(5)}),
    "init of the wrong batch": ("init", {"affinity": GOOD.expand(2, 12, 4), "init": torch.zeros(3, 4)}),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(name, arguments):
    arguments = {"affinity": GOOD, **arguments}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dk.sinkhorn(arguments.pop("affinity"), **arguments)


@pytest.mark.parametrize("implementation", ["pytorch", "triton"])
@pytest.mark.parametrize(("size", "tau"), [(1, 1.0), (1, 1e-2), (1, 1e-4), (1, 1e-6), (3e4, 1e-8)])
def test_the_chosen_marginal_is_exact_at_any_temperature(size, tau, implementation):
    a = normal(256, 16, seed=80, scale=size, dtype=torch.float32).clamp(-3e4, 3e4)
    with _backend.interpreted(implementation == "triton"):
        for final, axis, sums in (("column", 0, 16.0), ("row", 1, 1.0)):
            plan, info = dk.sinkhorn(a, tau=tau, final=final, return_info=True)
            assert (plan.sum(axis) / sums - 1).abs().max() < 2e-6
            # the potentials are the plan's up to their own last digits
            exponent = a.double() / tau + info.log_u.double()[:, None] + info.log_v.double()
            digits = 4 * torch.finfo(torch.float32).eps * (a.abs().max().double() / tau).clamp(min=1)
            found = (exponent - plan.double().log())[plan > 1e-3]
            assert found.abs().max() <= digits


@pytest.mark.parametrize("implementation", ["pytorch", "triton"])
def test_exact_columns_after_a_stop_are_the_last_steps_own(implementation):
    a = normal(2, 63, 7, seed=81, dtype=torch.float32)
    with _backend.interpreted(implementation == "triton"):
        plan, info = dk.sinkhorn(a, tau=0.3, tol=1e-2, final="column", return_info=True)
        assert (info.num_iters < 50).all()
        steps = info.num_iters.tolist()
        expected = [reference.sinkhorn(x.double(), tau=0.3, num_iters=n, final="column") for x, n in zip(a, steps, strict=True)]
    for found, (exact, its) in zip(zip(plan, info.log_u, info.log_v, strict=True), expected, strict=True):
        for value, truth in zip(found, (exact, its.log_u, its.log_v), strict=True):
            assert error(value, truth) < 1e-5
