"""dispatch_tokens, scatter_tokens, gather_tokens, grouped_mm: tokens to expert-sorted slots and back."""

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
from shapes import generator, normal, routed_indices, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import reference

SHAPES = [(63, 7, 3), (40, 148, 37), (5, 1, 1), (1, 16, 16), (0, 4, 2), (17, 300, 2)]  # T, E, K
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"])


def used(slots):
    return torch.arange(slots.source.numel()) < slots.offsets[-1].item()


# --- dispatch_tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_slots(T, E, K, empty, device):
    indices = routed_indices(T, K, E, seed=0, empty=empty)
    slots = dk.dispatch_tokens(indices.to(device), E)
    assert (slots.token.dtype, slots.source.dtype, slots.offsets.dtype) == (torch.int64, torch.int64, torch.int32)
    assert (slots.token.shape, slots.source.shape, slots.offsets.shape) == ((T * K,), (T * K,), (E + 1,))
    flat = indices.flatten().tolist()
    assert slots.source.tolist() == sorted(range(T * K), key=lambda p: (flat[p], p))  # stable; index E is the largest: last
    assert slots.token.tolist() == [p // K for p in slots.source.tolist()]
    assert slots.offsets.tolist() == [sum(e < bound for e in flat) for bound in range(E + 1)]


@given(T=st.integers(0, 30), K=st.integers(1, 5), E=st.integers(1, 9), seed=st.integers(0, 999))
def test_slots_with_repeated_experts(T, K, E, seed):
    indices = torch.randint(E + 1, (T, K), generator=generator(seed))  # index E: empty
    slots = dk.dispatch_tokens(indices, E)
    expert = indices.flatten()[slots.source]
    assert slots.source.sort().values.tolist() == list(range(T * K))
    assert slots.offsets[0] == 0
    for e in range(E):
        rows = slice(slots.offsets[e].item(), slots.offsets[e + 1].item())
        assert (expert[rows] == e).all()
        assert (slots.source[rows].diff() > 0).all()
    assert (expert[slots.offsets[E].item() :] == E).all()


def test_strided_indices():
    indices = routed_indices(20, 3, 7, seed=1)
    a, b = dk.dispatch_tokens(indices, 7), dk.dispatch_tokens(indices.T.contiguous().T, 7)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- scatter_tokens, gather_tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_scatter_and_gather_equal_the_reference(T, E, K, empty, dtype, device):
    indices = routed_indices(T, K, E, seed=2, empty=empty).to(device)
    slots = dk.dispatch_tokens(indices, E)

    def here(t):  # the exact computation runs on the CPU
        return type(slots)(*(s.to(t.device) for s in slots))

    x, ys = normal(T, 10, seed=3, dtype=dtype), normal(T * K, 10, seed=4, dtype=dtype)
    weights = uniform(T, K, seed=5).to(dtype)
    compare(lambda x: dk.scatter_tokens(x, here(x)), lambda x: reference.scatter_tokens(x, here(x)), device=device, x=x)
    compare(
        lambda ys, weights: dk.gather_tokens(ys, here(ys), weights),
        lambda ys, weights: reference.gather_tokens(ys, here(ys), weights),
        device=device,
        ys=ys,
        weights=weights,
    )


@given(T=st.integers(0, 20), K=st.integers(1, 4), E=st.integers(1, 7), seed=st.integers(0, 999), empty=st.sampled_from([0.0, 0.5]))
def test_scatter_then_gather(T, K, E, seed, empty):
    K = min(K, E)
    indices, x = routed_indices(T, K, E, seed=seed, empty=empty), normal(T, 6, seed=seed)
    slots = dk.dispatch_tokens(indices, E)
    xs = dk.scatter_tokens(x, slots)
    assert torch.equal(xs, torch.where(used(slots)[:, None], x[slots.token], 0))
    served = (indices < E).sum(-1, keepdim=True)
    assert error(dk.gather_tokens(xs, slots, torch.ones(T, K, dtype=torch.float64)), x * served) < 1e-14
    assert error(dk.gather_tokens(xs, slots, num_tokens=T), x * served) < 1e-14
    weights = uniform(T, K, seed=seed)
    expected = x * (weights * (indices < E)).sum(-1, keepdim=True)
    assert error(dk.gather_tokens(xs, slots, weights), expected) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
def test_scatter_then_gather_multiplies_by_k(device):
    x, slots = (
        normal(63, 10, seed=6, dtype=torch.float32).to(device),
        dk.dispatch_tokens(routed_indices(63, 3, 7, seed=7).to(device), 7),
    )
    assert error(dk.gather_tokens(dk.scatter_tokens(x, slots), slots, num_tokens=63), 3 * x.double()) < 1e-6


@pytest.mark.parametrize(("T", "K"), [(0, 3), (5, 0), (0, 0)])
def test_nothing_to_move(T, K):
    slots = dk.dispatch_tokens(torch.zeros(T, K, dtype=torch.int64), 3)
    x, w = torch.ones(T, 4, requires_grad=True), torch.ones(T, K, requires_grad=True)
    xs = dk.scatter_tokens(x, slots)
    y = dk.gather_tokens(xs, slots, w)
    assert (xs.shape, y.shape) == ((0, 4), (T, 4))
    gradients = torch.autograd.grad(y.sum(), [x, w])
    assert [g.shape for g in gradients] == [x.shape, w.shape]
    assert not y.any()
    assert not gradients[0].any()


def test_gradients_by_finite_differences():
    slots = dk.dispatch_tokens(routed_indices(6, 3, 5, seed=8, empty=0.3), 5)
    x, ys, weights = normal(6, 4, seed=9), normal(18, 4, seed=10), normal(6, 3, seed=11)
    torch.autograd.gradcheck(lambda x: dk.scatter_tokens(x, slots), x.requires_grad_())
    torch.autograd.gradcheck(lambda ys, w: dk.gather_tokens(ys, slots, w), (ys.requires_grad_(), weights.requires_grad_()))
    torch.autograd.gradcheck(lambda ys: dk.gather_tokens(ys, slots, num_tokens=6), ys)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_weights_on_bfloat16_slots(device):
    slots = dk.dispatch_tokens(routed_indices(30, 3, 7, seed=12, empty=0.2).to(device), 7)
    ys, weights = normal(90, 10, seed=13, dtype=torch.bfloat16), normal(30, 3, seed=14, dtype=torch.float32)
    assert dk.gather_tokens(ys.to(device), slots, weights.to(device)).dtype == torch.bfloat16
    here = lambda t: type(slots)(*(s.to(t.device) for s in slots))  # noqa: E731
    compare(
        lambda ys, weights: dk.gather_tokens(ys, here(ys), weights),
        lambda ys, weights: reference.gather_tokens(ys, here(ys), weights),
        device=device,
        ys=ys,
        weights=weights,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_empty_slots_are_zero_whatever_they_hold(device):
    slots = dk.dispatch_tokens(routed_indices(20, 3, 7, seed=15, empty=0.4).to(device), 7)
    tail = ~used(slots)
    assert tail.any()
    ys = normal(60, 10, seed=16)
    ys[tail] = math.nan
    ys, weights = ys.to(device).requires_grad_(), normal(20, 3, seed=17).to(device).requires_grad_()
    y = dk.gather_tokens(ys, slots, weights)
    assert torch.isfinite(y).all()
    y.square().sum().backward()
    assert torch.isfinite(ys.grad).all()
    assert (ys.grad.cpu()[tail] == 0).all()
    assert (ys.grad.cpu()[~tail] != 0).all()
    assert torch.isfinite(weights.grad).all()
    assert (weights.grad.flatten()[slots.source].cpu()[tail] == 0).all()
    x = normal(20, 10, seed=18).to(device).requires_grad_()
    xs = dk.scatter_tokens(x, slots)
    assert (xs.cpu()[tail] == 0).all()
    cotangent = normal(60, 10, seed=19)
    cotangent[tail] = math.nan
    xs.backward(cotangent.to(device))
    assert torch.isfinite(x.grad).all()


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", [0.0, 0.4, 1.0])
def test_repeatable_and_written_everywhere(empty, device):
    slots = dk.dispatch_tokens(routed_indices(63, 3, 7, seed=20, empty=empty).to(device), 7)
    tensors = {
        n: t.to(device) for n, t in {"x": normal(63, 10, seed=21).float(), "weights": normal(63, 3, seed=22).float()}.items()
    }

    def function(x, weights):
        return dk.gather_tokens(dk.scatter_tokens(x, slots).tanh(), slots, weights)

    first = value_and_gradients(function, tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(function, tensors))


def test_any_strides():
    slots = dk.dispatch_tokens(routed_indices(20, 3, 7, seed=23), 7)
    x, ys, weights = normal(20, 10, seed=24), normal(60, 10, seed=25), normal(20, 3, seed=26)
    assert torch.equal(dk.scatter_tokens(x.T.contiguous().T, slots), dk.scatter_tokens(x, slots))
    found = dk.gather_tokens(ys.T.contiguous().T, slots, weights.T.contiguous().T)
    assert error(found, dk.gather_tokens(ys, slots, weights)) < 1e-14
    leaf = ys.clone().requires_grad_()
    dk.gather_tokens(leaf, slots, weights).sum().backward()  # an expanded cotangent
    assert error(leaf.grad, weights.flatten()[slots.source][:, None].expand(60, 10)) < 1e-14


# --- grouped_mm --------------------------------------------------------------------------------------------------------


def group_offsets(sizes, S):
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)
    assert offsets[-1] <= S
    return offsets


GROUPS = {
    "even": ([4, 4, 4], 12),
    "uneven with a tail": ([5, 0, 1, 9], 20),
    "empty first and last": ([0, 7, 0], 7),
    "all empty": ([0, 0], 3),
    "one expert": ([6], 6),
    "no rows": ([0, 0, 0], 0),
    "many": ([3, 0, 1, 2] * 37, 230),
}


def strided_b(E, Kdim, N, layout, dtype, seed=31):
    b = normal(E, Kdim, N, seed=seed, scale=Kdim**-0.5, dtype=dtype)
    if layout == "transposed":  # what expert_ffn passes: a view of [E, N, Kdim]
        return b.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "expert in the middle":
        return b.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expert last":
        return b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return b


LAYOUTS = ["contiguous", "transposed", "expert in the middle", "expert last"]


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("sizes", "S"), GROUPS.values(), ids=GROUPS.keys())
def test_grouped_mm_equals_the_reference(sizes, S, layout, dtype, device):
    offsets = group_offsets(sizes, S)
    compare(
        lambda a, b: dk.grouped_mm(a, b, offsets.to(a.device)),
        lambda a, b: reference.grouped_mm(a, b, offsets),
        device=device,
        a=normal(S, 16, seed=30, dtype=dtype),
        b=strided_b(len(sizes), 16, 24, layout, dtype),
    )


