"""LapSum's Triton kernels: interpreted on a CPU, and on a GPU at the sizes of real models."""

import pytest
import torch
from checks import SECOND, assert_finite, assert_no_wrong_second_derivative, assert_same, compare, error, value_and_gradients
from shapes import generator, normal, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels.soft_topk import operators

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPES = [(9, 1), (9, 2), (13, 7), (5, 37), (2, 148), (1, 512)]  # T, E
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not HAS_GPU:  # few rows a tile: the interpreter sorts empty ones as slowly
        monkeypatch.setattr(_tiles.routing, "_ROUTING", dict.fromkeys(_tiles.routing._ROUTING, 128))
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def batch(T, E, *, seed):
    tensors = {
        "scores": normal(T, E, seed=seed + 1),
        "k": 0.2 * E + 0.6 * E * uniform(T, seed=seed),
        "temperature": 0.3 + uniform(T, seed=seed + 2),
    }
    return {name: tensor.float() for name, tensor in tensors.items()}


def soft(scores, k, temperature=1.0):
    return dk.soft_top_k(scores, k, temperature=temperature)


def plain(scores, k, temperature=1.0):
    return reference.soft_top_k(scores, k, temperature=temperature)


def on_device(tensors):
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def assert_sums(p, k):
    E = p.shape[-1]
    assert (p.double().sum(-1) - k.double()).abs().max() <= 1e-6 * E
    assert ((p >= 0) & (p <= 1)).all()


# --- values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "E"), SHAPES)
def test_equals_the_reference(T, E):
    tensors = batch(T, E, seed=10 * E)
    compare(soft, plain, device=DEVICE, **tensors)
    p = soft(**on_device(tensors))
    assert p.dtype == torch.float32
    assert_sums(p, tensors["k"].to(DEVICE))


@pytest.mark.parametrize("k", [1e-3, 0.5, 1.0, 2.0, 6.5, 7.0 - 1e-3])
def test_numbers_for_k(k):
    scores = normal(6, 7, seed=1, dtype=torch.float32)
    compare(lambda scores: soft(scores, k, 0.7), lambda scores: plain(scores, k, 0.7), device=DEVICE, scores=scores)
    assert_sums(soft(scores.to(DEVICE), k), torch.full((6,), k, device=DEVICE))


def test_scalar_tensors():
    tensors = batch(6, 7, seed=2)
    tensors["k"], tensors["temperature"] = torch.tensor(2.5), torch.tensor(0.7)
    compare(soft, plain, device=DEVICE, **tensors)


@pytest.mark.parametrize("E", [2, 7, 17])
def test_whole_k_between_wide_gaps(E):
    """The k-th and the next score are 1e4 apart: p is the hard top-k, and every density underflows."""
    ranks = torch.stack([torch.randperm(E, generator=generator(s)) for s in range(E - 1)])  # [E - 1, E], 0 the lowest
    k = torch.arange(1, E)
    scores = (1e4 * ranks).float().to(DEVICE).requires_grad_()
    ks = k.to(DEVICE, torch.float32).requires_grad_()
    p = soft(scores, ks)
    assert torch.equal(p.detach().cpu(), (ranks >= E - k[:, None]).float())
    (p * normal(E - 1, E, seed=3, dtype=torch.float32).to(DEVICE)).sum().backward()
    assert torch.isfinite(scores.grad).all()
    assert torch.isfinite(ks.grad).all()


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_wide_scores_keep_their_digits(scale):
    """float32 scores of 1e4 against the same in float64: the differences are exact, so is what follows."""
    scores, k = normal(5, 9, seed=4, scale=scale, dtype=torch.float32), torch.tensor([0.3, 1.5, 4.2, 7.7, 8.9])
    exact = plain(scores.double(), k.double())
    assert error(soft(scores.to(DEVICE), k.to(DEVICE)), exact) < 2e-7


def test_k_near_none_and_near_all():
    tensors = {"scores": normal(6, 7, seed=5, dtype=torch.float32), "k": torch.tensor([1e-6, 1e-3, 0.1, 6.9, 6.999, 6.99999])}
    found, exact = (
        value_and_gradients(soft, on_device(tensors)),
        value_and_gradients(plain, {n: t.double() for n, t in tensors.items()}),
    )
    for name, value in found.items():
        assert error(value, exact[name]) < 1e-6, name
    for t in range(6):  # relative in every row: the first one's values are of 1e-6
        assert error(found["output 0"][t], exact["output 0"][t]) < 1e-6


@pytest.mark.parametrize("k", [0.5, 2.0, 3.7])
def test_equal_scores(k):
    """All equal: k / E each; some equal, both zeros among them: the same value for the same score."""
    assert error(soft(torch.zeros(3, 5, device=DEVICE), k), torch.full((3, 5), k / 5)) < 1e-7
    scores = torch.tensor([[1.0, 0.0, -0.0, 1.0, 0.0], [-2.0, 3.0, 3.0, -2.0, 3.0]])
    compare(lambda scores: soft(scores, k), lambda scores: plain(scores, k), device=DEVICE, scores=scores)
    p = soft(scores.to(DEVICE), k)
    assert p[0, 1] == p[0, 2] == p[0, 4]
    assert p[1, 1] == p[1, 2] == p[1, 4]


