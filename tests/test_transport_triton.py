"""The Triton kernels of sinkhorn: interpreted on a CPU, and on a GPU at the sizes of real models."""

import pytest
import torch
from checks import SECOND, assert_finite, assert_same, compare, error, second_derivative, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import capacities, clustered, normal, uniform
from test_transport import BACKWARD, EXTREMES, FINAL, VANISHING, extreme, ours, plain, problem

import dotmoe_kernels as dk
from dotmoe_kernels import _backend, _tiles, reference
from dotmoe_kernels.transport import operators

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
SHAPES = [(1, 1), (97, 53), (130, 148)]
pytestmark = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted():
    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(0, device=DEVICE))
        yield


def single(F, E, *batch, seed, scale=1.0):
    return problem(F, E, *batch, seed=seed, dtype=torch.float32, scale=scale)


def there(tensors):
    return {n: t.to(DEVICE) for n, t in tensors.items()}


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize(("F", "E"), SHAPES)
def test_unroll_equals_autograd_through_the_reference(F, E, final):
    """Layers with a tau and a capacity of their own, from a warm start."""
    options = {"num_iters": 4, "final": final}
    compare(ours(**options), plain(**options), device=DEVICE, scales=VANISHING, **single(F, E, 2, seed=0))


@pytest.mark.parametrize("final", FINAL)
def test_a_long_layer(final):
    tensors = {"affinity": normal(1000, 37, seed=1, dtype=torch.float32)}
    compare(ours(num_iters=2, final=final), plain(num_iters=2, final=final), device=DEVICE, **tensors)


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("num_iters", [1, 2, 20])
def test_any_number_of_steps(num_iters, final):
    options = {"num_iters": num_iters, "final": final}
    compare(ours(**options), plain(**options), device=DEVICE, scales=VANISHING, **single(63, 7, seed=10))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_sixteen_bit_affinity(dtype):
    affinity = normal(2, 97, 20, seed=20, dtype=dtype)
    assert dk.sinkhorn(affinity.to(DEVICE)).dtype == torch.float32
    compare(ours(num_iters=3), plain(num_iters=3), device=DEVICE, affinity=affinity)
    assert error(dk.sinkhorn(affinity.to(DEVICE), num_iters=3), reference.sinkhorn(affinity.double(), num_iters=3)[0]) < 2e-6


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize(("F", "E"), [(63, 7), (97, 53), (130, 148), (1, 1)])
def test_implicit_gradient_equals_autograd_at_convergence(F, E, final):
    tensors = single(F, E, 2, seed=80)
    del tensors["init"]
    exact = {n: t.double() for n, t in tensors.items()}
    start = reference.sinkhorn(**exact, num_iters=200)[1].log_v.float().to(DEVICE)
    options = {"num_iters": 2, "final": final, "backward": "implicit"}
    found = value_and_gradients(
        lambda affinity, tau, capacity: dk.sinkhorn(affinity, capacity, tau=tau, init=start, **options), there(tensors)
    )
    expected = value_and_gradients(plain(num_iters=200, final=final), exact)
    for results in (found, expected):  # the capacities sum to F: their gradient has a meaning up to a constant
        results["gradient of capacity"] -= results["gradient of capacity"].mean(-1, keepdim=True)
    for name, value in expected.items():
        assert error(found[name], value, 1e-3) < 2e-6, name


def test_implicit_gradient_of_a_hard_plan_vanishes():
    affinity = clustered(48, 6, seed=83, strength=40.0, dtype=torch.float32).to(DEVICE)
    results = value_and_gradients(
        lambda affinity: dk.sinkhorn(affinity, tau=0.05, num_iters=9, backward="implicit"), {"affinity": affinity}
    )
    assert torch.equal(results["output 0"], results["output 0"].round()), "the plan should be hard"
    assert results["gradient of affinity"].abs().max() < 1e-6


