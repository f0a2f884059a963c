"""The Triton kernels of expert_ffn's decode path: interpreted on a CPU, and on a GPU at the sizes of real models."""

from types import SimpleNamespace

import pytest
import torch
from checks import compare, error
from shapes import generator, normal, routed_indices, uniform
from test_experts import plain, problem

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles
from dotmoe_kernels.experts import activations
from dotmoe_kernels.experts.decode.operators import decode_op

if _backend.HAS_TRITON:
    from dotmoe_kernels._backend import product_options

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted(), torch.no_grad():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def decode(tensors, indices, weights=..., activation="silu"):
    there = {n: t.to(DEVICE) for n, t in tensors.items()}  # keeps the strides
    w = there["weights"] if weights is ... else weights
    return decode_op(there["x"], there["gate_up_proj"], there["down_proj"], indices.to(DEVICE), w, activation).cpu()


def check(tensors, indices, activation="silu", floor=None):
    """error <= 2 error of plain PyTorch in the same dtype + a floor, against float64"""
    exact = plain(indices, activation)(**{n: t.double() for n, t in tensors.items()})
    same = plain(indices, activation)(**tensors)
    found = decode(tensors, indices, activation=activation)
    assert found.dtype == tensors["x"].dtype
    floor = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[found.dtype] if floor is None else floor
    assert error(found, exact) <= 2 * error(same, exact) + floor
    return found


# --- against the reference ---------------------------------------------------------------------------------------------

SHAPES = [  # T, E, K, s, H
    (1, 7, 3, 24, 40),
    (1, 112, 28, 8, 64),
    (1, 1, 1, 128, 100),
    (1, 148, 37, 8, 40),
    (2, 7, 2, 86, 100),
    (3, 148, 37, 8, 40),
    (16, 7, 7, 24, 64),
    (16, 112, 5, 8, 40),
    (16, 1, 1, 86, 64),
    (40, 7, 3, 8, 40),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), SHAPES)
def test_equals_the_reference(T, E, K, s, H, dtype):
    check(problem(T, E, K, s, H, seed=T, dtype=dtype), routed_indices(T, K, E, seed=1, empty=0.2))


@pytest.mark.parametrize("T", [1, 3])
def test_through_the_public_function(T):
    indices, tensors = routed_indices(T, 3, 7, seed=2), problem(T, 7, 3, 8, 40, seed=10, dtype=torch.float32)
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    for weights in (there["weights"], None):
        found = dk.expert_ffn(there["x"], there["gate_up_proj"], there["down_proj"], indices.to(DEVICE), weights, path="decode")
        expected = decode(tensors, indices, weights)
        assert torch.equal(found.cpu(), expected), "not by the kernels"


@pytest.mark.parametrize("T", [1, 3])
def test_with_a_gradient_it_is_the_grouped_path(T):
    indices, tensors = routed_indices(T, 3, 7, seed=2), problem(T, 7, 3, 8, 24, seed=11, dtype=torch.float32)

    def ours(**t):
        return dk.expert_ffn(t["x"], t["gate_up_proj"], t["down_proj"], indices.to(t["x"].device), t["weights"], path="decode")

    with torch.enable_grad():
        compare(ours, plain(indices), device=DEVICE, **tensors)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("activation", sorted(activations.ACTIVATIONS))
def test_activations(activation, T):
    indices, tensors = routed_indices(T, 2, 3, seed=3), problem(T, 3, 2, 8, 16, seed=20, dtype=torch.float32)
    tensors["gate_up_proj"] *= 3  # where they bend
    check(tensors, indices, activation)


def test_more_tokens_than_a_tile_holds():
    T = 2 * _tiles.MOST_DECODE_TOKENS + 1
    check(problem(T, 4, 2, 8, 24, seed=21, dtype=torch.float32), routed_indices(T, 2, 4, seed=4))


