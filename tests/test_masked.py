"""masked_ffn: hard assignment and routing in the forward, straight-through gradients to plan and probs (eq. 4)."""

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
from shapes import balanced_expert_of, dense_ffn, generator, normal, routed_indices, uniform
from transformers.activations import ACT2FN

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels.experts.masked.gpu import autograd as gpu_autograd

SHAPES = [(13, 63, 7, 3, 10), (9, 296, 148, 37, 8), (20, 100, 37, 9, 6), (4, 16, 1, 1, 5), (1, 5, 5, 2, 3)]  # T, F, E, K, H
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
SOFT = [(), ("plan",), ("probs",), ("weights",), ("plan", "probs"), ("plan", "weights")]


def problem(T, F, E, K, H, *soft, seed=0, dtype=torch.float64):
    """Tensors, and the integers expert_of [F] and indices [T, K]."""
    tensors = {"x": normal(T, H, seed=seed, dtype=dtype)}
    tensors |= dict(zip(("gate_proj", "up_proj", "down_proj"), dense_ffn(F, H, seed=seed + 1, dtype=dtype), strict=True))
    drawn = {
        "plan": lambda: torch.softmax(normal(F, E, seed=seed + 5), -1),
        "probs": lambda: torch.softmax(normal(T, E, seed=seed + 6), -1),
        "weights": lambda: uniform(T, K, seed=seed + 7),
    }
    tensors |= {name: drawn[name]().to(dtype) for name in soft}
    return tensors, balanced_expert_of(F, E, seed=seed + 8), routed_indices(T, K, E, seed=seed + 9)


def ours(expert_of, indices, **options):
    def function(x, gate_proj, up_proj, down_proj, **soft):
        device = x.device
        return dk.masked_ffn(x, gate_proj, up_proj, down_proj, expert_of.to(device), indices.to(device), **soft, **options)

    return function


def plain(expert_of, indices, activation="silu"):
    def function(x, gate_proj, up_proj, down_proj, **soft):
        device, act = x.device, ACT2FN[activation]
        return reference.masked_ffn(
            x, gate_proj, up_proj, down_proj, expert_of.to(device), indices.to(device), **soft, activation=act
        )

    return function


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("soft", SOFT, ids=lambda s: "+".join(s) or "hard")
@pytest.mark.parametrize(("T", "F", "E", "K", "H"), SHAPES)
def test_equals_the_reference(T, F, E, K, H, soft, dtype, device):
    tensors, expert_of, indices = problem(T, F, E, K, H, *soft, dtype=dtype)
    compare(ours(expert_of, indices), plain(expert_of, indices), device=device, **tensors)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations(activation):
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=20)
    compare(ours(expert_of, indices, activation=activation), plain(expert_of, indices, activation), **tensors)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_tokens_with_a_float32_plan_and_router(device):
    tensors, expert_of, indices = problem(13, 63, 7, 3, 10, "plan", "probs", seed=21, dtype=torch.bfloat16)
    tensors |= {name: tensors[name].float() for name in ("plan", "probs")}
    out = ours(expert_of, indices)(**{n: t.to(device) for n, t in tensors.items()})
    assert out.dtype == torch.bfloat16
    compare(ours(expert_of, indices), plain(expert_of, indices), device=device, **tensors)


@pytest.mark.parametrize("soft", [("plan", "probs"), ("plan", "weights")], ids="+".join)
def test_empty_slots(soft):
    tensors, expert_of, _ = problem(13, 63, 7, 3, 10, *soft, seed=22)
    indices = routed_indices(13, 3, 7, seed=23, empty=0.4)
    indices[2] = 7
    compare(ours(expert_of, indices), plain(expert_of, indices), **tensors)
    results = value_and_gradients(ours(expert_of, indices), tensors)
    assert (results["output 0"][2] == 0).all()
    if "weights" in soft:
        assert (results["gradient of weights"][indices == 7] == 0).all()


def test_an_expert_named_twice_counts_twice():
    tensors, expert_of, _ = problem(3, 12, 4, 3, 5, "plan", "weights", seed=24)
    indices = torch.tensor([[1, 1, 4], [0, 2, 0], [3, 3, 3]])
    compare(ours(expert_of, indices), plain(expert_of, indices), **tensors)


