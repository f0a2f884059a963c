"""The Triton kernels of expert_ffn's training pass: interpreted on a CPU, and on a GPU at real sizes."""

import pytest
import torch
from checks import SECOND, assert_same, compare, error, second_derivative, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import generator, normal, routed_indices
from test_experts import eager_experts, plain, problem
from test_experts_training import saved_elements

import dotmoe_kernels as dk
from dotmoe_kernels import _backend
from dotmoe_kernels.dispatch.operators import sort_slots_op
from dotmoe_kernels.experts import activations
from dotmoe_kernels.experts.training.operators import grouped_ffn_backward_op, grouped_ffn_training_op

if _backend.HAS_TRITON:
    from dotmoe_kernels.experts.grouped.gpu import forward as kernels_forward
    from dotmoe_kernels.experts.training import gpu as kernels

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
FLOORS = {torch.bfloat16: None if HAS_GPU else 1.6e-2}  # the interpreter cuts bfloat16 off instead of rounding it
RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
NAMES = ("x", "gate_up_proj", "down_proj", "weights")
SHAPES = [  # T, E, K, s, H
    (13, 7, 3, 13, 24),
    (2, 12, 9, 8, 70),
    (4, 1, 1, 40, 20),
    (1, 6, 6, 8, 24),
    (20, 2, 1, 136, 16),
    (5, 2, 1, 1, 3),
    (150, 2, 1, 40, 136),  # the tile of many rows
]


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def ours(indices, **options):
    def function(x, gate_up_proj, down_proj, weights=None):
        return dk.expert_ffn(x, gate_up_proj, down_proj, indices.to(x.device), weights, path="grouped", **options)

    return function


def on_device(tensors):
    return {n: t.to(DEVICE) for n, t in tensors.items()}  # keeps the strides


def leaves_of(tensors, wanted=NAMES):
    return {n: t.detach().clone().to(DEVICE).requires_grad_(n in wanted) for n, t in tensors.items()}


def small(dtype=torch.float32, H=24):
    """Three tokens, three experts, two a token, one slot empty."""
    return problem(3, 3, 2, 13, H, seed=70, dtype=dtype), torch.tensor([[2, 0], [1, 3], [0, 2]])


# --- against the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("T", "E", "K", "s", "H", "dtype"),
    [(*shape, torch.float32) for shape in SHAPES] + [(*shape, t) for t in (torch.float16, torch.bfloat16) for shape in SHAPES[::4]],
    ids=str,
)
def test_equals_the_reference(T, E, K, s, H, dtype, nan_filled):
    indices = routed_indices(T, K, E, seed=1, empty=0.15)
    tensors = problem(T, E, K, s, H, dtype=dtype)
    compare(ours(indices), plain(indices), device=DEVICE, floor=FLOORS.get(dtype), **tensors)


@pytest.mark.parametrize("activation", sorted(activations.ACTIVATIONS))
def test_activations(activation):
    indices, tensors = torch.zeros(4, 1, dtype=torch.int64), problem(4, 1, 1, 8, 16, seed=75, dtype=torch.float32)
    compare(ours(indices, activation=activation), plain(indices, activation), device=DEVICE, **tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_routing_weights_of_another_dtype(dtype):
    """Wide experts too, whose parts of a weight's gradient are added up in float32."""
    indices, tensors = routed_indices(4, 2, 2, seed=2), problem(4, 2, 2, 140, 16, seed=72, dtype=torch.float16)
    tensors["weights"] = tensors["weights"].to(dtype)
    compare(ours(indices), plain(indices), device=DEVICE, floor=FLOORS.get(dtype), **tensors)


@pytest.mark.parametrize("kind", ["an expert twice", "idle experts", "all empty", "no tokens", "int32"])
def test_special_routings(kind, nan_filled):
    T = 0 if kind == "no tokens" else 4
    tensors = problem(T, 4, 3, 8, 12, seed=73, dtype=torch.float32)
    indices = {
        "an expert twice": torch.tensor([[2, 2, 0], [1, 1, 1], [3, 4, 3], [4, 4, 4]]),  # 4 is empty
        "idle experts": torch.tensor([[1, 4, 3]] * 4),
        "all empty": torch.full((4, 3), 4),
        "no tokens": torch.zeros(0, 3, dtype=torch.int64),
        "int32": routed_indices(4, 3, 4, seed=3).int(),
    }[kind]
    if kind in ("all empty", "no tokens"):
        results = value_and_gradients(ours(indices), on_device(tensors))
        assert all((value == 0).all() for value in results.values())
        assert results["output 0"].shape == (T, 12)
    else:
        compare(ours(indices), plain(indices), device=DEVICE, **tensors)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6))