@pytest.mark.parametrize("wanted", ["scores", "k", "temperature"])
def test_only_one_gradient(wanted):
    tensors = batch(5, 7, seed=6)
    leaf = tensors.pop(wanted)

    def run(function):
        return lambda leaf: function(**{wanted: leaf}, **{n: t.to(leaf) for n, t in tensors.items()})

    compare(run(soft), run(plain), device=DEVICE, leaf=leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_scores_are_taken_in_float32(dtype):
    scores = normal(5, 7, seed=7, dtype=dtype)  # with ties
    leaf = scores.to(DEVICE).requires_grad_()
    p = soft(leaf, 2.5, 0.5)
    assert p.dtype == torch.float32
    assert error(p, plain(scores.double(), 2.5, 0.5)) < 2e-7
    (gradient,) = torch.autograd.grad(p.square().sum(), leaf)
    assert gradient.dtype == dtype
    exact = scores.double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(exact, 2.5, 0.5).square().sum(), exact)
    assert error(gradient, expected) < 2 * torch.finfo(dtype).eps


# --- forms of the input ------------------------------------------------------------------------------------------------


def test_any_strides():
    tensors = on_device(batch(5, 6, seed=20))

    def run(scores, k, temperature):
        def function(scores, k, temperature):
            return soft(scores, k, temperature).T  # a gradient of other strides comes back

        return value_and_gradients(function, {"scores": scores, "k": k, "temperature": temperature})

    expected = run(**tensors)
    for scores in (
        tensors["scores"].T.contiguous().T,
        torch.zeros(10, 13, device=DEVICE)[::2, 1::2].copy_(tensors["scores"]),
    ):
        assert not scores.is_contiguous()
        k = torch.zeros(10, device=DEVICE)[::2].copy_(tensors["k"])
        assert_same(expected, run(scores, k, tensors["temperature"]))


def test_batches_of_any_rank():
    tensors = on_device(batch(6, 7, seed=21))
    flat = soft(**tensors)
    shaped = soft(tensors["scores"].view(2, 3, 7), tensors["k"].view(2, 3), tensors["temperature"].view(2, 3))
    assert torch.equal(shaped, flat.view(2, 3, 7))
    assert torch.equal(soft(tensors["scores"][0], tensors["k"][0], tensors["temperature"][0]), flat[0])


def test_no_tokens():
    tensors = {n: t.to(DEVICE).requires_grad_() for n, t in batch(0, 5, seed=22).items()}
    p = soft(**tensors)
    assert p.shape == (0, 5)
    for gradient in torch.autograd.grad(p.sum(), list(tensors.values())):
        assert gradient.numel() == 0


def test_wide_and_float64_rows_take_the_host_route():
    scores = normal(2, 600, seed=23, dtype=torch.float32)
    assert error(soft(scores.to(DEVICE), 150.0), plain(scores.double(), 150.0)) < 1e-6
    exact = 1 + 1e-12 * normal(3, 5, seed=24)
    assert soft(exact.to(DEVICE), 2.0).dtype == torch.float64
    assert error(soft(exact.to(DEVICE), 2.0), plain(exact, 2.0)) < 1e-12


@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere():
    tensors = on_device(batch(7, 37, seed=25))
    first = value_and_gradients(soft, tensors)
    assert_finite(first)
    assert_same(first, value_and_gradients(soft, tensors))


# --- as operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 4])
def test_opcheck(T):
    scores, k, temperature = (t.to(DEVICE) for t in batch(T, 5, seed=30).values())
    k, temperature = k.double(), temperature.double()
    torch.library.opcheck(operators.soft_top_k_op, tuple(t.clone().requires_grad_() for t in (scores, k, temperature)))
    p, solution = operators.soft_top_k_op(scores, k, temperature)
    torch.library.opcheck(operators.soft_top_k_backward_op, (scores, temperature, solution, torch.ones_like(p)))


def test_compiles_without_a_break():
    tensors = batch(6, 7, seed=31)

    def function(scores, k, temperature):
        return (soft(scores * 2, k, temperature).square()).sum()

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")):
        leaves = [t.to(DEVICE).requires_grad_() for t in tensors.values()]
        value = run(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@SECOND
def test_no_wrong_second_derivative(how):
    leaf = normal(3, 5, seed=32, dtype=torch.float32).to(DEVICE)
    assert_no_wrong_second_derivative(lambda z: soft(z, 2.0), lambda z: plain(z, 2.0), leaf, how)


# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "E"), [(8192, 112), (65536, 148), (65536, 8), (1, 32), (4096, 512)])
def test_real_sizes(T, E):
    tensors = batch(T, E, seed=40)
    compare(soft, plain, device="cuda", **tensors)
    assert_sums(soft(**on_device(tensors)), tensors["k"].cuda())


def everything(scores, k, temperature):
    leaves = [t.detach().requires_grad_() for t in (scores, k, temperature)]
    p = soft(*leaves)
    return p.detach(), *torch.autograd.grad(p.square().sum(), leaves)


@pytest.mark.gpu
def test_without_synchronisation():
    tensors = on_device(batch(8192, 112, seed=41))
    everything(**tensors)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(**tensors)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
def test_in_a_graph():
    tensors = on_device(batch(512, 112, seed=42))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything(**tensors)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything(**tensors)
    for name, tensor in batch(512, 112, seed=43).items():
        tensors[name].copy_(tensor)
    graph.replay()
    for a, b in zip(found, everything(**tensors), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_int64_addresses():
    """Scores of more than 2^31 elements apart."""
    storage = torch.zeros(3000, 800_000, dtype=torch.bfloat16, device="cuda")[:, :148]  # 4.8 GB
    storage.copy_(normal(3000, 148, seed=44, dtype=torch.bfloat16))
    assert torch.equal(soft(storage, 37.0), soft(storage.contiguous(), 37.0))