@pytest.mark.parametrize("kind", ["int32", "of a wider tensor", "transposed"])
def test_indices_and_weights_of_any_kind(kind):
    tensors, indices = problem(3, 7, 4, 8, 24, seed=22, dtype=torch.float32), routed_indices(3, 4, 7, seed=5)
    expected = decode(tensors, indices)
    if kind == "int32":
        assert torch.equal(decode(tensors, indices.int()), expected)
        return
    if kind == "transposed":
        indices, tensors["weights"] = indices.T.contiguous().T, tensors["weights"].T.contiguous().T
    else:
        indices = torch.zeros(6, 9, dtype=torch.int64)[::2, 1:9:2].copy_(indices)
        tensors["weights"] = torch.zeros(6, 9)[::2, 1:9:2].copy_(tensors["weights"])
    assert torch.equal(decode(tensors, indices), expected)


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def test_weights_in_a_dtype_of_their_own(dtype, T):
    tensors, indices = problem(T, 7, 4, 8, 24, seed=23, dtype=torch.float16), routed_indices(T, 4, 7, seed=6)
    tensors["weights"] = uniform(T, 4, seed=24, dtype=dtype)
    check(tensors, indices, floor=5e-4)


@pytest.mark.parametrize("T", [1, 2])
def test_no_weights_are_unit_weights(T):
    tensors, indices = problem(T, 7, 4, 8, 24, seed=25, dtype=torch.float32), routed_indices(T, 4, 7, seed=7, empty=0.3)
    assert torch.equal(decode(tensors, indices, None), decode(tensors | {"weights": torch.ones(T, 4)}, indices))


# --- layouts -----------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "[E, s, H]": lambda d: d.transpose(1, 2).contiguous().transpose(1, 2),
    "[H, E, s]": lambda d: d.transpose(0, 1).contiguous().transpose(0, 1),
    "[E, H, s]": lambda d: d.contiguous(),
    "every other": lambda d: d.new_full([2 * n for n in d.shape], torch.nan)[::2, ::2, ::2].copy_(d),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 3])
def test_any_storage(T, layout):
    tensors, indices = problem(T, 7, 3, 24, 100, seed=30, dtype=torch.float16), routed_indices(T, 3, 7, seed=8)
    expected = decode(tensors, indices)
    tensors["down_proj"] = LAYOUTS[layout](tensors["down_proj"])
    assert torch.equal(decode(tensors, indices), expected)
    tensors["gate_up_proj"] = LAYOUTS[layout](tensors["gate_up_proj"])
    tensors["x"] = torch.full((2 * T, 200), torch.nan, dtype=torch.float16)[::2, ::2].copy_(tensors["x"])
    assert torch.equal(decode(tensors, indices), expected)


# --- slots that are empty or repeated ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
@pytest.mark.parametrize("rows", [[[1, 1, 4]], [[1, 1, 4], [0, 2, 0], [3, 3, 3], [4, 4, 4]]], ids=["one token", "four"])
def test_an_expert_named_twice_counts_twice(rows, weighted):
    tensors = problem(len(rows), 4, 3, 8, 24, seed=40, dtype=torch.float32)
    if not weighted:
        tensors["weights"].fill_(1)
    found = check(tensors, torch.tensor(rows))
    if not weighted:
        assert torch.equal(found, decode(tensors, torch.tensor(rows), None))


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("T", [1, 3])
def test_only_empty_slots(T):
    tensors = problem(T, 6, 2, 8, 24, seed=41, dtype=torch.float32)
    assert (decode(tensors, torch.full((T, 2), 6)) == 0).all()


@pytest.mark.parametrize("T", [1, 3])
def test_weights_of_experts_that_nobody_chose_are_not_used(T):
    tensors, indices = problem(T, 9, 2, 8, 24, seed=42, dtype=torch.float32), routed_indices(T, 2, 9, seed=9)
    expected = decode(tensors, indices)
    unused = torch.tensor([e for e in range(9) if not (indices == e).any()])
    for name in ("gate_up_proj", "down_proj"):
        tensors[name] = tensors[name].clone()
        tensors[name][unused] = torch.nan
    assert torch.equal(decode(tensors, indices), expected)