def test_implicit_gradient_of_a_clustered_plan():
    affinity = clustered(120, 6, seed=84, dtype=torch.float32)
    # its convergence is slow: start from the float64 solution
    exact, info = reference.sinkhorn(affinity.double(), tau=0.1, num_iters=3000)
    options = {"tau": 0.1, "num_iters": 2, "init": info.log_v.float().to(DEVICE), "backward": "implicit"}
    found = value_and_gradients(lambda affinity: dk.sinkhorn(affinity, **options), {"affinity": affinity.to(DEVICE)})
    expected = value_and_gradients(
        lambda affinity: reference.sinkhorn(affinity, tau=0.1, num_iters=3000)[0], {"affinity": affinity.double()}
    )
    assert error(found["output 0"], exact) < 1e-5
    assert error(found["gradient of affinity"], expected["gradient of affinity"]) < 1e-3


# --- info, stopping, warm start ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", FINAL)
def test_info(final):
    tensors = single(24, 5, 3, seed=50)
    options = {"num_iters": 4, "final": final}
    found, info = dk.sinkhorn(
        **(there(tensors) | {"affinity": tensors["affinity"].to(DEVICE).requires_grad_()}), **options, return_info=True
    )
    expected_plan, expected = reference.sinkhorn(**{n: t.double() for n, t in tensors.items()}, **options)
    assert info.num_iters.dtype == torch.int64
    assert info.num_iters.tolist() == [4, 4, 4]
    assert found.requires_grad
    assert not any(t.requires_grad for t in info)
    assert error(found, expected_plan) < 2e-6
    for name in ("log_u", "log_v", "error"):
        assert error(getattr(info, name), getattr(expected, name), 1.0) < 2e-6, name


@pytest.mark.parametrize("final", FINAL)
def test_each_layer_stops_by_itself(final):
    affinity = torch.stack([normal(40, 8, seed=60, scale=s, dtype=torch.float32) for s in (0.01, 1.0, 3.0)])
    options = {"num_iters": 40, "tol": 1e-3, "final": final}
    plan, info = dk.sinkhorn(affinity.to(DEVICE), return_info=True, **options)
    expected_plan, expected = reference.sinkhorn(affinity.double(), **options)
    assert info.num_iters.tolist() == expected.num_iters.tolist()
    assert len(set(info.num_iters.tolist())) == 3, "the layers should need different numbers of steps"
    assert error(plan, expected_plan) < 2e-6
    assert error(info.log_v, expected.log_v) < 2e-6
    compare(ours(**options), plain(**options), device=DEVICE, affinity=affinity)


def test_a_loose_tolerance_takes_one_step():
    affinity = normal(12, 3, seed=61, dtype=torch.float32).to(DEVICE)
    plan, info = dk.sinkhorn(affinity, tol=1e6, num_iters=7, return_info=True)
    assert info.num_iters.item() == 1
    assert torch.equal(plan, dk.sinkhorn(affinity, num_iters=1))


def test_the_potentials_beyond_a_stop_are_those_of_the_stop():
    affinity = normal(1, 12, 3, seed=61, dtype=torch.float32).to(DEVICE)
    start = torch.zeros(1, 3, device=DEVICE)
    tensors = (affinity, torch.full_like(start, 4.0), torch.ones(1, device=DEVICE), start)
    _, _, log_v, history, count, _ = operators.sinkhorn_op(*tensors, 7, 1e6, True, True)
    assert count.tolist() == [1]
    assert torch.equal(history[0, 0], start[0])
    assert torch.equal(history[0, 1:], log_v.expand(7, 3))


