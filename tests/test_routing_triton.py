"""The Triton kernels of routing: interpreted on a CPU, and on a GPU at the sizes of real models."""

import pytest
import torch
from checks import SECOND, assert_finite, assert_no_wrong_second_derivative, assert_same, compare, error, value_and_gradients
from shapes import generator, normal, uniform

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels.routing import choose, operators

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
MODES = ["unit", "softmax", "renormalized"]
SHAPES = [(13, 7, 3), (3, 148, 37), (5, 1, 1), (1, 16, 16), (33, 8, 2), (3, 37, 37), (1, 300, 129), (1, 512, 28)]  # T, E, K
OUTPUTS = ("test_schema", "test_faketensor")
SOFT = {"threshold": 0.2, "max_active": 4}
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not HAS_GPU:  # few rows a tile: the interpreter sorts empty ones as slowly
        monkeypatch.setattr(_tiles.routing, "_ROUTING", dict.fromkeys(_tiles.routing._ROUTING, 128))
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def differentiable(routing, masked=False):
    if masked:  # what probs says of a padding token is open
        return routing.weights, routing.balance_loss, routing.z_loss
    return routing.weights, routing.probs, routing.balance_loss, routing.z_loss


def padding(T, *, seed):
    return uniform(T, seed=seed) < 0.7


def there(mask, like):
    return None if mask is None else mask.to(like.device)


def soft_batch(T, E, *, seed):
    tensors = {
        "scores": normal(T, E, seed=seed + 1),
        "k": 0.2 + (E - 0.4) * uniform(T, seed=seed),
        "temperature": 0.3 + uniform(T, seed=seed + 2),
    }
    return {name: tensor.float() for name, tensor in tensors.items()}


# --- top-K -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "masked"), [("unit", False), ("unit", True), ("softmax", False), ("renormalized", True)])
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_equals_the_reference(T, E, K, weights, masked):
    logits = normal(T, E, seed=0, scale=2.0, dtype=torch.float32)
    mask = padding(T, seed=1) if masked else None
    found = dk.route_top_k(logits.to(DEVICE), K, weights=weights, mask=None if mask is None else mask.to(DEVICE))
    expected = reference.route_top_k(logits, K, weights=weights, mask=mask)
    assert found.indices.dtype == torch.int64
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.equal(found.load.cpu(), expected.load) or error(found.load, expected.load) < 1e-6

    def run(route):
        return lambda logits: differentiable(route(logits, K, weights=weights, mask=there(mask, logits)), masked)

    compare(run(dk.route_top_k), run(reference.route_top_k), device=DEVICE, logits=logits)


@pytest.mark.parametrize("num_zero_experts", [0, 4])
@pytest.mark.parametrize(("T", "E", "K"), [*SHAPES, (0, 8, 2)])
def test_what_a_model_chooses_without_a_gradient(T, E, K, num_zero_experts):
    """Indices and weights alone, NaN or not: those of the whole op."""
    if num_zero_experts >= E:
        return
    logits = normal(T, E, seed=0, scale=2.0, dtype=torch.float32).to(DEVICE)
    expected = dk.route_top_k(logits, K, num_zero_experts=num_zero_experts)
    weights, indices = choose(logits, K, None, num_zero_experts)
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    assert torch.equal(indices, expected.indices)
    assert torch.equal(weights, expected.weights)
    leaf = logits.requires_grad_()
    assert choose(leaf, K, None, num_zero_experts)[0].requires_grad
    with torch.no_grad():
        assert torch.equal(choose(leaf, K, None, num_zero_experts)[1], indices)
        torch.library.opcheck(operators.choose_top_k_op, (logits.detach(), K, E - num_zero_experts), test_utils=OUTPUTS)
        if T:
            logits.detach()[0] = float("nan")
            weights, indices = choose(logits.detach(), K, None, num_zero_experts)
            assert len(set(indices[0][indices[0] < E - num_zero_experts].tolist())) == int(weights[0].sum())


