"""The Triton kernels of dispatch, scatter and gather: interpreted on a CPU, and on a GPU at the sizes of real models."""

import pytest
import torch
from checks import assert_same, compare, value_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from shapes import generator, normal, routed_indices, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels.dispatch import operators
from dotmoe_kernels.experts.grouped.operators import grouped_mm_backward_op, grouped_mm_op

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
SHAPES = [(1, 1, 1), (63, 7, 3), (33, 148, 37), (5, 16, 16), (200, 3, 1), (0, 4, 2)]  # T, E, K


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def slots_of(indices, E):
    return dk.dispatch_tokens(indices.to(DEVICE), E)


def check_sort(indices, E):
    found, expected = slots_of(indices, E), reference.dispatch_tokens(indices, E)
    for name in ("token", "source", "offsets"):
        ours, theirs = getattr(found, name).cpu(), getattr(expected, name)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name


# --- the sort ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_equals_the_stable_sort(T, E, K, dtype):
    check_sort(routed_indices(T, K, E, seed=0, empty=0.2).to(dtype), E)


@pytest.mark.parametrize("kind", ["all empty", "one expert", "last expert", "not contiguous"])
def test_special_routings(kind):
    indices = {
        "all empty": torch.full((40, 3), 5),
        "one expert": torch.full((40, 3), 2),
        "last expert": torch.full((40, 3), 4),
        "not contiguous": routed_indices(80, 4, 5, seed=1)[::2, ::2],
    }[kind]
    check_sort(indices, 5)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10**6))
def test_any_routing_is_sorted_stably(T, E, K, seed):
    with _backend.interpreted():
        indices = torch.randint(0, E + 1, (T, K), generator=generator(seed))
        slots = slots_of(indices, E)
        order = slots.source.cpu()
        assert torch.equal(order.sort().values, torch.arange(T * K)), "a permutation"
        experts = indices.flatten()[order]
        assert bool((experts.diff() >= 0).all()), "sorted"
        assert bool((order.diff()[experts.diff() == 0] > 0).all()), "stable"
        assert torch.equal(slots.offsets.cpu().diff(), torch.bincount(experts, minlength=E + 1)[:E].int())


def test_many_blocks(monkeypatch, request):
    """More pairs than a block has: the counts of earlier blocks move every run."""
    from dotmoe_kernels.dispatch.gpu import sort

    tile, scan, options = _tiles.dispatch_tile(4096, 37)
    monkeypatch.setattr(
        "dotmoe_kernels.dispatch.gpu.sort.dispatch_tile", lambda S, E: ({**tile, "BLOCK_S": 16}, {"BLOCK_B": 4}, options)
    )
    sort._sort_plan.cache_clear()
    request.addfinalizer(sort._sort_plan.cache_clear)
    check_sort(routed_indices(50, 5, 37, seed=2, empty=0.1), 37)


@pytest.mark.parametrize("E", [5, 70000], ids=["kernels", "PyTorch"])
def test_indices_outside_count_as_empty(E):
    """A GPU cannot report them; here the operator is called behind the check."""
    indices = routed_indices(9, 3, 5, seed=36)
    indices[2, 0], indices[4, 1], indices[6, 2] = -1, E + 3, 2**40
    found = operators.sort_slots_op(indices.to(DEVICE), E)
    expected = operators.sort_slots_op(torch.where((indices >= 0) & (indices < E), indices, E).to(DEVICE), E)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("wrong", [[0, 5, 3, 9], [-4, 2, 6, 400], [0, 90, 7, 8]])
def test_wrong_offsets_stay_within_bounds(wrong):
    """They are an error on a CPU; here the operators are called behind the check, on rows between others that nobody may touch."""
    right = torch.tensor(wrong, dtype=torch.int32).clamp(0, 8).cummax(0).values.tolist()
    around = torch.full((24, 16), 7.0, device=DEVICE)
    around[8:16] = normal(8, 16, seed=37).float()
    a, b = around[8:16], normal(3, 16, 8, seed=38, dtype=torch.float32).to(DEVICE)
    offsets = torch.tensor(wrong, dtype=torch.int32, device=DEVICE)
    y = grouped_mm_op(a, b, offsets)
    da, db = grouped_mm_backward_op(torch.ones_like(y), a, b, offsets, True, True)
    for e in range(3):
        rows = slice(right[e], right[e + 1])
        torch.testing.assert_close(y[rows], a[rows] @ b[e])
        torch.testing.assert_close(da[rows], b[e].sum(1).expand_as(da[rows]))
        torch.testing.assert_close(db[e], a[rows].sum(0)[:, None].expand_as(db[e]))


def test_slot_of_is_the_inverse():
    indices = routed_indices(31, 4, 9, seed=3, empty=0.2).to(DEVICE)
    _, source, _, slot_of = operators.sort_slots_op(indices, 9)
    assert torch.equal(source[slot_of.flatten().long()], torch.arange(source.numel(), device=DEVICE))
    assert torch.equal(operators.inverse_op(source), slot_of.flatten())