def test_warm_start_continues():
    affinity = normal(2, 40, 8, seed=70, dtype=torch.float32).to(DEVICE)
    tau = torch.tensor([0.3, 0.7], device=DEVICE)
    info = dk.sinkhorn(affinity, tau=tau, num_iters=5, return_info=True)[1]
    continued = dk.sinkhorn(affinity, tau=tau, num_iters=4, init=info.log_v)
    assert error(continued, dk.sinkhorn(affinity, tau=tau, num_iters=9)) < 2e-6
    converged = dk.sinkhorn(affinity, tau=tau, num_iters=25, return_info=True)[1]
    assert (dk.sinkhorn(affinity, tau=tau, tol=1e-3, num_iters=3, init=converged.log_v, return_info=True)[1].num_iters == 1).all()


def test_nan_shows_in_the_error():
    affinity = normal(2, 40, 8, seed=71, dtype=torch.float32)
    affinity[1, 3, 2] = float("nan")
    tensors = (affinity, torch.full((2, 8), 5.0), torch.ones(2), torch.zeros(2, 8))
    for exact_rows in (True, False):
        found = operators.sinkhorn_op(*(t.to(DEVICE) for t in tensors), 3, 1e-4, exact_rows, True)[-1]
        assert found.isnan().tolist() == [False, True]


# --- extremes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("name", EXTREMES)
def test_extremes_stay_finite(name, final):
    affinity = extreme(name).float()
    tensors = {"affinity": torch.stack([affinity, affinity]).to(DEVICE), "tau": torch.tensor([1.0, 1e-3], device=DEVICE)}
    for backward in BACKWARD:
        results = value_and_gradients(ours(num_iters=3, final=final, backward=backward), tensors)
        assert_finite(results)
        if final == "row":
            assert (results["output 0"].double().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("final", FINAL)
@pytest.mark.parametrize("name", ["column 100 below", "column 1e4 below", "column 1e4 above", "row 1e4 below", "identical rows"])
def test_extremes_equal_the_reference(name, final):
    options = {"num_iters": 4, "final": final}
    compare(ours(**options), plain(**options), device=DEVICE, affinity=extreme(name).float())


@pytest.mark.parametrize("final", FINAL)
def test_a_far_start_next_to_a_near_one(final):
    """Some layers take all their steps in the plain form, some none, one stops early."""
    far = torch.tensor([0.0, -200.0, 300.0, 0.0, 50.0, -1.0])
    tensors = {"affinity": normal(3, 24, 6, seed=132, dtype=torch.float32), "init": torch.stack([far, 0 * far, -far])}
    for num_iters in (1, 4):
        options = {"num_iters": num_iters, "final": final}
        # exponents near 300 are known to 1.5e-5
        compare(ours(**options), plain(**options), device=DEVICE, scales=VANISHING, floor=1.5e-5, **tensors)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("final", FINAL)
def test_one_expert_takes_everything(final, backward):
    affinity = normal(16, 1, seed=133, dtype=torch.float32).to(DEVICE)
    results = value_and_gradients(ours(num_iters=3, final=final, backward=backward), {"affinity": affinity})
    assert error(results["output 0"], torch.ones(16, 1)) < 1e-6
    assert results["gradient of affinity"].abs().max() < 1e-5


@settings(max_examples=8)
@given(F=st.integers(1, 40), E=st.integers(1, 40), tau=st.floats(0.05, 4), seed=st.integers(0, 999), final=st.sampled_from(FINAL))
def test_marginals(F, E, tau, seed, final):
    affinity = normal(F, E, seed=seed, dtype=torch.float32).to(DEVICE)
    capacity = capacities(F, E, seed=seed, dtype=torch.float32).to(DEVICE)
    plan = dk.sinkhorn(affinity, capacity, tau=tau, num_iters=3, final=final).double()
    exact = plan.sum(-1) if final == "row" else plan.sum(-2) / capacity
    assert (plan >= 0).all()
    assert (exact - 1).abs().max() < 1e-5


# --- layouts, outputs, repeatability -----------------------------------------------------------------------------------


def strided(layout):
    """Affinity [2, 24, 12] in an unusual layout."""
    base = normal(2, 24, 12, seed=110, dtype=torch.float32)
    if layout == "transposed":
        return base.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.zeros(2, 48, 25)[:, ::2, 1::2].copy_(base)
    if layout == "columns of a wider one":
        return torch.zeros(2, 24, 16)[:, :, 3:15].copy_(base)
    if layout == "batch last":
        return base.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return base[:, :, :1].expand(2, 24, 12)


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "columns of a wider one", "batch last", "expanded"])
def test_any_strides(layout, backward):
    affinity = strided(layout).to(DEVICE) if layout != "expanded" else strided(layout)[:, :, :1].to(DEVICE).expand(2, 24, 12)
    assert not affinity.is_contiguous()
    weight = normal(2, 24, 12, seed=111, dtype=torch.float32).to(DEVICE)

    def run(affinity, weight):
        leaf = affinity.detach().requires_grad_()
        plan = dk.sinkhorn(leaf, num_iters=3, backward=backward)
        return {"plan": plan.detach(), "gradient": torch.autograd.grad(plan, leaf, weight)[0]}

    transposed = weight.transpose(1, 2).contiguous().transpose(1, 2)
    assert_same(run(affinity, transposed), run(affinity.contiguous(), weight))