@pytest.mark.parametrize("programs", [1, 3])
def test_programs_of_several_tiles(programs, monkeypatch, request):
    """The sums of every program, over all its tiles, are added."""
    from dotmoe_kernels.routing.gpu import top_k as gpu

    monkeypatch.setattr(gpu, "routing_programs", lambda device: programs)
    gpu._plan.cache_clear()
    request.addfinalizer(gpu._plan.cache_clear)
    T = 1030 if HAS_GPU else 23  # tiles of 16 or 2 rows, and a part of one
    logits = normal(T, 37, seed=2, dtype=torch.float32)
    mask = padding(T, seed=3).to(DEVICE)
    found, expected = dk.route_top_k(logits.to(DEVICE), 9, mask=mask), reference.route_top_k(logits.double(), 9, mask=mask.cpu())
    for name in ("load", "balance_loss", "z_loss", "weights"):
        assert error(getattr(found, name), getattr(expected, name)) < 1e-6, name
    assert torch.equal(found.indices.cpu(), expected.indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", MODES)
def test_sixteen_bit_logits_are_routed_in_float32(weights, dtype):
    logits = normal(12, 16, seed=3, dtype=dtype)  # with ties
    found, expected = (
        dk.route_top_k(logits.to(DEVICE), 4, weights=weights),
        reference.route_top_k(logits.float(), 4, weights=weights),
    )
    assert torch.equal(found.indices.cpu(), expected.indices)
    for name in ("weights", "probs", "load", "balance_loss", "z_loss"):
        assert getattr(found, name).dtype == torch.float32
        assert error(getattr(found, name), getattr(expected, name)) < 1e-6, name
    leaf = logits.to(DEVICE).requires_grad_()
    dk.route_top_k(leaf, 4, weights=weights).z_loss.backward()
    assert leaf.grad.dtype == dtype


def test_float64_keeps_its_digits():
    logits = 1 + 1e-12 * normal(9, 12, seed=4).to(DEVICE)
    found, expected = dk.route_top_k(logits, 3, weights="softmax"), reference.route_top_k(logits, 3, weights="softmax")
    assert torch.equal(found.indices, expected.indices)
    assert found.probs.dtype == torch.float64


def test_more_experts_than_a_tile():
    logits = normal(3, 600, seed=5, dtype=torch.float32).to(DEVICE)
    assert torch.equal(dk.route_top_k(logits, 30).indices, reference.route_top_k(logits, 30).indices)
    mask = torch.tensor([True, False, True], device=DEVICE)

    def soft(route):
        routing = route(logits, 40.0, temperature=0.5, threshold=0.2, max_active=30, mask=mask)
        return routing.weights, routing.load, routing.balance_loss, routing.z_loss

    for found, expected in zip(soft(dk.route_soft_top_k), soft(reference.route_soft_top_k), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("seed", range(3))
def test_ties_go_to_the_lower_index(seed):
    logits = torch.randint(-1, 3, (20, 40), generator=generator(seed)).float()
    logits[logits == 0] = -0.0
    logits[::2] = logits[::2].abs()  # both zeros
    logits[:, ::3] += 0.0
    expected = [sorted(range(40), key=lambda e, row=row: (-row[e], e))[:9] for row in logits.tolist()]
    assert dk.route_top_k(logits.to(DEVICE), 9).indices.tolist() == expected


def test_the_order_of_extreme_values():
    values = torch.tensor([3e38, 1e-42, 0.0, -1e-42, -3e38, 1.0, -1.0])
    logits = torch.stack([values[torch.randperm(7, generator=generator(s))] for s in range(6)])
    found = dk.route_top_k(logits.to(DEVICE), 7).indices.cpu()
    assert torch.equal(logits.gather(1, found), values.sort(descending=True).values.expand(6, 7))


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_stay_finite(scale, weights):
    logits = normal(10, 6, seed=30, scale=scale, dtype=torch.float32).to(DEVICE)
    assert_finite(value_and_gradients(lambda z: differentiable(dk.route_top_k(z, 3, weights=weights)), {"z": logits}))


@pytest.mark.parametrize("rule", ["top_k", "soft"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_padding_rows_may_hold_anything(rule, bad):
    logits = normal(6, 5, seed=6, dtype=torch.float32).to(DEVICE)
    mask = torch.tensor([True, True, False, True, False, True], device=DEVICE)
    logits[2], logits[4, 1] = bad, bad
    logits.requires_grad_()

    def route(z, m):
        if rule == "top_k":
            return dk.route_top_k(z, 2, weights="renormalized", mask=m)
        return dk.route_soft_top_k(z, 2.0, temperature=1.0, threshold=0.1, max_active=3, mask=m)

    routing, kept = route(logits, mask), route(logits.detach()[mask], None)
    assert torch.equal(routing.indices[mask], kept.indices)
    assert (routing.indices[~mask] == 5).all()
    assert (routing.weights[~mask] == 0).all()
    for name in ("load", "balance_loss", "z_loss"):
        torch.testing.assert_close(getattr(routing, name), getattr(kept, name))
    (routing.weights.square().sum() + routing.probs.sum() + routing.balance_loss + routing.z_loss).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask] == 0).all()
    assert (logits.grad[mask] != 0).any()


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["no tokens", "only padding"])
def test_nothing_to_route(kind, soft):
    T = 0 if kind == "no tokens" else 4
    logits = torch.zeros(T, 6, device=DEVICE, requires_grad=True)
    mask = torch.zeros(T, dtype=torch.bool, device=DEVICE)
    if soft:
        routing = dk.route_soft_top_k(logits, 2.0, temperature=0.5, threshold=0.1, max_active=2, mask=mask)
    else:
        routing = dk.route_top_k(logits, 2, mask=mask)
    assert routing.indices.shape == routing.weights.shape == (T, 2)
    assert routing.indices.eq(6).all()
    assert routing.load.tolist() == [0.0] * 6
    assert (routing.balance_loss.item(), routing.z_loss.item()) == (0, 0)
    (routing.balance_loss + routing.z_loss + routing.weights.sum()).backward()
    assert torch.equal(logits.grad.cpu(), torch.zeros(T, 6))


@pytest.mark.parametrize("only", ["weights", "probs", "balance_loss", "z_loss"])
@pytest.mark.parametrize("weights", MODES)
def test_one_gradient_alone(weights, only):
    logits = normal(9, 11, seed=7, dtype=torch.float32)

    def run(route):
        return lambda logits: getattr(route(logits, 4, weights=weights), only)

    compare(run(dk.route_top_k), run(reference.route_top_k), device=DEVICE, logits=logits)


@pytest.mark.parametrize("rule", ["top_k", "soft"])
def test_any_strides(rule):
    logits = normal(10, 6, seed=31, dtype=torch.float32).to(DEVICE)

    def run(z):
        def function(z):
            if rule == "top_k":
                routing = dk.route_top_k(z, 2, weights="softmax")
            else:
                routing = dk.route_soft_top_k(z, 2.0, temperature=0.5, threshold=0.1, max_active=3)
            return routing.weights.T, routing.probs.T, routing.balance_loss  # gradients of other strides come back

        return value_and_gradients(function, {"z": z})

    expected = run(logits)
    for z in (logits.T.contiguous().T, torch.zeros(20, 13, device=DEVICE)[::2, 1::2].copy_(logits)):
        assert not z.is_contiguous()
        assert_same(expected, run(z))


@pytest.mark.parametrize("weights", [*MODES, "soft"])
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(weights):
    logits = normal(7, 37, seed=32, dtype=torch.float32).to(DEVICE)

    def function(z):
        if weights == "soft":
            return differentiable(dk.route_soft_top_k(z, 9.5, temperature=0.5, threshold=0.3, max_active=12))
        return differentiable(dk.route_top_k(z, 9, weights=weights))

    first = value_and_gradients(function, {"z": logits})
    assert_finite(first)
    assert_same(first, value_and_gradients(function, {"z": logits}))


# --- SoftMoE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("T", "E"), [(20, 9), (3, 148), (4, 4), (33, 5)])
def test_soft_routing_equals_the_reference(T, E, masked):
    tensors = soft_batch(T, E, seed=41)
    mask = padding(T, seed=42) if masked else None

    def run(route):
        def function(scores, k, temperature):
            return differentiable(route(scores, k, temperature=temperature, mask=there(mask, scores), **SOFT), masked)

        return function

    compare(run(dk.route_soft_top_k), run(reference.route_soft_top_k), device=DEVICE, floor=1e-5, **tensors)
    on_device = {n: t.to(DEVICE) for n, t in tensors.items()}
    found = dk.route_soft_top_k(**on_device, mask=None if mask is None else mask.to(DEVICE), **SOFT)
    expected = reference.route_soft_top_k(**{n: t.double() for n, t in tensors.items()}, mask=mask, **SOFT)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert E == 148 or (found.indices[:, 1:] == E).any(), "some slot should be unused"
    assert error(found.load, expected.load) < 1e-6


@pytest.mark.parametrize("only", ["weights", "probs", "balance_loss", "z_loss"])
def test_one_gradient_of_soft_routing_alone(only):
    tensors = soft_batch(9, 11, seed=44)
    tensors = tensors if only != "z_loss" else {"scores": tensors["scores"]}

    def run(route):
        return lambda scores, k=2.0, temperature=0.5: getattr(route(scores, k, temperature=temperature, **SOFT), only)

    compare(run(dk.route_soft_top_k), run(reference.route_soft_top_k), device=DEVICE, floor=1e-5, **tensors)


@pytest.mark.parametrize("threshold", [0.0, 0.999])
def test_at_least_one_slot_and_at_most_all(threshold):
    scores = normal(12, 9, seed=45, dtype=torch.float32).to(DEVICE)
    routing = dk.route_soft_top_k(scores, 2.0, temperature=0.5, threshold=threshold, max_active=9)
    used = (routing.indices < 9).sum(1)
    assert used.eq(9).all() if threshold == 0 else used.eq(1).all()
    assert torch.equal(routing.indices[:, 0], scores.argmax(1))


def test_soft_ties_go_to_the_lower_index():
    routing = dk.route_soft_top_k(torch.zeros(2, 5, device=DEVICE), 2.0, temperature=1.0, threshold=0.1, max_active=3)
    assert routing.indices.tolist() == [[0, 1, 2]] * 2
    assert routing.load.tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])


