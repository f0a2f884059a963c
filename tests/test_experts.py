"""expert_ffn: the routed FFN, by every path. Against the reference, a loop, transformers' eager experts and the dense FFN."""

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
from shapes import PATHS, balanced_expert_of, dense_ffn, expert_weights, generator, normal, routed_indices, uniform
from transformers.activations import ACT2FN
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import dotmoe_kernels as dk
from dotmoe_kernels import reference

SHAPES = [(13, 7, 3, 9, 10), (6, 37, 9, 8, 16), (4, 1, 1, 5, 6), (1, 16, 16, 8, 8), (16, 148, 5, 4, 6)]  # T, E, K, s, H
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])
ACTIVATIONS = ["silu", "gelu", "gelu_pytorch_tanh", "relu"]


def problem(T, E, K, s, H, *, seed=0, dtype=torch.float64):
    gate_up_proj, down_proj = expert_weights(E, s, H, seed=seed, dtype=dtype)
    weights = uniform(T, K, seed=seed + 5, dtype=dtype)
    x = normal(T, H, seed=seed + 4, dtype=dtype)
    return {"x": x, "gate_up_proj": gate_up_proj, "down_proj": down_proj, "weights": weights}


def ours(indices, **options):
    def function(x, gate_up_proj, down_proj, weights):
        return dk.expert_ffn(x, gate_up_proj, down_proj, indices.to(x.device), weights, **options)

    return function


def plain(indices, activation="silu"):
    def function(x, gate_up_proj, down_proj, weights):
        return reference.expert_ffn(x, gate_up_proj, down_proj, indices.to(x.device), weights, activation=ACT2FN[activation])

    return function