def test_a_token_does_not_leak_into_another():
    tensors, indices = problem(3, 5, 2, 8, 24, seed=43, dtype=torch.float32), torch.tensor([[0, 1], [2, 1], [0, 4]])
    expected = decode(tensors, indices)
    tensors["x"][1] = torch.inf
    found = decode(tensors, indices)
    assert torch.equal(found[[0, 2]], expected[[0, 2]])
    assert not found[1].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 2), (3, 4, 0)], ids=["no tokens", "no slots"])
def test_nothing_to_do(shape):
    T, E, K = shape
    tensors = problem(T, E, K, 8, 24, seed=44, dtype=torch.float32)
    found = decode(tensors, torch.zeros(T, K, dtype=torch.int64))
    assert found.shape == (T, 24)
    assert (found == 0).all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(T):
    tensors, indices = problem(T, 7, 3, 86, 100, seed=45, dtype=torch.float16), routed_indices(T, 3, 7, seed=10, empty=0.3)
    before = {n: t.clone() for n, t in tensors.items()}
    first = decode(tensors, indices)
    assert first.isfinite().all()
    assert torch.equal(first, decode(tensors, indices))
    assert all(torch.equal(before[n], t) for n, t in tensors.items())


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("E", [5, 9], ids=["a program an expert", "a program a pair"])
def test_indices_beyond_the_experts_count_as_empty(E):
    """What a GPU tensor may hold, since it is not checked."""
    tensors = problem(2, E, 3, 8, 24, seed=46, dtype=torch.float32)
    assert torch.equal(
        decode(tensors, torch.tensor([[-1, 2, 99], [3, 2**32, 1]])), decode(tensors, torch.tensor([[E, 2, E], [3, E, 1]]))
    )


def test_float32_multiplies_as_pytorch_is_told_to():
    """By either of its settings: each refuses to be read after the other."""
    on_a_gpu, matmul = SimpleNamespace(dtype=torch.float32, device=torch.device("cuda")), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            matmul.fp32_precision = precision
            assert product_options(on_a_gpu)["PRECISION"] == precision
        matmul.fp32_precision = before
        for allowed in (True, False):
            matmul.allow_tf32 = allowed
            assert product_options(on_a_gpu)["PRECISION"] == ("tf32" if allowed else "ieee")
    finally:
        matmul.fp32_precision = before


def test_float64_takes_the_other_implementation():
    tensors, indices = problem(3, 5, 2, 8, 24, seed=47), routed_indices(3, 2, 5, seed=11)
    there = {n: t.to(DEVICE) for n, t in tensors.items()}
    found = dk.expert_ffn(
        there["x"], there["gate_up_proj"], there["down_proj"], indices.to(DEVICE), there["weights"], path="decode"
    )
    assert error(found, plain(indices)(**tensors)) < 1e-12


# --- as an operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True], ids=["unit", "weighted"])
@pytest.mark.parametrize("T", [1, 3])
def test_opcheck(T, weighted):
    tensors, indices = problem(T, 4, 2, 8, 16, seed=50, dtype=torch.float32), routed_indices(T, 2, 4, seed=12)
    x, gate_up, down, weights = (t.to(DEVICE) for t in tensors.values())
    torch.library.opcheck(decode_op, (x, gate_up, down, indices.to(DEVICE), weights if weighted else None, "silu"))


def test_compiles_into_one_graph():
    tensors, indices = problem(3, 4, 2, 8, 16, seed=51, dtype=torch.float32), routed_indices(3, 2, 4, seed=13).to(DEVICE)
    there = [t.to(DEVICE) for t in tensors.values()]

    def function(x, gate_up_proj, down_proj, weights):
        if HAS_GPU:  # the values of CPU tensors are checked, which breaks a graph
            return dk.expert_ffn(x * 2, gate_up_proj, down_proj, indices, weights, path="decode") + 1
        return decode_op(x * 2, gate_up_proj, down_proj, indices, weights, "silu") + 1

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")
    torch.testing.assert_close(compiled(*there), function(*there))