# --- as operators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [0, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(T, masked):
    logits = normal(T, 5, seed=50, dtype=torch.float32).to(DEVICE).requires_grad_()
    mask = padding(T, seed=51).to(DEVICE) if masked else None
    torch.library.opcheck(operators.route_top_k_op, (logits, mask, 2, "renormalized"))
    k, temperature = (torch.full((T,), v, dtype=torch.float64, device=DEVICE, requires_grad=True) for v in (2.0, 0.5))
    torch.library.opcheck(operators.route_soft_top_k_op, (logits, k, temperature, mask, 0.1, 3))
    saved = operators.route_top_k_op(logits.detach(), mask, 2, "softmax")
    weights, indices, probs, load, losses, lse = saved
    torch.library.opcheck(
        operators.route_top_k_backward_op,
        (logits.detach(), indices, load, losses, lse, torch.ones_like(weights), None, torch.ones_like(losses), "softmax"),
    )
    *saved, solution = operators.route_soft_top_k_op(logits.detach(), k.detach(), temperature.detach(), mask, 0.1, 3)
    weights, indices, probs, load, losses, lse = saved
    torch.library.opcheck(
        operators.route_soft_top_k_backward_op,
        (logits.detach(), temperature.detach(), indices, load, losses, lse, solution, None, torch.ones_like(probs), None),
    )