@settings(max_examples=3)
def test_any_routing(T, E, seed):
    with _backend.interpreted():
        indices = torch.randint(0, E + 1, (T, 2), generator=generator(seed))
        compare(ours(indices), plain(indices), device=DEVICE, **problem(T, E, 2, 8, 16, dtype=torch.float32))


def test_transformers_eager_experts_agree():
    tensors, indices = small()

    def eager(x, gate_up_proj, down_proj, weights):
        module = eager_experts("Qwen3Moe", {"x": x, "gate_up_proj": gate_up_proj, "down_proj": down_proj}, "silu").to(x.device)
        parameters = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        return torch.func.functional_call(module, parameters, (x, indices.to(x.device), weights))

    compare(ours(indices), eager, device=DEVICE, **tensors)


def test_no_weights_are_unit_weights(nan_filled):
    tensors, indices = small()
    ones = torch.ones(3, 2, device=DEVICE)
    del tensors["weights"]
    unit = value_and_gradients(lambda **t: ours(indices)(**t, weights=ones), on_device(tensors))
    assert_same(value_and_gradients(ours(indices), on_device(tensors)), unit)


# --- storage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["[E, H, s]", "[H, E, s]", "every second"])
def test_every_storage(storage, together):
    """Leaves of any strides; the gradient of dense ones has the same."""
    tensors, indices = small()
    there = leaves_of(tensors)
    leaves = dict(there)
    down = there["down_proj"].detach()
    if storage == "[E, H, s]":
        leaves["down_proj"] = down.contiguous().requires_grad_()
    elif storage == "[H, E, s]":
        leaves["down_proj"] = down.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    else:
        leaves = {n: torch.stack((t.detach(), t.detach() + 1), -1)[..., 0].requires_grad_() for n, t in there.items()}
        leaves["x"] = there["x"].detach().T.contiguous().T.requires_grad_()
        assert not any(t.is_contiguous() for t in leaves.values())
    y = ours(indices)(**leaves)
    cotangent = torch.randn(y.shape, generator=generator(100), dtype=torch.float64).to(torch.bfloat16).float().to(DEVICE)
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert error(gradient, together[f"gradient of {name}"].double()) < 1e-6
        if name.endswith("proj") and storage != "every second":
            assert gradient.stride() == leaf.stride()


