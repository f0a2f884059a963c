"""The Triton kernels of expert_ffn's grouped path and of grouped_mm: interpreted on a CPU, and on a GPU at real sizes."""

import pytest
import torch
from checks import assert_same, compare, error, value_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from shapes import expert_weights, generator, normal, routed_indices, uniform
from test_experts import plain, problem

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, reference
from dotmoe_kernels.experts import activations
from dotmoe_kernels.experts.grouped.operators import grouped_ffn_op, grouped_mm_op

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")
REDUCTIONS = ["rows", "chunks", "dense", "atomics"]
SHAPES = [  # T, E, K, s, H
    (13, 7, 3, 24, 40),
    (9, 37, 9, 8, 64),
    (4, 1, 1, 128, 100),
    (1, 16, 16, 8, 40),
    (3, 148, 37, 8, 40),
    (40, 3, 2, 86, 64),
    (5, 2, 1, 1, 3),
    (150, 2, 1, 86, 136),  # the tile of many rows
]


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


@pytest.fixture
def few_tokens_a_chunk(monkeypatch):
    monkeypatch.setattr("dotmoe_kernels.experts.grouped.gpu.forward.REDUCTION_CHUNK", (5, 16))


def run(tensors, indices, activation="silu", reduction="rows"):
    there = {n: None if t is None else t.to(DEVICE) for n, t in tensors.items()}  # keeps the strides
    with torch.no_grad():
        arguments = (there["x"], there["gate_up_proj"], there["down_proj"], indices.to(DEVICE), there["weights"])
        return grouped_ffn_op(*arguments, activation, reduction).cpu()


def check(tensors, indices, activation="silu", reduction="rows"):
    """error <= 2 error of plain PyTorch in the same dtype + a floor, against float64"""
    exact = plain(indices, activation)(**{n: t.double() for n, t in tensors.items()})
    same = plain(indices, activation)(**tensors)
    found = run(tensors, indices, activation, reduction)
    assert found.dtype == tensors["x"].dtype
    floor = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[found.dtype]
    assert error(found, exact) <= 2 * error(same, exact) + floor
    return found


# --- against the reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), SHAPES)
def test_equals_the_reference(T, E, K, s, H, dtype, nan_filled):
    check(problem(T, E, K, s, H, dtype=dtype), routed_indices(T, K, E, seed=1, empty=0.15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), [(13, 7, 3, 24, 40), (1, 16, 16, 8, 40), (7, 3, 2, 86, 64)])
def test_every_reduction_equals_the_reference(T, E, K, s, H, reduction, dtype, few_tokens_a_chunk, nan_filled):
    check(problem(T, E, K, s, H, dtype=dtype), routed_indices(T, K, E, seed=1, empty=0.15), reduction=reduction)


@pytest.mark.parametrize("activation", sorted(activations.ACTIVATIONS))
def test_activations(activation):
    check(problem(6, 4, 2, 16, 24, dtype=torch.float32), routed_indices(6, 2, 4, seed=2), activation)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("storage", ["[E, H, s]", "[H, E, s]", "[E, s, H]", "every second"])
def test_every_storage_of_the_weights(storage, reduction, few_tokens_a_chunk):
    tensors = problem(9, 5, 2, 8, 24, dtype=torch.float32)
    down = tensors["down_proj"]
    tensors["down_proj"] = {
        "[E, H, s]": down.contiguous(),
        "[H, E, s]": down.transpose(0, 1).contiguous().transpose(0, 1),
        "[E, s, H]": down,
        "every second": torch.stack((down, down + 1), -1)[..., 0],
    }[storage]
    if storage == "every second":
        tensors["gate_up_proj"] = torch.stack([tensors["gate_up_proj"]] * 2, 1)[:, 0]
        tensors["x"] = torch.cat([tensors["x"]] * 2, 1)[:, ::2] + 0 * tensors["x"]
        tensors["x"] = tensors["x"].T.contiguous().T
    check(tensors, routed_indices(9, 2, 5, seed=3), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["all empty", "one expert", "no tokens", "no weights", "int32"])