@pytest.mark.parametrize("rule", ["top_k", "soft"])
def test_compiles_without_a_break(rule):
    logits, k = normal(6, 7, seed=52, dtype=torch.float32).to(DEVICE), torch.tensor(2.5, device=DEVICE)

    def function(z, k):
        if rule == "top_k":
            routing = dk.route_top_k(z * 2, 3, weights="softmax")
        else:
            routing = dk.route_soft_top_k(z * 2, k, temperature=0.5, threshold=0.1, max_active=3)
        return routing.weights.sum() + routing.balance_loss + routing.z_loss + routing.load.max() + 0 * k

    results = []
    for run in (function, torch.compile(function, fullgraph=True, backend="inductor" if HAS_GPU else "aot_eager")):
        leaves = logits.clone().requires_grad_(), k.clone().requires_grad_()
        value = run(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("weights", MODES)
def test_the_host_path_compiles_without_a_break(weights):
    logits = normal(6, 7, seed=53, dtype=torch.float32)
    compiled = torch.compile(lambda z: dk.route_top_k(z, 3, weights=weights)[:6], fullgraph=True, backend="aot_eager")
    with _backend.interpreted(False):
        for found, expected in zip(compiled(logits), dk.route_top_k(logits, 3, weights=weights), strict=True):
            torch.testing.assert_close(found, expected)


@SECOND
@pytest.mark.parametrize("rule", ["top_k", "soft"])
def test_no_wrong_second_derivative(how, rule):
    def run(module):
        if rule == "top_k":
            return lambda z: module.route_top_k(z, 2, weights="softmax").weights
        return lambda z: module.route_soft_top_k(z, 2.0, temperature=1.0, threshold=0.1, max_active=3).weights

    leaf = normal(3, 5, seed=54, dtype=torch.float32).to(DEVICE)
    assert_no_wrong_second_derivative(run(dk), run(reference), leaf, how)


# --- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(("T", "E", "K"), [(8192, 112, 28), (65536, 148, 37), (65536, 8, 2), (1, 32, 8), (4096, 512, 64)])
def test_real_sizes(T, E, K, weights):
    logits = normal(T, E, seed=60, dtype=torch.float32)

    def run(route):
        return lambda logits: differentiable(route(logits, K, weights=weights))

    compare(run(dk.route_top_k), run(reference.route_top_k), device="cuda", logits=logits)
    assert torch.equal(dk.route_top_k(logits.cuda(), K).indices.cpu(), reference.route_top_k(logits, K).indices)


def everything(logits):
    """Values and gradients of both routers, as one tuple."""
    leaf = logits.detach().requires_grad_()
    top = dk.route_top_k(leaf, 28, weights="renormalized")
    soft = dk.route_soft_top_k(leaf, 20.0, temperature=0.5, threshold=0.1, max_active=40)
    total = sum(r.weights.square().sum() + r.balance_loss + r.z_loss + r.probs.square().sum() for r in (top, soft))
    return *top, *soft, torch.autograd.grad(total, leaf)[0]


EITHER_WAY = pytest.mark.parametrize(
    ("E", "dtype"), [(112, torch.float32), (112, torch.float64), (600, torch.float32)], ids=["kernels", "float64", "wide"]
)


@pytest.mark.gpu
@EITHER_WAY
def test_without_synchronisation(E, dtype):
    logits = normal(8192, E, seed=61, dtype=dtype).cuda()
    everything(logits)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(logits)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu
@EITHER_WAY
def test_in_a_graph(E, dtype):
    logits = normal(512, E, seed=62, dtype=dtype).cuda()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        everything(logits)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = everything(logits)
    logits.copy_(normal(512, E, seed=63))
    graph.replay()
    for a, b in zip(found, everything(logits), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_int64_addresses():
    """Logits of more than 2^31 elements apart."""
    storage = torch.zeros(3000, 800_000, dtype=torch.bfloat16, device="cuda")[:, :148]  # 4.8 GB
    storage.copy_(normal(3000, 148, seed=64, dtype=torch.bfloat16))
    assert torch.equal(dk.route_top_k(storage, 37).indices.cpu(), dk.route_top_k(storage.cpu(), 37).indices)


@pytest.mark.gpu
def test_more_than_int32_elements():
    """Outputs and gradient of more than 2^31 elements: the last rows as if routed alone."""
    T, E, few = 2**22 + 64, 512, 48
    logits = torch.randn(T, E, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(65))
    results = []
    for z in (logits, logits[-few:].contiguous()):
        leaf = z.detach().requires_grad_()
        routing = dk.route_top_k(leaf, 2, weights="renormalized")
        (gradient,) = torch.autograd.grad(routing.weights[-few:, 0].sum(), leaf)
        results.append([t[-few:].clone() for t in (routing.indices, routing.weights, routing.probs, gradient)])
        del routing, gradient
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole, alone)