@pytest.mark.parametrize(("Kdim", "N"), [(1, 1), (7, 5), (13, 33), (130, 3)])
def test_grouped_mm_of_awkward_sizes(Kdim, N):
    offsets = group_offsets([5, 0, 1, 9], 20)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = normal(20, Kdim, seed=32, dtype=dtype), strided_b(4, Kdim, N, "transposed", dtype)
        compare(lambda a, b: dk.grouped_mm(a, b, offsets), lambda a, b: reference.grouped_mm(a, b, offsets), a=a, b=b)


def test_grouped_mm_by_hand():
    a, b = normal(9, 4, seed=33), normal(3, 4, 5, seed=34)
    out = dk.grouped_mm(a, b, torch.tensor([0, 2, 2, 7], dtype=torch.int32))
    assert error(out[:2], a[:2] @ b[0]) < 1e-14
    assert error(out[2:7], a[2:7] @ b[2]) < 1e-14
    assert torch.equal(out[7:], torch.zeros(2, 5, dtype=torch.float64))


def test_grouped_mm_gradcheck():
    offsets = group_offsets([2, 0, 3], 6)
    a, b = normal(6, 3, seed=35).requires_grad_(), normal(3, 3, 4, seed=36).requires_grad_()
    torch.autograd.gradcheck(lambda a, b: dk.grouped_mm(a, b, offsets), (a, b))