def test_special_routings(kind, reduction, few_tokens_a_chunk, nan_filled):
    T = 0 if kind == "no tokens" else 11
    tensors, indices = problem(T, 5, 2, 8, 24, dtype=torch.float32), routed_indices(T, 2, 5, seed=4)
    if kind == "all empty":
        assert bool((run(tensors, torch.full((T, 2), 5), reduction=reduction) == 0).all())
    elif kind == "one expert":
        check({**tensors, "weights": tensors["weights"][:, :1]}, torch.full((T, 1), 3), reduction=reduction)
    elif kind == "no tokens":
        assert run(tensors, indices, reduction=reduction).shape == (0, 24)
    elif kind == "no weights":
        unit = run({**tensors, "weights": torch.ones(T, 2)}, indices, reduction=reduction)
        torch.testing.assert_close(run({**tensors, "weights": None}, indices, reduction=reduction), unit)
    else:
        check(tensors, indices.int(), reduction=reduction)


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "unit"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_expert_named_twice(reduction, weighted, few_tokens_a_chunk):
    tensors, indices = problem(7, 4, 3, 8, 16, dtype=torch.float32), torch.randint(0, 5, (7, 3), generator=generator(5))
    assert any(len(set(row)) < 3 for row in indices.tolist())
    if weighted:
        check(tensors, indices, reduction=reduction)
        return
    exact = plain(indices)(**{n: torch.ones(7, 3).double() if n == "weights" else t.double() for n, t in tensors.items()})
    assert error(run(tensors | {"weights": None}, indices, reduction=reduction), exact) < 2e-6


@given(st.integers(1, 20), st.integers(1, 6), st.integers(0, 10**6))
def test_any_routing(T, E, seed):
    with _backend.interpreted():
        indices = torch.randint(0, E + 1, (T, 2), generator=generator(seed))
        check(problem(T, E, 2, 8, 16, dtype=torch.float32), indices)


@pytest.mark.parametrize("reduction", ["rows", "chunks", "dense"])
def test_repeats_bit_for_bit(reduction, few_tokens_a_chunk, nan_filled):
    tensors, indices = problem(12, 6, 3, 24, 40, dtype=torch.float32), routed_indices(12, 3, 6, seed=6, empty=0.1)
    assert torch.equal(run(tensors, indices, reduction=reduction), run(tensors, indices, reduction=reduction))


def test_the_public_function_takes_the_kernels(monkeypatch):
    from dotmoe_kernels.experts.grouped.gpu import forward

    calls = []
    real = forward.grouped_ffn
    monkeypatch.setattr(forward, "grouped_ffn", lambda *a: (calls.append(1), real(*a))[1])
    tensors, indices = problem(8, 5, 2, 8, 16, dtype=torch.float32), routed_indices(8, 2, 5, seed=7).to(DEVICE)
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    found = dk.expert_ffn(**there, indices=indices, path="grouped")
    assert calls == [1]
    assert error(found, plain(indices.cpu())(**tensors)) < 1e-5


# --- grouped_mm -----------------------------------------------------------------------------------------------------------


def offsets_of(sizes, device="cpu"):
    return torch.tensor([0, *sizes], device=device).cumsum(0).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("sizes", "rows", "Kdim", "N"),
    [([3, 0, 7, 1], 15, 24, 40), ([5], 5, 7, 9), ([0, 0], 4, 8, 8), ([40, 70], 110, 100, 130), ([1] * 30, 31, 16, 3)],
    ids=str,
)
def test_grouped_mm_equals_the_reference(sizes, rows, Kdim, N, dtype, nan_filled):
    offsets = offsets_of(sizes)
    a, b = normal(rows, Kdim, seed=8, dtype=dtype), normal(len(sizes), Kdim, N, seed=9, dtype=dtype)
    compare(
        lambda a, b: dk.grouped_mm(a, b, offsets.to(a.device)),
        lambda a, b: reference.grouped_mm(a, b, offsets),
        device=DEVICE,
        a=a,
        b=b,
    )


def test_grouped_mm_of_any_strides():
    offsets = offsets_of([3, 6])
    a, b = normal(20, 11, seed=10, dtype=torch.float32).T, normal(2, 9, 20, seed=11, dtype=torch.float32).transpose(1, 2)
    found = dk.grouped_mm(a.to(DEVICE), b.to(DEVICE), offsets.to(DEVICE)).cpu()
    assert error(found, reference.grouped_mm(a.double(), b.double(), offsets)) < 1e-6
    assert bool((found[9:] == 0).all())


def test_grouped_mm_repeats_bit_for_bit(nan_filled):
    offsets = offsets_of([30, 0, 21], DEVICE)
    tensors = {"a": normal(60, 40, seed=12, dtype=torch.float32), "b": normal(3, 40, 24, seed=13, dtype=torch.float32)}
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    assert_same(*(value_and_gradients(lambda a, b: dk.grouped_mm(a, b, offsets), there) for _ in range(2)))


