"""The training pass of expert_ffn: values and gradients against the reference, and what it keeps between the passes."""

import pytest
import torch
from checks import SECOND, assert_no_wrong_second_derivative, assert_same, compare, error, value_and_gradients
from shapes import expert_weights, normal, routed_indices, uniform
from torch.autograd.graph import saved_tensors_hooks
from transformers.activations import ACT2FN

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels._backend import interpreted
from dotmoe_kernels.experts.grouped.cpu.runs import best_runs
from dotmoe_kernels.experts.training import cpu as training

SHAPES = [(13, 7, 3, 9, 10), (6, 37, 9, 8, 16), (40, 4, 2, 16, 24), (5, 1, 1, 5, 6), (16, 148, 5, 4, 6), (1, 16, 16, 8, 8)]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
NAMES = ("x", "gate_up_proj", "down_proj", "weights")


def problem(T, E, K, s, H, *, seed=0, dtype=torch.float64):
    gate_up_proj, down_proj = expert_weights(E, s, H, seed=seed, dtype=dtype)
    x, weights = normal(T, H, seed=seed + 4, dtype=dtype), uniform(T, K, seed=seed + 5, dtype=dtype)
    return {"x": x, "gate_up_proj": gate_up_proj, "down_proj": down_proj, "weights": weights}


def ours(indices, *, path="grouped", **options):
    def function(x, gate_up_proj, down_proj, weights):
        return dk.expert_ffn(x, gate_up_proj, down_proj, indices, weights, path=path, **options)

    return function


def plain(indices, activation="silu"):
    def function(x, gate_up_proj, down_proj, weights):
        return reference.expert_ffn(x, gate_up_proj, down_proj, indices, weights, activation=ACT2FN[activation])

    return function


@DTYPES
@RECOMPUTE
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), SHAPES)
def test_equals_the_reference(T, E, K, s, H, empty, recompute, dtype):
    indices = routed_indices(T, K, E, seed=1, empty=empty)
    compare(ours(indices, recompute=recompute), plain(indices), **problem(T, E, K, s, H, dtype=dtype))


@pytest.mark.parametrize("stock", [False, True], ids=["[E, s, H]", "[E, H, s]"])
@pytest.mark.parametrize("few", [0, 5, 16])
def test_few_rows_an_expert(few, stock, monkeypatch):
    """In one batched product and one by one: each equals the reference."""
    monkeypatch.setattr(training, "_FEW", few)
    tensors = problem(13, 7, 3, 9, 10, seed=6, dtype=torch.float32)
    if stock:
        tensors["down_proj"] = tensors["down_proj"].contiguous()
    indices = routed_indices(13, 3, 7, seed=7, empty=0.2)
    assert 5 < torch.bincount(indices.flatten(), minlength=7)[:7].max() <= 16
    compare(ours(indices), plain(indices), **tensors)


@DTYPES
@RECOMPUTE
def test_an_expert_named_twice_counts_twice(recompute, dtype):
    indices = torch.tensor([[2, 2, 0], [1, 1, 1], [3, 4, 3], [4, 4, 4]])  # of E = 4: 4 is empty
    compare(ours(indices, recompute=recompute), plain(indices), **problem(4, 4, 3, 8, 12, seed=3, dtype=dtype))


@RECOMPUTE
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2"])
def test_gradcheck(activation, recompute):
    indices = routed_indices(5, 3, 6, seed=2, empty=0.2)
    leaves = [t.requires_grad_() for t in problem(5, 6, 3, 3, 4, seed=7).values()]
    assert torch.autograd.gradcheck(ours(indices, recompute=recompute, activation=activation), leaves)


@RECOMPUTE
@DTYPES
def test_mixed_dtype_of_the_routing_weights(recompute, dtype):
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12, seed=9, dtype=dtype)
    tensors["weights"] = tensors["weights"].float()
    compare(ours(indices, recompute=recompute), plain(indices), **tensors)


def test_wide_sums_in_16_bits():
    """A token's gradient from 64 experts is summed in float32: no worse than summing exact rows and rounding once."""
    E = K = 64
    indices = torch.arange(E).expand(8, K)
    compare(ours(indices), plain(indices), floor=2**-8, **problem(8, E, K, 8, 16, seed=11, dtype=torch.bfloat16))


# --- memory ------------------------------------------------------------------------------------------------------------