# --- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("T", "E", "K", "H"), [(13, 7, 3, 24), (9, 37, 20, 70), (1, 1, 1, 5), (6, 4, 4, 600)])
@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "unit"])
def test_scatter_and_gather_equal_the_reference(T, E, K, H, weighted, dtype):
    indices = routed_indices(T, K, E, seed=4, empty=0.2)
    slots, plain = slots_of(indices, E), reference.dispatch_tokens(indices, E)
    x = normal(T, H, seed=5, dtype=dtype)
    compare(lambda x: dk.scatter_tokens(x, slots), lambda x: reference.scatter_tokens(x, move(plain, x)), device=DEVICE, x=x)
    ys, w = normal(T * K, H, seed=6, dtype=dtype), uniform(T, K, seed=7, dtype=dtype)
    if weighted:
        ours = lambda ys, w: dk.gather_tokens(ys, slots, w)  # noqa: E731
        theirs = lambda ys, w: reference.gather_tokens(ys, move(plain, ys), w)  # noqa: E731
        compare(ours, theirs, device=DEVICE, ys=ys, w=w)
    else:
        ones = torch.ones(T, K)
        compare(
            lambda ys: dk.gather_tokens(ys, slots, num_tokens=T),
            lambda ys: reference.gather_tokens(ys, move(plain, ys), ones.to(ys)),
            device=DEVICE,
            ys=ys,
        )


def move(slots, like):
    return type(slots)(*(t.to(like.device) for t in slots))


def test_scatter_then_gather_multiplies_by_k():
    indices = routed_indices(17, 5, 8, seed=8)
    slots, x = slots_of(indices, 8), normal(17, 12, seed=9, dtype=torch.float32).to(DEVICE)
    found = dk.gather_tokens(dk.scatter_tokens(x, slots), slots, num_tokens=17)
    torch.testing.assert_close(found, 5 * x)