# --- as operators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [True, False], ids=["weights", "unit"])
def test_opcheck(weighted):
    tensors, indices = problem(6, 4, 2, 8, 16, dtype=torch.float32), routed_indices(6, 2, 4, seed=14).to(DEVICE)
    x, gate_up, down, w = (tensors[n].to(DEVICE) for n in ("x", "gate_up_proj", "down_proj", "weights"))
    torch.library.opcheck(grouped_ffn_op, (x, gate_up, down, indices, w if weighted else None, "silu"))
    torch.library.opcheck(grouped_mm_op, (x, gate_up.transpose(1, 2), offsets_of([1, 0, 3, 1], DEVICE)))


def test_compiles_without_a_break():
    tensors, indices = problem(6, 4, 2, 8, 16, dtype=torch.float32), routed_indices(6, 2, 4, seed=15).to(DEVICE)
    x, gate_up, down, w = (tensors[n].to(DEVICE) for n in ("x", "gate_up_proj", "down_proj", "weights"))

    def function(x):
        return 1 + grouped_ffn_op(2 * x, gate_up, down, indices, w, "silu")

    compiled = torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    torch.testing.assert_close(compiled(x), function(x))


# --- on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("E", "s", "K"), [(112, 128, 28), (148, 128, 37), (8, 1792, 2), (32, 448, 8), (86, 128, 22)])
def test_real_sizes(E, s, K, dtype, reduction):
    T, H = 600, 1024
    check(problem(T, E, K, s, H, dtype=dtype), routed_indices(T, K, E, seed=16, empty=0.05), reduction=reduction)


@pytest.mark.gpu
def test_in_a_graph_and_without_synchronisation():
    gate_up, down = (w.cuda() for w in expert_weights(112, 128, 512, seed=17, dtype=torch.bfloat16))
    x, w = normal(2000, 512, seed=18, dtype=torch.bfloat16).cuda(), uniform(2000, 28, seed=19, dtype=torch.float32).cuda()
    indices = routed_indices(2000, 28, 112, seed=20).cuda()

    def call():
        return dk.expert_ffn(x, gate_up, down, indices, w, path="grouped")

    with torch.no_grad():
        call()  # compiles
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        for seed in (21, 22):
            indices.copy_(routed_indices(2000, 28, 112, seed=seed))
            graph.replay()
            assert torch.equal(y, call())


@pytest.mark.gpu
def test_int64_addresses():
    """Rows, experts and outputs more than 2^31 elements apart."""
    T, E, K, s, H = 70000, 4, 2, 16, 32
    tensors = {n: t.cuda() for n, t in problem(T, E, K, s, H, dtype=torch.bfloat16).items()}
    indices = routed_indices(T, K, E, seed=23).cuda()
    wide = torch.empty(T, 40000, dtype=torch.bfloat16, device="cuda")[:, :H]
    far = torch.empty(E, 2**29 + 2**28, dtype=torch.bfloat16, device="cuda")[:, : 2 * s * H].view(E, 2 * s, H)
    wide.copy_(tensors["x"])
    far.copy_(tensors["gate_up_proj"])
    expected = dk.expert_ffn(**tensors, indices=indices, path="grouped")
    found = dk.expert_ffn(wide, far, tensors["down_proj"], indices, tensors["weights"], path="grouped")
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_more_slots_than_fit_31_bits_of_elements():
    """K T H beyond 2^31: the rows of the down product."""
    T, E, K, s, H = 20000, 32, 28, 16, 4096
    tensors = {n: t.cuda() for n, t in problem(T, E, K, s, H, dtype=torch.bfloat16).items()}
    indices = routed_indices(T, K, E, seed=24).cuda()
    whole = dk.expert_ffn(**tensors, indices=indices, path="grouped", workspace=2**33)
    assert torch.equal(whole, dk.expert_ffn(**tensors, indices=indices, path="grouped"))  # in several parts
    last = {**tensors, "x": tensors["x"][-64:], "weights": tensors["weights"][-64:]}
    assert error(whole[-64:], dk.expert_ffn(**last, indices=indices[-64:], path="grouped").double()) < 1e-2


def test_more_experts_than_a_grid_has():
    a, b, offsets = (torch.zeros(*shape, device=DEVICE) for shape in ((1, 2), (65536, 2, 1), (65537,)))
    with pytest.raises(ValueError, match=r"b is of shape \[65536, 2, 1\]; allowed: at most 65535 experts a call on a GPU"):
        dk.grouped_mm(a, b, offsets.int())