def by_loop(x, gate_up_proj, down_proj, indices, weights, activation="silu"):
    """One token, one expert at a time."""
    y = torch.zeros_like(x)
    for t, row in enumerate(indices.tolist()):
        for j, e in enumerate(row):
            if e < gate_up_proj.shape[0]:
                gate, up = (gate_up_proj[e] @ x[t]).chunk(2)
                y[t] += weights[t, j] * (down_proj[e] @ (ACT2FN[activation](gate) * up))
    return y


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("empty", [0.0, 0.4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), SHAPES)
def test_every_path_equals_the_reference(T, E, K, s, H, path, empty, dtype, device):
    indices = routed_indices(T, K, E, seed=1, empty=empty)
    compare(ours(indices, path=path), plain(indices), device=device, **problem(T, E, K, s, H, dtype=dtype))


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("path", ["auto", "grouped", "masked"])
def test_many_tokens(path, dtype, device):
    indices = routed_indices(150, 4, 9, seed=2, empty=0.1)
    compare(ours(indices, path=path), plain(indices), device=device, **problem(150, 9, 4, 16, 24, seed=10, dtype=dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_activations(path, activation):
    indices = routed_indices(9, 2, 5, seed=3)
    tensors = problem(9, 5, 2, 8, 6, seed=20)
    compare(ours(indices, path=path, activation=activation), plain(indices, activation), **tensors)
    assert (
        error(
            ours(indices, path=path, activation=activation)(**tensors), by_loop(**tensors, indices=indices, activation=activation)
        )
        < 1e-12
    )


def test_every_activation_that_is_taken_is_that_of_act2fn():
    indices, tensors = routed_indices(9, 2, 5, seed=3), problem(9, 5, 2, 8, 6, seed=21)
    taken = []
    for name in ACT2FN:
        try:
            results = {path: value_and_gradients(ours(indices, path=path, activation=name), tensors) for path in PATHS}
        except ValueError as refusal:
            assert "activation" in str(refusal)  # noqa: PT017
            continue
        expected = value_and_gradients(plain(indices, name), tensors)
        for path, result in results.items():
            assert all(error(result[n], expected[n]) < 1e-10 for n in expected), (name, path)
        taken.append(name)
    assert set(ACTIVATIONS) <= set(taken)


def test_activation_defaults_to_silu():
    indices, tensors = routed_indices(9, 2, 5, seed=3), problem(9, 5, 2, 8, 6, seed=20)
    assert torch.equal(ours(indices)(**tensors), ours(indices, activation="silu")(**tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_float32_routing_weights_with_bfloat16_tokens(path, device):
    indices, tensors = routed_indices(9, 3, 5, seed=4), problem(9, 5, 3, 8, 16, seed=30, dtype=torch.bfloat16)
    tensors["weights"] = uniform(9, 3, seed=31, dtype=torch.float32)
    assert ours(indices, path=path)(**tensors).dtype == torch.bfloat16
    compare(ours(indices, path=path), plain(indices), device=device, **tensors)


@pytest.mark.parametrize("path", PATHS)
def test_gradcheck(path):
    indices = torch.tensor([[0, 2], [3, 1], [1, 3], [2, 0]])  # expert 3 of 3 is an empty slot
    tensors = problem(4, 3, 2, 3, 4, seed=40)
    torch.autograd.gradcheck(ours(indices, path=path), [t.requires_grad_() for t in tensors.values()])


@SECOND
@pytest.mark.parametrize("path", PATHS)
def test_no_wrong_second_derivative(path, how):
    tensors = problem(4, 3, 2, 3, 4, seed=41)
    x, indices = tensors.pop("x"), routed_indices(4, 2, 3, seed=42)
    functions = (lambda x, f=f: f(x, **tensors) for f in (ours(indices, path=path), plain(indices)))
    assert_no_wrong_second_derivative(*functions, x, how)


# --- independent oracles -----------------------------------------------------------------------------------------------


def eager_experts(kind, tensors, activation):
    E, H, s = tensors["down_proj"].shape
    if kind == "Qwen3Moe":
        config = Qwen3MoeConfig(num_experts=E, hidden_size=H, moe_intermediate_size=s, hidden_act=activation)
        experts = Qwen3MoeExperts
    else:
        config = MixtralConfig(num_local_experts=E, hidden_size=H, intermediate_size=s, hidden_act=activation)
        experts = MixtralExperts
    config._experts_implementation = "eager"
    module = experts(config).to(tensors["x"].dtype)
    module.gate_up_proj.data.copy_(tensors["gate_up_proj"])
    module.down_proj.data.copy_(tensors["down_proj"])
    return module


@DTYPES
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("kind", "activation", "empty"), [("Qwen3Moe", "silu", 0.3), ("Mixtral", "gelu_pytorch_tanh", 0.0)])
def test_transformers_eager_experts_agree(kind, activation, empty, path, dtype):
    T, E, K, s, H = 12, 10, 4, 8, 16
    indices, tensors = routed_indices(T, K, E, seed=5, empty=empty), problem(T, E, K, s, H, seed=50, dtype=dtype)

    def eager(x, gate_up_proj, down_proj, weights):
        module = eager_experts(kind, {"x": x, "gate_up_proj": gate_up_proj, "down_proj": down_proj}, activation)
        arguments = (x, indices, weights)
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(module, parameters, arguments)

    compare(ours(indices, path=path, activation=activation), eager, **tensors)


@pytest.mark.parametrize("layout", ["transpose of [E, s, H]", "contiguous [E, H, s]"])
@pytest.mark.parametrize("path", PATHS)
def test_all_experts_with_unit_weights_are_the_dense_ffn(path, layout):
    F, E, H, T = 24, 4, 10, 11
    gate, up, down = dense_ffn(F, H, seed=60)
    x = normal(T, H, seed=61)
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    order = dk.neuron_order(balanced_expert_of(F, E, seed=62))
    gate_up_proj, down_proj = reference.expert_blocks(gate, up, down, order, E)
    down_proj = down_proj.transpose(1, 2).contiguous().transpose(1, 2) if layout.startswith("transpose") else down_proj.contiguous()
    assert down_proj.is_contiguous() == layout.startswith("contiguous")
    indices = torch.stack([torch.randperm(E, generator=generator(t)) for t in range(T)])
    for weights in (None, torch.ones(T, E, dtype=torch.float64)):
        assert error(dk.expert_ffn(x, gate_up_proj, down_proj, indices, weights, path=path), expected) < 1e-12


@given(
    T=st.integers(0, 16),
    E=st.integers(1, 6),
    s=st.integers(1, 5),
    H=st.integers(1, 7),
    path=st.sampled_from(PATHS),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_loop_agrees(T, E, s, H, path, seed, data):
    K = data.draw(st.integers(1, E))
    indices, tensors = routed_indices(T, K, E, seed=seed, empty=0.2), problem(T, E, K, s, H, seed=seed)
    assert error(ours(indices, path=path)(**tensors), by_loop(**tensors, indices=indices)) < 1e-12


# --- slots that are empty, repeated or absent --------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_no_weights_are_unit_weights(path, device):
    indices = routed_indices(9, 3, 5, seed=6, empty=0.3)
    tensors = problem(9, 5, 3, 8, 6, seed=70)
    del tensors["weights"]

    def expected(x, gate_up_proj, down_proj):
        return plain(indices)(x, gate_up_proj, down_proj, torch.ones(9, 3, dtype=x.dtype, device=x.device))

    def found(x, gate_up_proj, down_proj):
        return dk.expert_ffn(x, gate_up_proj, down_proj, indices.to(x.device), None, path=path)

    compare(found, expected, device=device, **tensors)


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_named_twice_counts_twice(path):
    indices = torch.tensor([[1, 1, 4], [0, 2, 0], [3, 3, 3], [4, 4, 4]])  # of 4 experts
    tensors = problem(4, 4, 3, 5, 6, seed=80)
    compare(ours(indices, path=path), plain(indices), **tensors)
    assert error(ours(indices, path=path)(**tensors), by_loop(**tensors, indices=indices)) < 1e-12


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_empty_slots_give_and_take_nothing(path, device):
    indices = routed_indices(12, 4, 6, seed=7, empty=0.4)
    indices[3] = 6  # a token without an expert
    tensors = {n: t.to(device) for n, t in problem(12, 6, 4, 5, 8, seed=90).items()}
    results = value_and_gradients(ours(indices, path=path), tensors)
    assert (results["output 0"][3] == 0).all()
    assert (results["gradient of x"][3] == 0).all()
    assert (results["gradient of weights"].cpu()[indices == 6] == 0).all()
    assert (results["gradient of weights"].cpu()[indices < 6] != 0).all()
    other = dict(tensors, weights=torch.where(indices.to(device) == 6, 1e6, tensors["weights"]))
    assert_same({"output": results["output 0"]}, {"output": value_and_gradients(ours(indices, path=path), other)["output 0"]})


@pytest.mark.parametrize("path", PATHS)
def test_only_empty_slots(path):
    indices = torch.full((5, 2), 6)
    results = value_and_gradients(ours(indices, path=path), problem(5, 6, 2, 5, 8, seed=91))
    assert all((value == 0).all() for value in results.values())


@pytest.mark.parametrize("path", PATHS)
def test_an_unused_expert_has_no_gradient(path):
    indices = torch.tensor([[0, 2], [2, 3], [3, 0]])
    results = value_and_gradients(ours(indices, path=path), problem(3, 4, 2, 5, 8, seed=92))
    for name in ("gate_up_proj", "down_proj"):
        gradient = results[f"gradient of {name}"]
        assert (gradient[1] == 0).all()
        assert all((gradient[e] != 0).any() for e in (0, 2, 3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path, device):
    indices = torch.zeros(0, 2, dtype=torch.int64)
    tensors = {n: t.to(device) for n, t in problem(0, 4, 2, 5, 8, seed=93).items()}
    results = value_and_gradients(ours(indices, path=path), tensors)
    assert results["output 0"].shape == (0, 8)
    assert (results["gradient of gate_up_proj"] == 0).all()
    assert (results["gradient of down_proj"] == 0).all()


# --- paths agree, layouts, modes, repeatability ------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 16])
def test_paths_agree(T):
    indices, tensors = routed_indices(T, 9, 37, seed=8, empty=0.1), problem(T, 37, 9, 8, 16, seed=100)
    results = {path: value_and_gradients(ours(indices, path=path), tensors) for path in PATHS}
    for path in PATHS:
        for name, value in results[path].items():
            assert error(value, results["grouped"][name]) < 1e-12, (path, name)


@pytest.mark.parametrize("path", PATHS)
def test_any_strides(path):
    indices, tensors = routed_indices(12, 3, 5, seed=9), problem(12, 5, 3, 6, 8, seed=110)
    expected = value_and_gradients(ours(indices, path=path), tensors)
    other = {
        "x": tensors["x"].T.contiguous().T,
        "gate_up_proj": tensors["gate_up_proj"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "down_proj": tensors["down_proj"].contiguous(),
        "weights": tensors["weights"].T.contiguous().T,
    }
    found = value_and_gradients(ours(indices.T.contiguous().T, path=path), other)
    assert all(error(found[name], expected[name]) < 1e-12 for name in expected)
    x = torch.zeros(24, 16, dtype=torch.float64)[::2, ::2].copy_(tensors["x"])
    assert error(ours(indices, path=path)(**dict(tensors, x=x)), expected["output 0"]) < 1e-12


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode, path):
    indices, tensors = routed_indices(3, 3, 5, seed=10), problem(3, 5, 3, 6, 8, seed=111, dtype=torch.float32)
    expected = ours(indices, path=path)(**{n: t.requires_grad_() for n, t in tensors.items()})
    with mode():
        found = ours(indices, path=path)(**tensors)
    assert not found.requires_grad
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["x", "gate_up_proj", "down_proj", "weights"])
def test_only_one_argument_needs_a_gradient(name, path):
    indices, tensors = routed_indices(7, 3, 5, seed=11), problem(7, 5, 3, 6, 8, seed=112)
    expected = value_and_gradients(plain(indices), tensors)[f"gradient of {name}"]
    fixed = {n: t for n, t in tensors.items() if n != name}
    found = value_and_gradients(lambda **leaf: ours(indices, path=path)(**fixed, **leaf), {name: tensors[name]})
    assert error(found[f"gradient of {name}"], expected) < 1e-12


@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_of_the_expert_weights_of_a_frozen_model(path):
    indices, tensors = routed_indices(7, 3, 5, seed=12), problem(7, 5, 3, 6, 8, seed=113)
    tensors["x"].requires_grad_()
    ours(indices, path=path)(**tensors).sum().backward()
    assert tensors["gate_up_proj"].grad is None
    assert tensors["down_proj"].grad is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(path, device):
    indices = routed_indices(13, 3, 7, seed=13, empty=0.3)
    tensors = {n: t.to(device) for n, t in problem(13, 7, 3, 9, 10, seed=120, dtype=torch.float32).items()}
    first = value_and_gradients(ours(indices, path=path), tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(ours(indices, path=path), tensors))


@pytest.mark.parametrize("path", PATHS)
def test_arguments_are_left_alone(path):
    indices, tensors = routed_indices(7, 3, 5, seed=14, empty=0.3), problem(7, 5, 3, 6, 8, seed=121)
    before, before_indices = {n: t.clone() for n, t in tensors.items()}, indices.clone()
    ours(indices, path=path)(**tensors)
    assert_same(before, tensors)
    assert torch.equal(indices, before_indices)


@pytest.mark.parametrize("path", PATHS)
def test_autocast_takes_the_dtype_of_the_inputs(path):
    indices, tensors = routed_indices(7, 3, 5, seed=15), problem(7, 5, 3, 6, 8, seed=122, dtype=torch.float32)
    expected = ours(indices, path=path)(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(indices, path=path)(**tensors)
    assert found.dtype == torch.float32
    assert error(found, expected) < 1e-6


@pytest.mark.parametrize("weights", ["unit", "softmax", "renormalized"])
def test_from_logits_to_output(weights):
    """The gradient reaches the router through routing.weights."""
    tensors = problem(9, 5, 2, 6, 8, seed=130)
    del tensors["weights"]
    tensors["logits"] = normal(9, 5, seed=131)

    def sparse(route, ffn):
        def function(x, gate_up_proj, down_proj, logits):
            routing = route(logits, 2, weights=weights)
            return ffn(x, gate_up_proj, down_proj, routing.indices, routing.weights)

        return function

    compare(
        sparse(dk.route_top_k, dk.expert_ffn),
        sparse(reference.route_top_k, lambda *a: reference.expert_ffn(*a, activation=torch.nn.functional.silu)),
        **tensors,
    )


# --- bad inputs --------------------------------------------------------------------------------------------------------


def good():
    return {
        "x": torch.zeros(3, 6),
        "gate_up_proj": torch.zeros(4, 10, 6),
        "down_proj": torch.zeros(4, 6, 5),
        "indices": torch.zeros(3, 2, dtype=torch.int64),
        "weights": torch.ones(3, 2),
    }


BAD = {
    "unknown activation": ("activation", {"activation": "silly"}),
    "unknown path": ("path", {"path": "dense"}),
    "no workspace": ("workspace is 0; allowed: None", {"workspace": 0}),
    "workspace of a fraction": ("workspace is 0.5; allowed: None", {"workspace": 0.5}),
    "x of rank 1": ("x", {"x": torch.zeros(6)}),
    "x of another width": ("x|gate_up_proj", {"x": torch.zeros(3, 7)}),
    "x of another dtype": ("dtype", {"x": torch.zeros(3, 6, dtype=torch.float64)}),
    "gate_up_proj of rank 2": ("gate_up_proj", {"gate_up_proj": torch.zeros(10, 6)}),
    "gate_up_proj of odd height": ("gate_up_proj", {"gate_up_proj": torch.zeros(4, 11, 6)}),
    "gate_up_proj of another dtype": ("dtype", {"gate_up_proj": torch.zeros(4, 10, 6, dtype=torch.bfloat16)}),
    "down_proj of another width": ("down_proj", {"down_proj": torch.zeros(4, 6, 4)}),
    "down_proj not transposed": ("down_proj", {"down_proj": torch.zeros(4, 5, 6)}),
    "down_proj of other experts": ("down_proj", {"down_proj": torch.zeros(3, 6, 5)}),
    "down_proj of another dtype": ("dtype", {"down_proj": torch.zeros(4, 6, 5, dtype=torch.bfloat16)}),
    "index above E": ("indices", {"indices": torch.full((3, 2), 5)}),
    "negative index": ("indices", {"indices": torch.full((3, 2), -1)}),
    "float indices": ("indices", {"indices": torch.zeros(3, 2)}),
    "indices of other tokens": ("indices", {"indices": torch.zeros(4, 2, dtype=torch.int64)}),
    "weights of another shape": ("weights", {"weights": torch.ones(3, 3)}),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("message", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(message, arguments, path):
    with pytest.raises(ValueError, match=rf"\b({message})\b"):
        dk.expert_ffn(**{"path": path, **good(), **arguments})