def test_slots_made_by_hand():
    """Any permutation with token = source // K does; it need not come from a sort."""
    source = torch.randperm(24, generator=generator(10))
    slots = dk.Slots(source // 4, source, torch.tensor([0, 9, 20], dtype=torch.int32))
    slots = move(slots, torch.empty(0, device=DEVICE))
    x, w = normal(6, 10, seed=11, dtype=torch.float32).to(DEVICE), uniform(6, 4, seed=12, dtype=torch.float32).to(DEVICE)
    xs = dk.scatter_tokens(x, slots)
    torch.testing.assert_close(xs, reference.scatter_tokens(x, slots))
    torch.testing.assert_close(dk.gather_tokens(xs, slots, w), reference.gather_tokens(xs, slots, w))


@pytest.mark.parametrize(("T", "K", "H"), [(0, 3, 4), (5, 0, 4), (0, 0, 4), (3, 2, 0)])
@pytest.mark.usefixtures("nan_filled")
def test_nothing_to_move(T, K, H):
    slots = slots_of(torch.zeros(T, K, dtype=torch.int64), 3)
    x, w = (torch.ones(T, n, device=DEVICE, requires_grad=True) for n in (H, K))
    xs = dk.scatter_tokens(x, slots)
    y = dk.gather_tokens(xs, slots, w)
    assert (xs.shape, y.shape) == ((T * K, H), (T, H))
    gradients = torch.autograd.grad(y.sum(), [x, w])
    assert [g.shape for g in gradients] == [x.shape, w.shape]
    for tensor in (y, *gradients):
        assert not tensor.any()


def test_empty_slots_may_hold_nan(nan_filled):
    indices = routed_indices(11, 3, 5, seed=13, empty=0.4)
    slots, used = slots_of(indices, 5), int((indices < 5).sum())
    x = normal(11, 9, seed=14, dtype=torch.float32).to(DEVICE).requires_grad_()
    xs = dk.scatter_tokens(x, slots)
    assert bool((xs[used:] == 0).all())
    ys = xs.detach().clone()
    ys[used:] = torch.nan
    ys.requires_grad_()
    w = uniform(11, 3, seed=15, dtype=torch.float32).to(DEVICE).requires_grad_()
    gradients = torch.autograd.grad(dk.gather_tokens(ys, slots, w).sum(), [ys, w])
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert bool((gradients[0][used:] == 0).all())
    assert bool((gradients[1][indices.to(DEVICE) == 5] == 0).all())


def test_strided_rows():
    indices = routed_indices(8, 3, 5, seed=16)
    slots = slots_of(indices, 5)
    x = normal(20, 8, seed=17, dtype=torch.float32).to(DEVICE).T  # [8, 20]
    assert torch.equal(dk.scatter_tokens(x, slots), dk.scatter_tokens(x.contiguous(), slots))
    ys = normal(40, 24, seed=18, dtype=torch.float32).to(DEVICE).T
    w = uniform(3, 8, seed=19, dtype=torch.float32).to(DEVICE).T
    assert torch.equal(dk.gather_tokens(ys, slots, w), dk.gather_tokens(ys.contiguous(), slots, w.contiguous()))


def test_repeats_bit_for_bit(nan_filled):
    indices = routed_indices(40, 7, 9, seed=20, empty=0.1)
    slots = slots_of(indices, 9)
    tensors = {"ys": normal(280, 33, seed=21, dtype=torch.float32), "w": uniform(40, 7, seed=22, dtype=torch.float32)}
    there = {name: t.to(DEVICE) for name, t in tensors.items()}
    runs = [value_and_gradients(lambda ys, w: dk.gather_tokens(ys, slots, w), there) for _ in range(2)]
    assert_same(*runs)


# --- as operators --------------------------------------------------------------------------------------------------------


def arguments():
    indices = routed_indices(7, 3, 5, seed=23, empty=0.2).to(DEVICE)
    _, source, offsets, slot_of = operators.sort_slots_op(indices, 5)
    x, ys = (normal(n, 6, seed=24, dtype=torch.float32).to(DEVICE).requires_grad_() for n in (7, 21))
    w = uniform(7, 3, seed=25, dtype=torch.float32).to(DEVICE).requires_grad_()
    return {
        "sort": (operators.sort_slots_op, (indices, 5)),
        "inverse": (operators.inverse_op, (source,)),
        "scatter": (operators.scatter_op, (x, slot_of, offsets)),
        "gather": (operators.gather_op, (ys, w, slot_of, offsets)),
        "gather unit": (operators.gather_op, (ys, None, slot_of, offsets)),
    }


@pytest.mark.parametrize("name", ["sort", "inverse", "scatter", "gather", "gather unit"])
def test_opcheck(name):
    op, inputs = arguments()[name]
    torch.library.opcheck(op, inputs)


def test_compiles_without_a_break():
    indices = routed_indices(7, 3, 5, seed=26, empty=0.2).to(DEVICE)
    x, w = normal(7, 6, seed=27, dtype=torch.float32).to(DEVICE), uniform(7, 3, seed=28, dtype=torch.float32).to(DEVICE)
    _, _, offsets, slot_of = operators.sort_slots_op(indices, 5)

    def function(x, w):
        return operators.gather_op(2 * operators.scatter_op(x, slot_of, offsets), w, slot_of, offsets)

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    tensors = {"x": x, "w": w}
    for name, value in value_and_gradients(compiled, tensors).items():
        torch.testing.assert_close(value, value_and_gradients(function, tensors)[name])


@pytest.mark.parametrize("name", ["scatter", "gather"])
def test_a_second_derivative_is_refused(name):
    op, inputs = arguments()[name]
    first = torch.autograd.grad(op(*inputs).square().sum(), inputs[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(first.square().sum(), inputs[0])


# --- on a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("E", "K"), [(8, 2), (112, 28), (148, 37), (512, 64)])
@pytest.mark.parametrize("T", [1, 16, 512, 65536])
def test_real_sizes(T, E, K):
    indices = torch.rand(T, E, generator=generator(30)).topk(K).indices
    check_sort(indices, E)
    for _ in range(3):  # a race would show as a difference
        check_sort(indices, E)


@pytest.mark.gpu
def test_in_a_graph_and_without_synchronisation():
    indices, x = routed_indices(4096, 28, 112, seed=31).cuda(), normal(4096, 512, seed=32, dtype=torch.bfloat16).cuda()

    def run():
        slots = dk.dispatch_tokens(indices, 112)
        return slots.source, dk.gather_tokens(dk.scatter_tokens(x, slots), slots, num_tokens=4096)

    run()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed in (33, 34):
        indices.copy_(routed_indices(4096, 28, 112, seed=seed))
        graph.replay()
        for found, expected in zip(captured, run(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.gpu
def test_int64_addresses():
    """Rows of more than 2^31 elements in all: 20000 x 4 slots of 32768."""
    T, K, H = 20000, 4, 32768
    slots = dk.dispatch_tokens(routed_indices(T, K, 16, seed=35).cuda(), 16)
    x = torch.arange(T, device="cuda", dtype=torch.float32)[:, None].expand(T, H).to(torch.bfloat16)
    xs = dk.scatter_tokens(x, slots)
    assert torch.equal(xs[:, 0], x[slots.token, 0])
    assert torch.equal(xs[:, -1], x[slots.token, -1])
    torch.testing.assert_close(dk.gather_tokens(xs, slots, num_tokens=T)[:, -1], (4 * x[:, -1].float()).to(torch.bfloat16))
    weights = torch.ones(K, 2**30, device="cuda", dtype=torch.bfloat16)[:, :T].T  # of a token 2^30 elements apart: 8 GB
    ys = xs.requires_grad_()
    weights.requires_grad_()
    y = dk.gather_tokens(ys, slots, weights)
    torch.testing.assert_close(y[:, -1], (4 * x[:, -1].float()).to(torch.bfloat16))
    (dys,) = torch.autograd.grad(y, ys, torch.ones_like(y))
    assert bool((dys[:, -1] == 1).all())
