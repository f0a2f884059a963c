"""expert_ffn where a size is zero, weights are left out, or there are too many slots: by every path."""

import pytest
import torch
from checks import DEVICES, assert_same, value_and_gradients
from shapes import PATHS, expert_weights, normal, routed_indices, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference


@pytest.fixture(params=["pytorch", "triton"])
def implementation(request):
    with _backend.interpreted(request.param == "triton"):
        yield


def problem(T, E, K, s, H, dtype=torch.float32):
    gate_up, down = expert_weights(E, s, max(H, 1), seed=0, dtype=dtype)
    x = normal(T, H, seed=1, dtype=dtype)
    return {"x": x, "gate_up_proj": gate_up[..., :H].contiguous(), "down_proj": down[:, :H]}


def ours(indices, **options):
    def function(x, gate_up_proj, down_proj, weights=None):
        return dk.expert_ffn(x, gate_up_proj, down_proj, indices, weights, **options)

    return function


SIZES = [(0, 4, 2, 8, 16), (3, 0, 2, 8, 16), (1, 0, 2, 8, 16), (3, 4, 0, 8, 16), (3, 4, 2, 8, 0), (0, 0, 0, 8, 0)]  # T, E, K, s, H


@pytest.mark.usefixtures("implementation", "nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("T", "E", "K", "s", "H"), SIZES)
def test_a_size_of_zero(T, E, K, s, H, path, dtype):
    tensors = problem(T, E, K, s, H, dtype) | {"weights": uniform(T, K, seed=2, dtype=torch.float32)}
    indices = torch.zeros(T, K, dtype=torch.int64)  # with E = 0, empty slots
    with torch.no_grad():
        y = ours(indices, path=path)(**tensors)
    results = value_and_gradients(ours(indices, path=path), tensors)
    for value in (y, *results.values()):
        assert (value == 0).all()
    assert y.shape == (T, H)
    assert y.dtype == dtype


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("path", PATHS)
def test_experts_without_neurons(path):
    x, gate_up, down = normal(3, 6, seed=3, dtype=torch.float32), torch.zeros(4, 0, 6), torch.zeros(4, 0, 6).transpose(1, 2)
    assert (dk.expert_ffn(x, gate_up, down, torch.zeros(3, 2, dtype=torch.int64), path=path) == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 5, 200])
@pytest.mark.parametrize("path", PATHS)
def test_no_weights_are_unit_weights(path, T, dtype, device):
    tensors = {n: t.to(device) for n, t in problem(T, 7, 3, 8, 16, dtype).items()}
    indices = routed_indices(T, 3, 7, seed=4, empty=0.2).to(device)
    indices[0] = torch.tensor([2, 5, 2], device=device)  # an expert twice
    ones = torch.ones(T, 3, device=device)
    with torch.no_grad():
        assert torch.equal(ours(indices, path=path)(**tensors), ours(indices, path=path)(**tensors, weights=ones))
    unit = value_and_gradients(lambda **t: ours(indices, path=path)(**t, weights=ones), tensors)
    assert_same(value_and_gradients(ours(indices, path=path), tensors), unit)


def test_decoding_without_weights_makes_none(monkeypatch):
    made = []
    monkeypatch.setitem(dk.experts._PATHS, "decode", lambda x, *arguments: (made.append(arguments[3]), x)[1])
    tensors, indices = problem(1, 7, 3, 8, 16), routed_indices(1, 3, 7, seed=5)
    with torch.no_grad():
        ours(indices)(**tensors)
    assert made == [None]