def saved_elements(function, tensors, parameters=("gate_up_proj", "down_proj")):
    """Elements kept for the backward pass by storage, those of the parameters left out; floating point and integer."""
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    known = {leaves[n].untyped_storage().data_ptr() for n in parameters}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor.is_floating_point(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        function(**leaves)
    floats = sum(n for n, floating, _ in kept.values() if floating)
    return floats, sum(n for n, floating, _ in kept.values() if not floating)


def test_what_is_kept():
    T, E, K, s, H = 64, 8, 4, 8, 32
    S, indices, tensors = T * K, routed_indices(T, K, E, seed=1), problem(T, E, K, s, H, dtype=torch.float32)
    routing = S + (E + 1)  # source and offsets
    assert saved_elements(ours(indices), tensors) == (T * H + T * K + S * 2 * s, routing)
    assert saved_elements(ours(indices, recompute=True), tensors) == (T * H + T * K, routing)
    floats, _ = saved_elements(plain(indices), tensors)
    assert floats > S * H  # the count sees the [S, H] rows where they are kept


def test_masked_path_keeps_only_its_arguments_when_recomputing():
    T, E, K, s, H = 64, 8, 4, 8, 32
    indices, tensors = routed_indices(T, K, E, seed=1), problem(T, E, K, s, H, dtype=torch.float32)
    floats, _ = saved_elements(ours(indices, path="masked", recompute=True), tensors)
    assert floats <= T * H + T * K
    assert saved_elements(ours(indices, path="masked"), tensors)[0] > T * E * s


@pytest.mark.parametrize("path", ["auto", "decode", "masked"])
def test_recomputing_changes_no_bit_on_any_path(path):
    indices, tensors = routed_indices(9, 3, 5, seed=2, empty=0.2), problem(9, 5, 3, 8, 12, dtype=torch.float32)
    kept = value_and_gradients(ours(indices, path=path), tensors)
    assert_same(kept, value_and_gradients(ours(indices, path=path, recompute=True), tensors))


def test_recomputing_changes_no_bit_of_the_kernels():
    indices, tensors = routed_indices(9, 2, 5, seed=2, empty=0.2), problem(9, 5, 2, 16, 32, dtype=torch.float32)
    with interpreted():
        kept = value_and_gradients(ours(indices), tensors)
        assert_same(kept, value_and_gradients(ours(indices, recompute=True), tensors))


# --- which gradients, and where they go --------------------------------------------------------------------------------


@RECOMPUTE
@pytest.mark.parametrize("wanted", [(n,) for n in NAMES] + [("x", "weights"), ("gate_up_proj", "down_proj")], ids="+".join)
def test_only_what_is_wanted(wanted, recompute, monkeypatch):
    """Each gradient alone is that of all together, and no product is spent on the others."""
    indices, tensors = routed_indices(9, 3, 5, seed=2, empty=0.2), problem(9, 5, 3, 8, 12)
    together = value_and_gradients(ours(indices, recompute=recompute), tensors)
    leaves = {n: t.clone().requires_grad_(n in wanted) for n, t in tensors.items()}
    from dotmoe_kernels.experts.training import cpu as training

    given, whole = [], training.backward

    def spy(*arguments):
        given.extend(whole(*arguments))
        return given

    monkeypatch.setattr(training, "backward", spy)
    cotangent = torch.randn(9, 12, generator=torch.Generator().manual_seed(100), dtype=torch.float64).to(torch.bfloat16).double()
    gradients = torch.autograd.grad(ours(indices, recompute=recompute)(**leaves), [leaves[n] for n in wanted], cotangent)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, together[f"gradient of {name}"])
    assert tuple(n for n, g in zip(NAMES, given, strict=True) if g is not None) == wanted


def test_gradients_add_up():
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    first = torch.autograd.grad(ours(indices)(**leaves).sum(), list(leaves.values()))
    assert all(leaf.grad is None for leaf in leaves.values())
    for _ in range(3):
        ours(indices)(**leaves).sum().backward()
    for leaf, gradient in zip(leaves.values(), first, strict=True):
        assert error(leaf.grad, 3 * gradient) < 1e-14


def test_two_backward_passes_over_one_graph():
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items()}
    y = ours(indices)(**leaves)
    once = torch.autograd.grad(y.square().sum(), list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("contiguous", [False, True])
def test_weight_gradients_have_the_strides_of_the_weights(contiguous):
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12)
    down = tensors["down_proj"].contiguous() if contiguous else tensors["down_proj"]
    down.requires_grad_()
    y = dk.expert_ffn(tensors["x"], tensors["gate_up_proj"], down, indices, tensors["weights"], path="grouped")
    assert torch.autograd.grad(y.sum(), down)[0].stride() == down.stride()


@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("nan_filled")
def test_idle_experts_and_empty_slots_have_zero_gradients(dtype, recompute):
    indices = torch.tensor([[1, 4], [4, 4], [1, 1]])  # E = 4: experts 0, 2, 3 idle, token 1 goes nowhere
    gradients = value_and_gradients(ours(indices, recompute=recompute), problem(3, 4, 2, 8, 12, dtype=dtype))
    assert all(torch.isfinite(g).all() for g in gradients.values())
    for name in ("gate_up_proj", "down_proj"):
        assert gradients[f"gradient of {name}"][[0, 2, 3]].count_nonzero() == 0
    assert gradients["gradient of x"][1].count_nonzero() == 0
    assert gradients["gradient of weights"][indices == 4].count_nonzero() == 0
    assert gradients["gradient of weights"][indices == 1].count_nonzero() == 4 - 1