@pytest.mark.parametrize("kind", ["uneven", "an expert without neurons", "one expert has all"])
def test_any_assignment(kind):
    tensors, _, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=25)
    expert_of = {
        "uneven": torch.randint(4, (24,), generator=generator(26)),
        "an expert without neurons": torch.arange(24) % 3,
        "one expert has all": torch.full((24,), 2),
    }[kind]
    compare(ours(expert_of, indices), plain(expert_of, indices), **tensors)


def test_an_expert_without_neurons_and_nothing_soft():
    tensors, _, _ = problem(6, 12, 4, 2, 5, seed=27)
    expert_of = torch.arange(12) % 2  # experts 2 and 3 are empty, and nothing says that they exist but the indices
    indices = torch.tensor([[0, 1], [0, 2], [3, 1], [2, 3], [3, 3], [1, 0]])
    compare(ours(expert_of, indices), plain(expert_of, indices), **tensors)


@pytest.mark.parametrize("soft", SOFT, ids=lambda s: "+".join(s) or "hard")
def test_no_tokens(soft):
    tensors, expert_of, indices = problem(0, 24, 4, 2, 6, *soft, seed=28)
    results = value_and_gradients(ours(expert_of, indices), tensors)
    assert results["output 0"].shape == (0, 6)
    assert all((results[f"gradient of {n}"] == 0).all() for n in tensors)


@SECOND
def test_no_wrong_second_derivative(how):
    tensors, expert_of, indices = problem(4, 9, 3, 2, 5, "plan", "probs", seed=29)
    x = tensors.pop("x")
    functions = (lambda x, f=f: f(x, **tensors) for f in (ours(expert_of, indices), plain(expert_of, indices)))
    assert_no_wrong_second_derivative(*functions, x, how)


# --- independent oracles -----------------------------------------------------------------------------------------------


def test_gradcheck():
    """The forward is differentiable in everything but the assignment and the choice of experts."""
    tensors, expert_of, _ = problem(4, 9, 3, 2, 5, "weights", seed=30)
    indices = torch.tensor([[0, 2], [3, 1], [1, 2], [2, 0]])

    def function(x, gate_proj, up_proj, down_proj, weights):
        return ours(expert_of, indices)(x, gate_proj, up_proj, down_proj, weights=weights)

    torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_straight_through_gradients_are_those_of_the_relaxed_product():
    """As if M and R were real numbers that happen to be 0 and 1."""
    tensors, expert_of, indices = problem(7, 24, 4, 2, 6, "plan", "probs", seed=31)
    x, gate, up, down = (tensors[n] for n in ("x", "gate_proj", "up_proj", "down_proj"))
    m = torch.nn.functional.one_hot(expert_of, 4).double().requires_grad_()
    r = torch.zeros(7, 4, dtype=torch.float64).scatter_(1, indices, 1.0).requires_grad_()
    relaxed = ((torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) * (r @ m.T)) @ down.T
    cotangent = normal(7, 6, seed=32)
    expected = torch.autograd.grad(relaxed, (m, r), cotangent)
    plan, probs = (tensors[n].requires_grad_() for n in ("plan", "probs"))
    out = dk.masked_ffn(x, gate, up, down, expert_of, indices, plan=plan, probs=probs)
    assert error(out, relaxed) < 1e-12
    found = torch.autograd.grad(out, (plan, probs), cotangent)
    assert all(error(a, b) < 1e-12 for a, b in zip(found, expected, strict=True))