# --- tiles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "hip"])
@pytest.mark.parametrize(("E", "s"), [(112, 128), (148, 128), (8, 1792), (512, 64), (1, 4096), (3, 7)])
def test_every_size_has_a_tile(E, s, backend):
    for T in (1, 2, 16, 17, 64):
        for K in {1, max(1, E // 4), E}:
            for H in (40, 4096, 8192):
                tile = _tiles.decode_tile(T, H, E, s, K, 2, backend)
                sizes = [v for t in (tile.up, tile.down) for n, v in t.items() if n.startswith("BLOCK")]
                assert all(n > 0 and n & (n - 1) == 0 for n in [*sizes, tile.splits])
                assert tile.up["BLOCK_T"] >= T
                assert tile.up["BLOCK_E"] >= E
                assert tile.splits <= 16


# --- on a GPU ----------------------------------------------------------------------------------------------------------

REAL = {
    "L3": (112, 28, 128, 4096),
    "Q25": (148, 37, 128, 3584),
    "coarse": (8, 2, 1792, 4096),
    "mid": (32, 8, 448, 4096),
}  # E, K, s, H


def on_gpu(T, E, K, s, H, dtype=torch.bfloat16):
    tensors = {n: t.cuda() for n, t in problem(T, E, K, s, H, seed=60, dtype=dtype).items()}
    return tensors, routed_indices(T, K, E, seed=14).cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("shape", REAL)
def test_real_sizes(shape, T, dtype):
    tensors, indices = on_gpu(T, *REAL[shape], dtype=dtype)
    found = decode(tensors, indices)
    x, gate_up, down, weights = tensors.values()
    exact = torch.zeros(T, x.shape[1], dtype=torch.float64, device="cuda")
    for e in range(len(gate_up)):
        w = (weights * (indices == e)).sum(1).double()
        gate, up = (x.double() @ gate_up[e].double().T).chunk(2, 1)
        exact += w[:, None] * ((torch.nn.functional.silu(gate) * up) @ down[e].double().T)
    assert error(found, exact) < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert torch.equal(found, decode(tensors, indices))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["[E, s, H]", "[H, E, s]", "[E, H, s]"])
@pytest.mark.parametrize("T", [1, 4])
def test_any_storage_at_a_real_size(T, layout):
    tensors, indices = on_gpu(T, *REAL["L3"])
    expected = decode(tensors, indices)
    assert error(decode(dict(tensors, down_proj=LAYOUTS[layout](tensors["down_proj"])), indices), expected) < 8e-3


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 16])
def test_in_a_graph_and_without_synchronisation(T):
    tensors, indices = on_gpu(T, *REAL["L3"])
    arguments = (tensors["x"], tensors["gate_up_proj"], tensors["down_proj"], indices, tensors["weights"], "silu")
    decode_op(*arguments)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode_op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_op(*arguments)
    for seed in (15, 16):  # other experts, another number of them
        indices.copy_(routed_indices(T, indices.shape[1], 112, seed=seed, empty=0.2 * (seed - 15)))
        tensors["x"].copy_(normal(*tensors["x"].shape, seed=seed))
        graph.replay()
        assert torch.equal(y, decode_op(*arguments))


@pytest.mark.gpu
def test_addresses_beyond_two_to_the_31():
    E, s, H = 300, 512, 8192  # 2.5e9 entries of gate_up_proj
    gate_up = torch.empty(E, 2 * s, H, dtype=torch.bfloat16, device="cuda")
    down = torch.empty(E, s, H, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    last = [normal(*shape, seed=i, scale=0.02, dtype=torch.bfloat16).cuda() for i, shape in enumerate([(2 * s, H), (s, H)])]
    gate_up[-1].copy_(last[0])
    down[-1].copy_(last[1].T)
    for T in (1, 3):
        x = torch.randn(T, H, generator=generator(3)).to("cuda", torch.bfloat16)
        found = decode_op(x, gate_up, down, torch.full((T, 1), E - 1, device="cuda"), None, "silu")
        expected = decode_op(x, gate_up[-1:], down[-1:], torch.zeros(T, 1, dtype=torch.int64, device="cuda"), None, "silu")
        assert error(found, expected) < 1e-2