def test_grouped_mm_takes_strided_a_and_cotangents():
    offsets = group_offsets([5, 0, 1, 9], 20)
    a, b = normal(16, 20, seed=37).T, strided_b(4, 16, 24, "contiguous", torch.float64)
    cotangent = normal(24, 20, seed=38).T
    found, expected = [], []
    for function, results in ((dk.grouped_mm, found), (reference.grouped_mm, expected)):
        a_, b_ = a.detach().requires_grad_(), b.detach().requires_grad_()
        out = function(a_, b_, offsets)
        results += [out, *torch.autograd.grad(out, (a_, b_), cotangent, retain_graph=True)]
        results += torch.autograd.grad(out.sum(), (a_, b_))  # a stride-0 cotangent
    assert all(error(x, y) < 1e-13 for x, y in zip(found, expected, strict=True))


def test_only_one_argument_needs_a_gradient():
    offsets = group_offsets([2, 0, 3], 6)
    a, b = normal(6, 3, seed=39), normal(3, 3, 4, seed=40)
    for name in ("a", "b"):
        arguments = {"a": a, "b": b, name: {"a": a, "b": b}[name].clone().requires_grad_()}
        dk.grouped_mm(**arguments, offsets=offsets).square().sum().backward()
        leaf = arguments[name]
        expected = {"a": a, "b": b, name: leaf.detach().clone().requires_grad_()}
        reference.grouped_mm(**expected, offsets=offsets).square().sum().backward()
        assert error(leaf.grad, expected[name].grad) < 1e-13


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
def test_rows_beyond_the_last_group_are_ignored(dtype, device):
    offsets = group_offsets([5, 0, 1, 9], 20).to(device)
    a = normal(20, 16, seed=41, dtype=dtype)
    a[15:] = math.nan
    a, b = a.to(device).requires_grad_(), strided_b(4, 16, 24, "transposed", dtype).to(device).requires_grad_()
    out = dk.grouped_mm(a, b, offsets)
    assert torch.isfinite(out).all()
    assert (out[15:] == 0).all()
    cotangent = normal(20, 24, seed=42, dtype=dtype).to(device)
    cotangent[15:] = math.nan
    da, db = torch.autograd.grad(out, (a, b), cotangent)
    assert torch.isfinite(da).all()
    assert (da[15:] == 0).all()
    assert torch.isfinite(db).all()
    assert (db[1] == 0).all(), "an expert without rows"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("nan_filled")