@pytest.mark.parametrize("backward", BACKWARD)
def test_a_cotangent_of_ones(backward):
    affinity = normal(24, 6, seed=112, dtype=torch.float32).to(DEVICE).requires_grad_()
    gradient = torch.autograd.grad(dk.sinkhorn(affinity, num_iters=6, backward=backward).sum(), affinity)[0]
    assert gradient.abs().max() < 1e-6  # rows sum to 1


@pytest.mark.parametrize("backward", BACKWARD)
def test_a_batch_equals_its_layers(backward):
    tensors = there(single(20, 5, 2, 3, seed=100))
    options = {"num_iters": 5, "backward": backward}
    whole = ours(**options)(**tensors)
    for index in [(0, 0), (1, 2)]:
        assert error(whole[index], ours(**options)(**{n: t[index] for n, t in tensors.items()})) < 1e-6


@pytest.mark.parametrize("backward", BACKWARD)
def test_an_empty_batch(backward):
    affinity = torch.zeros(0, 12, 3, requires_grad=True, device=DEVICE)
    tau = torch.ones(0, requires_grad=True, device=DEVICE)
    plan, info = dk.sinkhorn(affinity, tau=tau, backward=backward, tol=1e-3, return_info=True)
    assert plan.shape == (0, 12, 3)
    assert (info.log_u.shape, info.log_v.shape, info.num_iters.shape, info.error.shape) == ((0, 12), (0, 3), (0,), (0,))
    plan.sum().backward()
    assert affinity.grad.shape == affinity.shape


@pytest.mark.parametrize("backward", BACKWARD)
def test_bitwise_repeatable(backward):
    tensors = there(single(130, 20, 2, seed=120))
    if backward == "implicit":
        del tensors["init"]
    function = ours(num_iters=4, backward=backward)
    assert_same(value_and_gradients(function, tensors), value_and_gradients(function, tensors))


@pytest.mark.parametrize("backward", BACKWARD)
@pytest.mark.parametrize("final", FINAL)
@pytest.mark.usefixtures("nan_filled")
def test_every_output_is_written(final, backward):
    """Also with a layer that stops early, and one that takes its first step in the plain form."""
    tensors = single(63, 20, 3, seed=121)
    tensors["affinity"][0] *= 0.01
    tensors["affinity"][1, :, 4] -= 100
    tensors["capacity"][0], tensors["init"][0] = 63 / 20, 0.0
    if backward == "implicit":
        del tensors["init"]
    function = ours(num_iters=5, tol=1e-2, final=final, backward=backward)
    assert_finite(value_and_gradients(function, there(tensors)))
    outputs = operators.sinkhorn_op(
        *(tensors.get(n, torch.zeros(3, 20)).to(DEVICE) for n in ("affinity", "capacity", "tau", "init")),
        5,
        1e-2,
        final == "row",
        True,
    )
    assert all(t.isfinite().all() for t in outputs)