@DTYPES
@pytest.mark.parametrize("stock", [False, True], ids=["converted", "stock"])
@pytest.mark.parametrize("rows", [0, 5, 12])
def test_runs_of_any_size(rows, stock, dtype, monkeypatch):
    """An expert with more rows than a run may have, and several that fit together; both layouts of the weights."""
    tensors, indices = problem(11, 7, 3, 8, 12, seed=5, dtype=dtype), routed_indices(11, 3, 7, seed=2, empty=0.3)
    monkeypatch.setattr(training, "_CACHED", rows * 12 * dtype.itemsize)
    if stock:
        tensors["down_proj"] = tensors["down_proj"].contiguous()
    counts = [run.counts for run in training._runs(dk.dispatch_tokens(indices, 7).offsets, tensors["x"])]
    assert sum(map(len, counts)) == 7
    assert all(sum(one) <= rows or len(one) == 1 for one in counts)
    assert rows == 0 or len(counts) < 7
    compare(ours(indices), plain(indices), **tensors)


@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stock", [False, True], ids=["converted", "stock"])
@pytest.mark.parametrize("rows", [0, 150, 2048])
def test_batches_of_16_bit_experts(rows, stock, dtype, recompute, monkeypatch):
    """Every expert alone, some together and nearly all: of unequal experts, two of them without a token."""
    monkeypatch.setattr("dotmoe_kernels._tiles.paths._CPU_PADDED_ROWS", rows)
    tensors = problem(90, 9, 3, 8, 12, seed=5, dtype=dtype)
    indices = torch.where(routed_indices(90, 3, 9, seed=2, empty=0.2) == 5, 8, routed_indices(90, 3, 9, seed=2, empty=0.2))
    indices[:, 0] = torch.where(torch.arange(90) % 3 > 0, 2, 9)
    indices[indices == 7] = 1
    if stock:
        tensors["down_proj"] = tensors["down_proj"].contiguous()
    runs = best_runs(dk.dispatch_tokens(indices, 9).offsets, tensors["down_proj"])
    assert {0: len(runs) == 9, 150: 3 < len(runs) < 9, 2048: len(runs) <= 2}[rows]
    compare(ours(indices, recompute=recompute), plain(indices), **tensors)


@pytest.mark.usefixtures("nan_filled")
def test_a_token_of_nan_reaches_no_other_in_16_bits():
    """Nor do the rows that fill an expert up."""
    indices, tensors = routed_indices(90, 3, 9, seed=2, empty=0.2), problem(90, 9, 3, 8, 12, dtype=torch.bfloat16)
    clean = value_and_gradients(ours(indices), tensors)
    broken = value_and_gradients(ours(indices), tensors | {"x": tensors["x"].index_fill(0, torch.tensor([3]), torch.nan)})
    for name in ("output 0", "gradient of x", "gradient of weights"):
        assert torch.isfinite(clean[name]).all()
        assert broken[name][3].isnan().any()
        others = [t for t in range(90) if t != 3]
        assert torch.equal(broken[name][others], clean[name][others])


@RECOMPUTE
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "K"), [(0, 2), (3, 0)])
def test_nothing_to_do(T, K, dtype, recompute):
    tensors = problem(T, 4, K, 8, 12, dtype=dtype)
    gradients = value_and_gradients(ours(torch.zeros(T, K, dtype=torch.int64), recompute=recompute), tensors)
    assert gradients["output 0"].shape == (T, 12)
    assert all(g.count_nonzero() == 0 for g in gradients.values())


@RECOMPUTE
def test_repeatable(recompute):
    indices, tensors = routed_indices(64, 3, 5, seed=2), problem(64, 5, 3, 8, 12, dtype=torch.float32)
    first, second = (value_and_gradients(ours(indices, recompute=recompute), tensors) for _ in range(2))
    assert_same(first, second)


@SECOND
@RECOMPUTE
@pytest.mark.parametrize("name", NAMES)
def test_no_second_derivative(name, recompute, how):
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12)
    alone = ours(indices, recompute=recompute), plain(indices)
    assert_no_wrong_second_derivative(*(lambda t, f=f: f(**(tensors | {name: t})) for f in alone), tensors[name], how)


def test_second_derivative_of_a_sum_is_refused():
    """The cotangent is a constant here: only what was kept connects the gradient to x."""
    indices, tensors = routed_indices(9, 3, 5, seed=2), problem(9, 5, 3, 8, 12)
    x = tensors["x"].requires_grad_()
    gradient = torch.autograd.grad(ours(indices)(**tensors).sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="expert_ffn has no second derivative"):
        torch.autograd.grad(gradient.square().sum() + x.square().sum(), x)