def test_weights_that_would_be_copied_are_no_dense_view(monkeypatch):
    """The masked path takes gate_up_proj as one matrix [2F, H]: auto does not pick it where that is a copy of all the weights."""
    views, pick = [], _tiles.pick_path
    monkeypatch.setattr(
        dk.experts, "pick_path", lambda *a, dense_view, **o: (views.append(dense_view), pick(*a, dense_view=dense_view, **o))[1]
    )
    tensors, indices = problem(3, 7, 2, 8, 16), routed_indices(3, 2, 7, seed=6)
    expected = ours(indices)(**tensors)
    tensors["gate_up_proj"] = tensors["gate_up_proj"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(ours(indices)(**tensors), expected)
    assert views == [True, False]


def test_more_slots_than_offsets_count():
    x, gate_up, down = torch.zeros(2**16, 1), torch.zeros(1, 2, 1), torch.zeros(1, 1, 1)
    indices = torch.zeros(1, 1, dtype=torch.int32).expand(2**16, 2**15)
    with pytest.raises(ValueError, match=r"indices is .* fewer than 2\^31"):
        dk.expert_ffn(x, gate_up, down, indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("stored", ["by neuron", "by column"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("summed", [0, 2**17], ids=["by products", "by rows"])
def test_decode_on_a_cpu_is_the_reference(dtype, T, stored, weighted, summed, monkeypatch):
    """Both storages of down_proj, empty slots, a token without any, an expert named twice; and what nobody chose may be NaN."""
    monkeypatch.setattr(_tiles.paths, "_CPU_SUMMED", summed)
    monkeypatch.setattr(_tiles.paths, "_CPU_SUMMED_EXPERTS", 0)
    gate_up, down = expert_weights(6, 8, 16, seed=0, dtype=torch.float64)
    x, indices = normal(T, 16, seed=1, dtype=torch.float64), routed_indices(T, 3, 5, seed=2)
    indices[0, 1] = indices[0, 0]
    indices[T // 2, 2] = 6
    if T > 2:
        indices[-1] = 6
    w = uniform(T, 3, seed=3, dtype=torch.float64) if weighted else None
    ones = torch.ones(T, 3, dtype=torch.float64)
    silu = torch.nn.functional.silu
    expected = reference.expert_ffn(x, gate_up, down, indices, ones if w is None else w, activation=silu)
    gate_up[5], down[5] = torch.nan, torch.inf  # indices name 0 to 4
    down = down.contiguous() if stored == "by column" else down
    given = [t.to(dtype) for t in (x, gate_up, down)]
    assert given[2].transpose(1, 2).is_contiguous() == (stored == "by neuron")
    found = dk.expert_ffn(*given, indices, None if w is None else w.to(dtype), path="decode")
    assert found.dtype == dtype
    scale = float(expected.abs().max())
    assert float((found.double() - expected).abs().max()) <= 8 * torch.finfo(dtype).eps * scale


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("size", [1e25, 1e38], ids=["gate times up overflows", "the product overflows"])
@pytest.mark.parametrize("path", PATHS)
def test_what_no_token_chose_may_overflow_and_a_token_without_slots_may_be_nan(path, size):
    tensors = problem(6, 5, 2, 8, 16) | {"weights": uniform(6, 2, seed=7, dtype=torch.float32)}
    indices = torch.tensor([[0, 4], [5, 5], [2, 0], [2, 2], [5, 1], [4, 1]])  # nobody takes expert 3
    tensors["gate_up_proj"][3] = tensors["gate_up_proj"][3].sign() * size
    tensors["x"][1] = float("nan")
    tensors["weights"][4, 0] = float("nan")  # of an empty slot
    clean = tensors | {"x": tensors["x"].nan_to_num(), "gate_up_proj": tensors["gate_up_proj"].clamp(-1, 1)}
    clean["weights"] = clean["weights"].nan_to_num()
    for given in (tensors, {name: t for name, t in tensors.items() if name != "weights"}):
        expected = value_and_gradients(ours(indices, path="grouped"), {name: clean[name] for name in given})
        with torch.no_grad():
            torch.testing.assert_close(ours(indices, path=path)(**given), expected["output 0"])
        for name, value in value_and_gradients(ours(indices, path=path), given).items():
            torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