def test_arguments_are_left_alone():
    tensors = there(single(20, 5, 2, seed=122))
    before = {n: t.clone() for n, t in tensors.items()}
    value_and_gradients(ours(num_iters=3), tensors)
    assert_same(before, tensors)


def test_only_what_is_needed_gets_a_gradient():
    tensors = there(single(20, 5, seed=123))
    tensors["tau"].requires_grad_()
    ours(num_iters=3)(**tensors).square().sum().backward()
    assert tensors["tau"].grad is not None
    assert tensors["affinity"].grad is None


def test_float64_takes_the_other_implementation():
    affinity = normal(24, 6, seed=124)
    assert error(dk.sinkhorn(affinity.to(DEVICE), num_iters=8), reference.sinkhorn(affinity, num_iters=8)[0]) < 1e-12


# --- as torch operators ------------------------------------------------------------------------------------------------


def operands(*, needs_grad):
    tensors = there(single(20, 12, 2, seed=130))
    return [tensors[n].requires_grad_(needs_grad) for n in ("affinity", "capacity", "tau", "init")]


def test_opcheck_forward():
    torch.library.opcheck(operators.sinkhorn_op, (*operands(needs_grad=True), 2, 1e-2, True, True))


def test_opcheck_backward():
    affinity, capacity, tau, init = operands(needs_grad=False)
    plan, _, _, history, count, _ = operators.sinkhorn_op(affinity, capacity, tau, init, 2, 0.0, True, True)
    grad = uniform(*plan.shape, seed=131, dtype=torch.float32).to(DEVICE)
    torch.library.opcheck(operators.unroll_op, (affinity, capacity, tau, plan, history, count, grad, True, True))
    torch.library.opcheck(operators.implicit_op, (affinity, tau, plan, grad, True))


@pytest.mark.parametrize("backward", BACKWARD)
def test_compiles_into_one_graph(backward):
    tensors = there(single(20, 12, 2, seed=132))
    if backward == "implicit":
        del tensors["init"]

    def function(affinity, tau, capacity, init=None):
        plan, info = dk.sinkhorn(affinity, capacity, tau=tau, init=init, num_iters=3, tol=1e-4, backward=backward, return_info=True)
        return plan * 2, info.error

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_same(
        value_and_gradients(lambda **t: compiled(**t)[0], tensors), value_and_gradients(lambda **t: function(**t)[0], tensors)
    )


@SECOND
@pytest.mark.parametrize("backward", BACKWARD)
def test_a_second_derivative_is_refused(backward, how):
    affinity = normal(9, 3, seed=133, dtype=torch.float32).to(DEVICE)
    with pytest.raises(RuntimeError, match="second derivative"):
        second_derivative(ours(num_iters=2, backward=backward), affinity, how)


# --- tiles -------------------------------------------------------------------------------------------------------------


def test_every_column_has_a_tile():
    for E in range(1, 513):
        main, rest = _tiles.column_blocks(E)
        assert main + rest >= E
        assert main & (main - 1) == 0
        assert rest & (rest - 1) == 0
        assert rest == 0 or main < E
        assert main + rest < 1.5 * E + 16


@pytest.mark.parametrize(("F", "L"), [(1, 1), (97, 3), (18944, 28), (14336, 32), (11008, 1), (18944, 100000)])
def test_every_row_has_a_program(F, L):
    for kernel in ("step", "adjoint", "stats"):
        programs, chunk = _tiles.transport_tiles(148, kernel).split(F, L)
        assert (programs - 1) * chunk < F <= programs * chunk


# --- on a GPU ----------------------------------------------------------------------------------------------------------

REAL = [(28, 18944, 148), (32, 14336, 112), (32, 14336, 8), (2, 14336, 512)]  # L, F, E