@pytest.mark.parametrize("kind", ["transposed", "every second", "expanded"])
def test_a_gradient_of_any_strides(kind):
    tensors, indices = small()
    leaves = leaves_of(tensors)
    dy = normal(3, 24, seed=74, dtype=torch.float32).to(DEVICE)
    if kind == "expanded":
        dy = dy[:1, :1].expand(3, 24)
    strided = {
        "transposed": dy.T.contiguous().T,
        "every second": torch.stack((dy, dy), -1)[..., 0],
        "expanded": dy,
    }[kind]
    assert not strided.is_contiguous()
    y = ours(indices)(**leaves)
    found = torch.autograd.grad(y, list(leaves.values()), strided, retain_graph=True)
    expected = torch.autograd.grad(y, list(leaves.values()), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- which gradients ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def together():
    """All the gradients of ``small``."""
    tensors, indices = small()
    with _backend.interpreted():
        return value_and_gradients(ours(indices), on_device(tensors))


@pytest.mark.parametrize(
    ("wanted", "recompute"),
    [
        (("x",), False),
        (("gate_up_proj",), True),
        (("down_proj",), False),
        (("weights",), True),
        (("x", "weights"), False),
        (("gate_up_proj", "down_proj"), False),
    ],
    ids=str,
)
def test_only_what_is_wanted(wanted, recompute, together, monkeypatch, nan_filled):
    """Each gradient alone is bit for bit that of all together; frozen weights cost no weight gradient, and x none of its own."""
    tensors, indices = small()
    leaves = leaves_of(tensors, wanted)
    calls = []

    def counted(name):
        real = getattr(kernels, name)
        return lambda *a, **o: (calls.append(name), real(*a, **o))[1]

    y = ours(indices, recompute=recompute)(**leaves)
    for name in ("hidden_backward", "weight_gradient", "token_sums", "up_product"):
        monkeypatch.setattr(kernels, name, counted(name))
    cotangent = torch.randn(y.shape, generator=generator(100), dtype=torch.float64).to(torch.bfloat16).float().to(DEVICE)
    gradients = torch.autograd.grad(y, [leaves[n] for n in wanted], cotangent)
    for name, gradient in zip(wanted, gradients, strict=True):
        assert torch.equal(gradient, together[f"gradient of {name}"]), name
    assert calls.count("hidden_backward") == 1
    assert calls.count("weight_gradient") == sum(n.endswith("proj") for n in wanted)
    assert calls.count("token_sums") == wanted.count("x")
    assert calls.count("up_product") == recompute


def test_the_product_is_left_out_where_only_down_proj_learns(monkeypatch):
    """Its gradient needs w h and dy alone: an infinite down_proj would show."""
    tensors, indices = small()
    leaves = leaves_of(tensors, ("down_proj",))
    y = ours(indices)(**leaves)
    leaves["down_proj"].data.fill_(torch.inf)
    gradient = torch.autograd.grad(y.sum(), leaves["down_proj"])[0]
    assert torch.isfinite(gradient).all()


def test_gradients_add_up():
    tensors, indices = small()
    leaves = leaves_of(tensors)
    first = torch.autograd.grad(ours(indices)(**leaves).sum(), list(leaves.values()))
    assert all(leaf.grad is None for leaf in leaves.values())
    for _ in range(2):
        ours(indices)(**leaves).sum().backward()
    for leaf, gradient in zip(leaves.values(), first, strict=True):
        assert torch.equal(leaf.grad, 2 * gradient)


def test_two_backward_passes_over_one_graph():
    tensors, indices = small()
    leaves = leaves_of(tensors)
    y = ours(indices)(**leaves)
    once = torch.autograd.grad(y.square().sum(), list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@SECOND
def test_a_second_derivative_is_refused(how):
    tensors, indices = small()
    x = tensors.pop("x").to(DEVICE)
    there = leaves_of(tensors)
    with pytest.raises(RuntimeError, match="expert_ffn has no second derivative"):
        second_derivative(lambda x: ours(indices)(x, **there), x, how)


# --- memory -------------------------------------------------------------------------------------------------------------


def test_what_is_kept():
    T, E, K, s, H = 16, 4, 3, 8, 24
    S, indices, tensors = T * K, routed_indices(T, K, E, seed=1), problem(T, E, K, s, H, dtype=torch.float32)
    routing = 3 * S + (E + 1)  # token, source, slot_of and offsets
    x, z, weights = T * H, S * 2 * s, T * K
    assert saved_elements(ours(indices), on_device(tensors)) == (x + z + weights, routing)
    assert saved_elements(ours(indices, recompute=True), on_device(tensors)) == (x + weights, routing)
    frozen = {n: tensors.pop(n).to(DEVICE) for n in ("gate_up_proj", "down_proj")}  # counted, since no leaf is known
    without_x = frozen["gate_up_proj"].numel() + frozen["down_proj"].numel() + z + weights
    assert saved_elements(lambda **t: ours(indices)(**t, **frozen), on_device(tensors), ()) == (without_x, routing)


def test_the_workspace_bounds_the_rows_and_changes_no_bit(monkeypatch, nan_filled):
    H = 300
    tensors, indices = small(H=H)
    S, sizes, real = 6, [], kernels_forward.grouped_product

    def measured(*arguments, **options):
        rows = real(*arguments, **options)
        sizes.append(rows.numel() * rows.element_size())
        return rows

    monkeypatch.setattr(kernels_forward, "grouped_product", measured)
    whole = value_and_gradients(ours(indices), on_device(tensors))
    assert sizes == [4 * S * H] * 2  # y, dx
    sizes.clear()
    assert_same(value_and_gradients(ours(indices, workspace=1), on_device(tensors)), whole)
    assert sizes == [4 * S * columns for columns in (128, 128, 44)] * 2
    with torch.no_grad():
        sizes.clear()
        assert torch.equal(ours(indices, workspace=1)(**on_device(tensors)), whole["output 0"])
        assert max(sizes) == 4 * S * 128


@pytest.mark.parametrize("H", [1, 127, 128, 129, 300, 4096])
def test_parts_are_even_and_within_the_workspace(H):
    S = 10
    for workspace in (1, 4 * S * 128, 4 * S * 1000, 4 * S * H):
        columns = kernels_forward.part_of(H, 4 * S, workspace)
        assert columns % 128 == 0
        assert columns == 128 or 4 * S * columns <= workspace
        parts = -(-H // columns)
        fewer = columns + 128  # were the workspace larger by so little, no part would be saved
        assert 4 * S * fewer > workspace or -(-H // fewer) == parts


# --- as promised --------------------------------------------------------------------------------------------------------


@RECOMPUTE
def test_repeats_bit_for_bit(recompute, together, nan_filled):
    tensors, indices = small()
    assert_same(value_and_gradients(ours(indices, recompute=recompute), on_device(tensors)), together)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "unit"])
def test_opcheck(weighted):
    tensors, indices = problem(2, 2, 1, 8, 16, dtype=torch.float32), torch.tensor([[1], [0]], device=DEVICE)
    x, gate_up, down, w = (tensors[n].to(DEVICE) for n in NAMES)
    w = w if weighted else None
    token, source, offsets, slot_of = sort_slots_op(indices, 2)
    slots = token.int(), source.int(), offsets, slot_of
    torch.library.opcheck(grouped_ffn_training_op, (x, gate_up, down, w, slots[0], offsets, slot_of, "silu", weighted, None))
    _, z = grouped_ffn_training_op(x, gate_up, down, w, slots[0], offsets, slot_of, "silu", True, None)
    if weighted:
        arguments = (x, x, gate_up, down, w, *slots, z, "silu", True, True, True, True, None)
    else:
        arguments = (x, None, gate_up, down, w, *slots, z, "silu", True, False, False, False, 64)
    torch.library.opcheck(grouped_ffn_backward_op, arguments)


def test_compiles_without_a_break():
    tensors, indices = small()
    leaves, there = leaves_of(tensors), indices.to(DEVICE)

    def function(x, gate_up_proj, down_proj, weights):
        return 1 + dk.experts.training.training_ffn(2 * x, gate_up_proj, down_proj, there, weights, "silu")

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    expected, found = (f(**leaves) for f in (function, compiled))
    torch.testing.assert_close(found, expected)
    expected, found = (torch.autograd.grad(y.square().sum(), list(leaves.values())) for y in (expected, found))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("E", "s", "K", "H", "dtype"),
    [
        (112, 128, 28, 4096, torch.bfloat16),
        (112, 128, 28, 4096, torch.float16),
        (148, 128, 37, 1024, torch.bfloat16),
        (8, 1792, 2, 1024, torch.bfloat16),
        (32, 448, 8, 1024, torch.float16),
        (112, 128, 28, 512, torch.float32),
    ],
    ids=str,
)
def test_real_sizes(E, s, K, H, dtype):
    T = 2048
    indices, tensors = routed_indices(T, K, E, seed=16, empty=0.05).cuda(), on_device(problem(T, E, K, s, H, dtype=dtype))
    compare(ours(indices), plain(indices), device=DEVICE, **tensors)


@pytest.mark.gpu
def test_repeats_bit_for_bit_at_a_real_size(nan_filled):
    indices, tensors = (
        routed_indices(2048, 28, 112, seed=25).cuda(),
        on_device(problem(2048, 112, 28, 128, 1024, dtype=torch.bfloat16)),
    )
    first, second = (value_and_gradients(ours(indices), tensors) for _ in range(2))
    assert_same(first, second)
    assert_same(first, value_and_gradients(ours(indices, workspace=1), tensors))
    assert_same(first, value_and_gradients(ours(indices, recompute=True), tensors))


@pytest.mark.gpu
def test_in_a_graph_and_without_synchronisation():
    leaves = leaves_of(problem(2048, 112, 28, 128, 512, seed=26, dtype=torch.bfloat16))
    indices, dy = routed_indices(2048, 28, 112, seed=27).cuda(), normal(2048, 512, seed=28, dtype=torch.bfloat16).cuda()

    def step():
        y = ours(indices)(**leaves)
        return y, *torch.autograd.grad(y, list(leaves.values()), dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (29, 30):
        indices.copy_(routed_indices(2048, 28, 112, seed=seed, empty=0.1))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_int64_addresses():
    """Rows of x and dy, and experts, more than 2^31 elements apart."""
    T, E, K, s, H = 70000, 4, 2, 16, 32
    tensors = on_device(problem(T, E, K, s, H, dtype=torch.bfloat16))
    indices, dy = routed_indices(T, K, E, seed=23).cuda(), normal(T, H, seed=31, dtype=torch.bfloat16).cuda()
    far = {
        "x": torch.empty(T, 40000, dtype=torch.bfloat16, device="cuda")[:, :H],
        "gate_up_proj": torch.empty(E, 2**29 + 2**28, dtype=torch.bfloat16, device="cuda")[:, : 2 * s * H].view(E, 2 * s, H),
        "down_proj": torch.empty(E, 2**29 + 2**28, dtype=torch.bfloat16, device="cuda")[:, : s * H].view(E, s, H).transpose(1, 2),
    }
    for name, tensor in far.items():
        tensor.copy_(tensors[name])
    wide = torch.empty(T, 40000, dtype=torch.bfloat16, device="cuda")[:, :H].copy_(dy)

    def gradients(leaves, cotangent):
        leaves = [t.detach().requires_grad_() for t in leaves.values()]
        return torch.autograd.grad(dk.expert_ffn(*leaves[:3], indices, leaves[3], path="grouped"), leaves, cotangent)

    expected = gradients(tensors, dy)
    found = gradients({**far, "weights": tensors["weights"]}, wide)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
def test_more_slots_than_fit_31_bits_of_elements():
    """K T H and K T 2s beyond 2^31, in one part and in several."""
    T, E, K, s, H = 20000, 4, 28, 2048, 4096
    tensors = on_device(problem(T, E, K, s, H, dtype=torch.bfloat16))
    indices, dy = (
        torch.randint(0, E + 1, (T, K), generator=generator(24)).cuda(),
        normal(T, H, seed=32, dtype=torch.bfloat16).cuda(),
    )

    def gradients(rows, **options):
        x, weights = (tensors[n][rows].detach().requires_grad_() for n in ("x", "weights"))
        y = dk.expert_ffn(x, tensors["gate_up_proj"], tensors["down_proj"], indices[rows], weights, path="grouped", **options)
        return torch.autograd.grad(y, (x, weights), dy[rows])

    last = slice(-64, None)
    expected = gradients(last)
    for options in ({"workspace": 2**33}, {}):
        for found, exact in zip(gradients(slice(None), **options), expected, strict=True):
            assert error(found[last], exact.double()) < 1e-2