def test_the_forward_does_not_depend_on_what_is_soft():
    tensors, expert_of, indices = problem(7, 24, 4, 2, 6, "plan", "probs", seed=33)
    hard = {n: t for n, t in tensors.items() if n not in ("plan", "probs")}
    assert error(ours(expert_of, indices)(**tensors), ours(expert_of, indices)(**hard)) < 1e-13
    other = dict(tensors, plan=torch.full_like(tensors["plan"], 0.25), probs=torch.full_like(tensors["probs"], 0.25))
    assert error(ours(expert_of, indices)(**other), ours(expert_of, indices)(**hard)) < 1e-13


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
@pytest.mark.parametrize("path", ["grouped", "masked"])
def test_the_routed_ffn_agrees(path, weighted):
    T, F, E, K, H = 13, 64, 8, 3, 10
    tensors, expert_of, _ = problem(T, F, E, K, H, "weights", seed=34)
    indices = routed_indices(T, K, E, seed=35, empty=0.2)
    weights = tensors.pop("weights") if weighted else tensors.pop("weights") * 0 + 1
    order = dk.neuron_order(expert_of)

    def routed(x, gate_proj, up_proj, down_proj, weights):
        gate_up_proj, down = reference.expert_blocks(gate_proj, up_proj, down_proj, order, E)
        return dk.expert_ffn(x, gate_up_proj, down, indices, weights, path=path)

    found = value_and_gradients(ours(expert_of, indices), {**tensors, "weights": weights})
    expected = value_and_gradients(routed, {**tensors, "weights": weights})
    assert all(error(found[name], expected[name]) < 1e-12 for name in expected)


def test_all_experts_are_the_dense_ffn():
    tensors, expert_of, _ = problem(7, 24, 4, 4, 6, seed=36)
    x, gate, up, down = tensors.values()
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    assert error(dk.masked_ffn(x, gate, up, down, expert_of, torch.arange(4).expand(7, 4)), expected) < 1e-13