@pytest.mark.gpu
@pytest.mark.parametrize("tau", [1.0, 0.1])
@pytest.mark.parametrize(("L", "F", "E"), REAL)
def test_real_sizes(L, F, E, tau):
    affinity = normal(2, F, E, seed=140, dtype=torch.float32).cuda()
    layers = affinity[torch.arange(L, device="cuda") % 2].requires_grad_()
    cotangent = normal(F, E, seed=141, dtype=torch.float32).cuda()
    plan = dk.sinkhorn(layers, tau=tau, num_iters=20)
    (gradient,) = torch.autograd.grad(plan, layers, cotangent.expand_as(plan))
    for tensor in (plan, gradient):  # equal layers, equal bits
        assert torch.equal(tensor[0], tensor[L - 2])
        assert torch.equal(tensor[1], tensor[L - 1])
    exact_leaf, plain_leaf = affinity[0].double().requires_grad_(), affinity[0].clone().requires_grad_()
    exact, single_ = (reference.sinkhorn(leaf, tau=tau, num_iters=20)[0] for leaf in (exact_leaf, plain_leaf))
    assert error(plan[0], exact) <= 2 * error(single_, exact) + 1e-6
    (exact_gradient,) = torch.autograd.grad(exact, exact_leaf, cotangent.double())
    (plain_gradient,) = torch.autograd.grad(single_, plain_leaf, cotangent)
    assert error(gradient[0], exact_gradient) <= 2 * error(plain_gradient, exact_gradient) + 1e-6


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    affinity = normal(1, 18944, 148, seed=142, dtype=torch.float32).to("cuda", torch.bfloat16)
    layers = affinity.expand(800, -1, -1)  # 2.2e9 entries of the plan; the affinity itself is read with stride 0
    plan = dk.sinkhorn(layers, num_iters=2)
    assert torch.equal(plan[0], plan[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("backward", BACKWARD)
def test_nothing_waits_for_the_device(backward):
    tensors = there(single(1000, 148, 4, seed=143))
    leaves = {n: t.requires_grad_() for n, t in tensors.items()}
    cotangent = torch.randn(4, 1000, 148, device="cuda")

    def step():
        plan, info = dk.sinkhorn(**leaves, num_iters=10, tol=1e-3, backward=backward, return_info=True)
        return torch.autograd.grad(plan, list(leaves.values()), cotangent, allow_unused=True), info

    step()  # compiles
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.gpu
@pytest.mark.parametrize("backward", BACKWARD)
def test_a_cuda_graph(backward):
    affinity = normal(4, 1000, 148, seed=144, dtype=torch.float32).cuda().requires_grad_()
    cotangent = torch.randn(4, 1000, 148, device="cuda")

    def step():
        plan = dk.sinkhorn(affinity, tau=0.3, num_iters=10, tol=1e-3, backward=backward)
        return plan.detach(), torch.autograd.grad(plan, affinity, cotangent)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        affinity.copy_(normal(4, 1000, 148, seed=145, dtype=torch.float32))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_memory_of_the_exact_adjoint():
    """O(T E + T F) a layer on top of the plan, the gradient and their cotangent."""
    L, F, E, T = 4, 18944, 148, 50
    affinity = torch.randn(L, F, E, device="cuda", requires_grad=True)
    cotangent = torch.randn(L, F, E, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plan = dk.sinkhorn(affinity, num_iters=T)
    torch.autograd.grad(plan, affinity, cotangent)
    dense = 4 * L * F * E
    assert torch.cuda.max_memory_allocated() - before < 2 * dense + 1.3 * 4 * L * T * (2 * F + 3 * E) + 2**23


def test_more_layers_than_a_grid_has():
    affinity = torch.zeros(3, 21846, 2, 1, device=DEVICE)  # 65,538 layers
    with pytest.raises(ValueError, match=r"affinity is of shape \[3, 21846, 2, 1\]; allowed: at most 65535 layers"):
        dk.sinkhorn(affinity)