def test_grouped_mm_is_repeatable_and_written_everywhere(device):
    offsets = group_offsets([5, 0, 1, 9], 20).to(device)
    tensors = {"a": normal(20, 16, seed=43).float().to(device), "b": normal(4, 16, 24, seed=44).float().to(device)}
    first = value_and_gradients(lambda a, b: dk.grouped_mm(a, b, offsets), tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(lambda a, b: dk.grouped_mm(a, b, offsets), tensors))


# --- second derivatives ------------------------------------------------------------------------------------------------


@SECOND
@pytest.mark.parametrize("function", ["scatter_tokens", "gather_tokens", "grouped_mm"])
def test_no_wrong_second_derivative(function, how):
    slots, weights, b = some_slots(), normal(3, 2, seed=50), normal(3, 4, 5, seed=51)
    calls = {
        "scatter_tokens": lambda package, x: package.scatter_tokens(x.tanh(), slots),
        "gather_tokens": lambda package, ys: package.gather_tokens(ys.tanh(), slots, weights),
        "grouped_mm": lambda package, a: package.grouped_mm(a.tanh(), b, slots.offsets),
    }
    functions = (lambda leaf, package=package: calls[function](package, leaf) for package in (dk, reference))
    assert_no_wrong_second_derivative(*functions, normal(3 if function == "scatter_tokens" else 6, 4, seed=52), how)


# --- bad inputs --------------------------------------------------------------------------------------------------------