@given(T=st.integers(0, 8), F=st.integers(1, 20), E=st.integers(1, 6), H=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_neuron_by_neuron(T, F, E, H, seed, data):
    K = data.draw(st.integers(1, E))
    tensors, expert_of, _ = problem(T, F, E, K, H, "weights", seed=seed)
    indices = routed_indices(T, K, E, seed=seed, empty=0.2)
    x, gate, up, down, weights = tensors.values()
    expected = torch.zeros(T, H, dtype=torch.float64)
    for t in range(T):
        for j in range(K):
            for i in (expert_of == indices[t, j]).nonzero()[:, 0]:
                expected[t] += weights[t, j] * torch.nn.functional.silu(gate[i] @ x[t]) * (up[i] @ x[t]) * down[:, i]
    assert error(dk.masked_ffn(x, gate, up, down, expert_of, indices, weights=weights), expected) < 1e-12


def test_from_affinity_and_logits_to_output():
    """The whole of the method's differentiable part, once around."""
    T, F, E, K, H = 11, 24, 4, 2, 6
    tensors, _, _ = problem(T, F, E, K, H, seed=37)
    tensors |= {"affinity": normal(F, E, seed=38), "logits": normal(T, E, seed=39)}

    def ours_(x, gate_proj, up_proj, down_proj, affinity, logits):
        plan, info = dk.sinkhorn(affinity, tau=0.5, num_iters=20, return_info=True)
        scores = affinity.detach() / 0.5 + info.log_u[:, None] + info.log_v
        routing = dk.route_top_k(logits, K)
        return dk.masked_ffn(
            x, gate_proj, up_proj, down_proj, dk.balanced_assignment(scores), routing.indices, plan=plan, probs=routing.probs
        )

    def plain_(x, gate_proj, up_proj, down_proj, affinity, logits):
        plan = reference.sinkhorn(affinity, tau=0.5, num_iters=20)[0]
        expert_of = reference.greedy_assignment(plan.detach(), [F // E] * E)
        routing = reference.route_top_k(logits, K)
        act = torch.nn.functional.silu
        return reference.masked_ffn(
            x, gate_proj, up_proj, down_proj, expert_of, routing.indices, plan=plan, probs=routing.probs, activation=act
        )

    compare(ours_, plain_, **tensors)


# --- expert by expert, on a CPU ----------------------------------------------------------------------------------------


def frozen(function, tensors):
    """``function`` of what alignment trains; the projections have no gradient."""
    fixed = {name: tensors[name] for name in ("gate_proj", "up_proj", "down_proj")}
    leaves = {name: t for name, t in tensors.items() if name not in fixed}
    return lambda **leaf: function(**{n: w.to(leaf["x"].dtype) for n, w in fixed.items()}, **leaf), leaves


@pytest.fixture
def thin(monkeypatch):
    """Thin experts are split too, on a processor without matrix units."""
    monkeypatch.setattr(_tiles.paths, "has_matrix_units", lambda dtype: False)
    monkeypatch.setattr(_tiles.paths, "_SPLIT_HIDDEN", dict.fromkeys(_tiles.paths._SPLIT_HIDDEN, 0))


def compare_frozen(expert_of, indices, tensors, **options):
    assert _tiles.expert_by_expert_masked(*indices.shape, int(expert_of.max()) + 1, expert_of.numel(), tensors["x"].dtype, True)
    own, leaves = frozen(ours(expert_of, indices, **options), tensors)
    compare(own, frozen(plain(expert_of, indices), tensors)[0], **leaves)


def test_thin_experts_are_not_split(monkeypatch):
    splits, single, half = _tiles.expert_by_expert_masked, torch.float32, torch.bfloat16
    monkeypatch.setattr(_tiles.paths, "has_matrix_units", lambda dtype: False)
    assert splits(1024, 4, 16, 1024, single, True)
    assert not splits(1024, 8, 32, 512, single, True)  # 256 rows of 16 neurons each
    assert not splits(1024, 9, 16, 1024, single, True)
    assert not splits(255, 4, 16, 1024, half, True)
    assert not splits(1024, 4, 16, 1024, single, False)  # without a backward pass there is less to spare
    assert splits(512, 4, 16, 1024, half, False)
    assert not splits(512, 4, 16, 1024, single, True)
    monkeypatch.setattr(_tiles.paths, "has_matrix_units", lambda dtype: dtype == half)
    assert not splits(512, 4, 16, 1024, half, False)
    assert splits(1024, 4, 16, 1024, single, True)


@pytest.mark.usefixtures("thin")
@DTYPES
@pytest.mark.parametrize("soft", SOFT, ids=lambda s: "+".join(s) or "hard")
def test_expert_by_expert(soft, dtype):
    tensors, expert_of, indices = problem(300, 63, 7, 3, 10, *soft, seed=50, dtype=dtype)  # experts of 9 neurons
    compare_frozen(expert_of, indices, tensors)


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("kind", ["empty slots", "named twice", "uneven", "an expert without neurons", "without tokens"])
def test_expert_by_expert_at_the_edges(kind):
    tensors, expert_of, indices = problem(260, 40, 8, 3, 6, "plan", "weights", seed=51)
    if kind == "empty slots":
        indices = routed_indices(260, 3, 8, seed=52, empty=0.4)
        indices[2] = 8
    elif kind == "named twice":
        indices[:, 1] = indices[:, 0]
    elif kind == "uneven":
        expert_of = torch.randint(8, (40,), generator=generator(53))
    elif kind == "an expert without neurons":
        expert_of = torch.arange(40) % 7 + (torch.arange(40) % 7 > 2).long()
    else:
        indices[indices == 3] = 5
    compare_frozen(expert_of, indices, tensors)
    compare_frozen(expert_of, indices, tensors, recompute=True)


@pytest.mark.usefixtures("thin")
def test_expert_by_expert_with_other_activations_and_strides():
    tensors, expert_of, indices = problem(260, 40, 8, 3, 6, "plan", "probs", seed=54)
    tensors = {name: t.T.contiguous().T for name, t in tensors.items()}
    for activation in ("gelu", "relu"):
        own, leaves = frozen(ours(expert_of, indices, activation=activation), tensors)
        compare(own, frozen(plain(expert_of, indices, activation), tensors)[0], **leaves)


@pytest.mark.usefixtures("thin")
def test_the_first_layer_gives_no_gradient_to_its_tokens():
    tensors, expert_of, indices = problem(260, 40, 8, 3, 6, "plan", "probs", seed=55)
    own, leaves = frozen(ours(expert_of, indices), tensors)
    x = leaves.pop("x")
    expected = value_and_gradients(frozen(plain(expert_of, indices), tensors)[0], {"x": x, **leaves})
    found = value_and_gradients(lambda **leaf: own(x=x, **leaf), leaves)
    assert all(error(found[name], expected[name]) < 1e-12 for name in found)


@pytest.mark.usefixtures("thin")
def test_what_the_mask_drops_is_not_multiplied():
    tensors, expert_of, indices = problem(260, 40, 8, 3, 6, seed=56)
    tensors["up_proj"][expert_of == 2] = float("inf")
    y = ours(expert_of, indices)(**tensors)
    chosen = (indices == 2).any(1)
    assert torch.isfinite(y[~chosen]).all()
    assert not torch.isfinite(y[chosen]).any()


@pytest.mark.usefixtures("thin")
@SECOND
def test_no_wrong_second_derivative_expert_by_expert(how):
    tensors, expert_of, indices = problem(256, 9, 3, 1, 5, "plan", "probs", seed=57)
    x = tensors.pop("x")
    functions = (lambda x, f=f: f(x, **tensors) for f in (ours(expert_of, indices), plain(expert_of, indices)))
    assert_no_wrong_second_derivative(*functions, x, how)


# --- which gradients, layouts, repeatability ---------------------------------------------------------------------------


def test_a_frozen_model_learns_only_plan_and_probs():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=40)
    expected = value_and_gradients(plain(expert_of, indices), tensors)
    for name in ("plan", "probs", "x", "gate_proj", "down_proj"):
        fixed = {n: t for n, t in tensors.items() if n != name}
        found = value_and_gradients(lambda fixed=fixed, **leaf: ours(expert_of, indices)(**fixed, **leaf), {name: tensors[name]})
        assert error(found[f"gradient of {name}"], expected[f"gradient of {name}"]) < 1e-12, name
        assert all(t.grad is None for t in fixed.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(device):
    tensors, expert_of, _ = problem(13, 63, 7, 3, 10, "plan", "probs", seed=41, dtype=torch.float32)
    indices, tensors = routed_indices(13, 3, 7, seed=42, empty=0.3), {n: t.to(device) for n, t in tensors.items()}
    first = value_and_gradients(ours(expert_of, indices), tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(ours(expert_of, indices), tensors))


def test_any_strides():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=43)
    expected = value_and_gradients(ours(expert_of, indices), tensors)
    found = value_and_gradients(ours(expert_of, indices.T.contiguous().T), {n: t.T.contiguous().T for n, t in tensors.items()})
    assert all(error(found[name], expected[name]) < 1e-12 for name in expected)


def test_arguments_are_left_alone():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=44)
    before, integers = {n: t.clone() for n, t in tensors.items()}, (expert_of.clone(), indices.clone())
    ours(expert_of, indices)(**tensors)
    assert_same(before, tensors)
    assert torch.equal(expert_of, integers[0])
    assert torch.equal(indices, integers[1])


def test_autocast_takes_the_dtype_of_the_inputs():
    tensors, expert_of, indices = problem(9, 24, 4, 2, 6, "plan", "probs", seed=45, dtype=torch.float32)
    expected = ours(expert_of, indices)(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(expert_of, indices)(**tensors)
    assert found.dtype == torch.float32
    assert error(found, expected) < 1e-6


# --- bad inputs --------------------------------------------------------------------------------------------------------


def good():
    return {
        "x": torch.zeros(3, 6),
        "gate_proj": torch.zeros(8, 6),
        "up_proj": torch.zeros(8, 6),
        "down_proj": torch.zeros(6, 8),
        "expert_of": torch.arange(8) % 4,
        "indices": torch.zeros(3, 2, dtype=torch.int64),
        "plan": torch.full((8, 4), 0.25),
        "probs": torch.full((3, 4), 0.25),
    }


BAD = {
    "unknown activation": ("activation", {"activation": "silly"}),
    "x of rank 1": ("x", {"x": torch.zeros(6)}),
    "x of another width": ("x|gate_proj", {"x": torch.zeros(3, 7)}),
    "up_proj of another shape": ("up_proj", {"up_proj": torch.zeros(7, 6)}),
    "down_proj not transposed": ("down_proj", {"down_proj": torch.zeros(8, 6)}),
    "weights of another dtype": ("dtype", {"gate_proj": torch.zeros(8, 6, dtype=torch.bfloat16)}),
    "expert_of of another length": ("expert_of", {"expert_of": torch.zeros(7, dtype=torch.int64)}),
    "float expert_of": ("expert_of", {"expert_of": torch.zeros(8)}),
    "expert_of above E": ("expert_of", {"expert_of": torch.full((8,), 4)}),
    "negative expert_of": ("expert_of", {"expert_of": torch.full((8,), -1)}),
    "index above E": ("indices", {"indices": torch.full((3, 2), 5)}),
    "negative index": ("indices", {"indices": torch.full((3, 2), -1)}),
    "float indices": ("indices", {"indices": torch.zeros(3, 2)}),
    "indices of other tokens": ("indices", {"indices": torch.zeros(4, 2, dtype=torch.int64)}),
    "plan of other neurons": ("plan", {"plan": torch.full((7, 4), 0.25)}),
    "probs of other tokens": ("probs", {"probs": torch.full((4, 4), 0.25)}),
    "plan and probs of unequal E": ("plan|probs", {"probs": torch.full((3, 5), 0.2)}),
    "weights of another shape": ("weights", {"weights": torch.ones(3, 3), "probs": None}),
}


@pytest.mark.parametrize(("message", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(message, arguments):
    with pytest.raises(ValueError, match=rf"\b({message})\b"):
        dk.masked_ffn(**{**good(), **arguments})


def test_one_router_gradient_at_a_time():
    both = {"probs": torch.full((3, 4), 0.25, requires_grad=True), "weights": torch.ones(3, 2, requires_grad=True)}
    with pytest.raises(ValueError, match=r"\b(probs|weights)\b"):
        dk.masked_ffn(**{**good(), **both})


def test_good_input_is_good():
    assert math.isclose(dk.masked_ffn(**good()).abs().sum().item(), 0.0)


# --- what the mask drops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dense", "expert by expert", "triton", "triton by slots"])
@pytest.mark.parametrize("soft", [(), ("plan",), ("probs",), ("weights",)], ids=lambda s: "+".join(s) or "hard")
def test_an_overflow_that_the_mask_drops_stays_where_it_is(soft, how, monkeypatch):
    """Straight through, the plan's rows of what overflowed are not finite, nor the router's of a token; all else is."""
    monkeypatch.setattr(_tiles.paths, "_SPLIT_HIDDEN", dict.fromkeys(_tiles.paths._SPLIT_HIDDEN, 0))
    monkeypatch.setattr(gpu_autograd, "leaves_zeros_out", lambda *a: how == "triton by slots")
    tensors, expert_of, indices = problem(300 if "expert" in how else 13, 40, 8, 3, 6, *soft, seed=57, dtype=torch.float32)
    indices[indices == 2] = 8
    lost = expert_of == 2
    for name in ("gate_proj", "up_proj"):
        tensors[name][lost] = tensors[name][lost].sign() * 1e25
    tame = tensors | {name: tensors[name].clamp(-9, 9) for name in ("gate_proj", "up_proj")}
    run = ours(expert_of, indices, balanced=how == "triton by slots")
    leaves = [tensors, tame]
    functions = [run, run]
    if how in ("expert by expert", "triton by slots"):
        functions, leaves = zip(*(frozen(run, t) for t in leaves), strict=True)
    with _backend.interpreted("triton" in how), np.errstate(all="ignore"):
        found, expected = (value_and_gradients(f, t) for f, t in zip(functions, leaves, strict=True))
    for name, value in found.items():
        if name not in ("gradient of probs", "gradient of weights"):
            at = ~lost if "plan" in name else ...
            torch.testing.assert_close(value[at], expected[name][at], msg=lambda text, name=name: f"{name}: {text}")


def test_a_nan_token_with_only_empty_slots_is_zero():
    tensors, expert_of, indices = problem(7, 24, 4, 2, 6, "weights", seed=58)
    indices[3] = 4
    expected = value_and_gradients(ours(expert_of, indices), tensors)
    tensors["x"][3] = float("nan")
    found = value_and_gradients(ours(expert_of, indices), tensors)
    assert (found["output 0"][3] == 0).all()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