BAD_INDICES = {
    "index above E": torch.tensor([[0, 5]]),
    "negative index": torch.tensor([[0, -1]]),
    "float indices": torch.zeros(2, 2),
    "indices of rank 1": torch.zeros(4, dtype=torch.int64),
}


@pytest.mark.parametrize("indices", BAD_INDICES.values(), ids=BAD_INDICES.keys())
def test_bad_indices(indices):
    with pytest.raises(ValueError, match=r"\bindices\b"):
        dk.dispatch_tokens(indices, 4)


def test_no_experts():
    with pytest.raises(ValueError, match=r"\bnum_experts\b"):
        dk.dispatch_tokens(torch.zeros(2, 2, dtype=torch.int64), 0)


BAD_OFFSETS = {
    "decreasing": [0, 3, 2, 4],
    "above S": [0, 2, 4, 7],
    "negative": [0, -1, 2, 4],
    "negative first": [-1, 0, 2, 4],
}


@pytest.mark.parametrize("function", ["scatter_tokens", "gather_tokens", "grouped_mm"])
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS.keys())
def test_bad_offsets(offsets, function):
    offsets = torch.tensor(offsets, dtype=torch.int32)
    slots = dk.dispatch_tokens(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)
    slots = type(slots)(slots.token, slots.source, offsets)
    call = {
        "scatter_tokens": lambda: dk.scatter_tokens(torch.zeros(3, 4), slots),
        "gather_tokens": lambda: dk.gather_tokens(torch.zeros(6, 4), slots, torch.ones(3, 2)),
        "grouped_mm": lambda: dk.grouped_mm(torch.zeros(6, 4), torch.zeros(3, 4, 5), offsets),
    }[function]
    with pytest.raises(ValueError, match=r"\boffsets\b"):
        call()


def some_slots():
    return dk.dispatch_tokens(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)


def test_too_many_slots():
    many = torch.zeros(1, dtype=torch.int64).expand(2**31)
    with pytest.raises(ValueError, match=r"slots.token is of 2147483648 slots; allowed: fewer than 2\^31"):
        dk.scatter_tokens(torch.zeros(1, 4), dk.Slots(many, many, torch.zeros(4, dtype=torch.int32)))


def test_scatter_needs_a_matrix():
    with pytest.raises(ValueError, match=r"\bx\b"):
        dk.scatter_tokens(torch.zeros(3), some_slots())


def test_scatter_needs_every_token():
    with pytest.raises(ValueError, match=r"\b(x|token)\b"):
        dk.scatter_tokens(torch.zeros(2, 4), some_slots())


def test_gather_needs_a_row_a_slot():
    with pytest.raises(ValueError, match=r"\bys\b"):
        dk.gather_tokens(torch.zeros(5, 4), some_slots(), torch.ones(3, 2))


def test_gather_needs_a_weight_a_slot():
    with pytest.raises(ValueError, match=r"\bweights\b"):
        dk.gather_tokens(torch.zeros(6, 4), some_slots(), torch.ones(3, 3))


OFFSETS = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
BAD_MATRICES = {
    "a of rank 1": (r"\ba\b", torch.zeros(6), torch.zeros(3, 4, 5), OFFSETS),
    "b of rank 2": (r"\bb\b", torch.zeros(6, 4), torch.zeros(4, 5), OFFSETS),
    "unequal inner sizes": (r"\b[ab]\b", torch.zeros(6, 4), torch.zeros(3, 3, 5), OFFSETS),
    "unequal dtypes": (r"dtype", torch.zeros(6, 4), torch.zeros(3, 4, 5, dtype=torch.float64), OFFSETS),
    "too few offsets": (r"\boffsets\b", torch.zeros(6, 4), torch.zeros(3, 4, 5), OFFSETS[:3]),
    "float offsets": (r"\boffsets\b", torch.zeros(6, 4), torch.zeros(3, 4, 5), OFFSETS.float()),
}


@pytest.mark.parametrize(("message", "a", "b", "offsets"), BAD_MATRICES.values(), ids=BAD_MATRICES.keys())
def test_bad_grouped_mm_input(message, a, b, offsets):
    with pytest.raises(ValueError, match=message):
        dk.grouped_mm(a, b, offsets)
