"""route_top_k: router logits -> experts, weights and losses. Against the reference and transformers' router."""

import pytest
import torch
from checks import DEVICES, assert_finite, assert_same, compare, error, value_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from shapes import generator, normal, uniform
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

import dotmoe_kernels as dk
from dotmoe_kernels import reference
from dotmoe_kernels.routing import cpu

MODES = ["unit", "softmax", "renormalized"]
SHAPES = [(63, 7, 3), (50, 148, 37), (5, 1, 1), (1, 16, 16), (33, 8, 1)]  # T, E, K


def padding(T, *, seed):
    return uniform(T, seed=seed) < 0.7


def differentiable(routing):
    return routing.weights, routing.probs, routing.balance_loss, routing.z_loss


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize(("T", "E", "K"), SHAPES)
def test_equals_the_reference(T, E, K, weights, masked, dtype, device):
    logits = normal(T, E, seed=0, scale=2.0, dtype=dtype)
    mask = padding(T, seed=1) if masked else None
    found = dk.route_top_k(logits.to(device), K, weights=weights, mask=None if mask is None else mask.to(device))
    expected = reference.route_top_k(logits, K, weights=weights, mask=mask)
    assert found.indices.dtype == torch.int64
    assert found.probs.dtype == dtype
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert error(found.load, expected.load) < 1e-6

    def with_padding_left_out(route):
        def function(logits):
            there = None if mask is None else mask.to(logits.device)
            routing = route(logits, K, weights=weights, mask=there)
            if mask is None:
                return differentiable(routing)
            return routing.weights, routing.balance_loss, routing.z_loss  # what probs says of a padding token is open

        return function

    compare(with_padding_left_out(dk.route_top_k), with_padding_left_out(reference.route_top_k), device=device, logits=logits)


def test_defaults_to_unit_weights():
    logits = normal(9, 5, seed=2)
    assert torch.equal(dk.route_top_k(logits, 2).weights, torch.ones(9, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", MODES)
def test_sixteen_bit_logits_are_routed_in_float32(weights, dtype):
    logits = normal(40, 16, seed=3, dtype=dtype)
    found = dk.route_top_k(logits, 4, weights=weights)
    expected = reference.route_top_k(logits.float(), 4, weights=weights)
    assert found.probs.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    for name in ("probs", "load", "balance_loss", "z_loss"):
        assert error(getattr(found, name), getattr(expected, name)) < 1e-6, name
    compare(
        lambda logits: differentiable(dk.route_top_k(logits, 4, weights=weights))[1:],
        lambda logits: differentiable(reference.route_top_k(logits.to(torch.promote_types(logits.dtype, torch.float32)), 4))[1:],
        logits=logits,
    )


# --- independent oracles -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "normalised"), [("softmax", False), ("renormalized", True)])
def test_transformers_router_agrees(weights, normalised):
    config = Qwen3MoeConfig(hidden_size=12, num_experts=10, num_experts_per_tok=3, norm_topk_prob=normalised)
    router = Qwen3MoeTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    x = normal(40, 12, seed=10, dtype=torch.float32)
    logits, expected, indices = router(x)
    found = dk.route_top_k(logits, 3, weights=weights)
    assert torch.equal(found.indices, indices)
    assert error(found.weights, expected) < 1e-6


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_transformers_balance_loss_agrees(masked):
    """Its load counts tokens (it sums to K), ours slots (it sums to 1)."""
    T, E, K = 60, 9, 3
    logits = normal(T, E, seed=11, dtype=torch.float32)
    mask = padding(T, seed=12) if masked else None
    expected = load_balancing_loss_func((logits,), E, K, None if mask is None else mask[None].long()) / K
    assert dk.route_top_k(logits, K, mask=mask).balance_loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_losses_by_hand(masked):
    T, E, K = 30, 6, 2
    logits = normal(T, E, seed=13)
    mask = padding(T, seed=14) if masked else torch.ones(T, dtype=torch.bool)
    routing = dk.route_top_k(logits, K, mask=mask)
    valid = logits[mask]
    count = torch.zeros(E, dtype=torch.float64)
    for row in valid:
        for e in row.argsort(descending=True)[:K]:
            count[e] += 1
    load = count / (K * len(valid))
    torch.testing.assert_close(routing.load.double(), load, rtol=1e-6, atol=1e-7)
    assert routing.balance_loss.item() == pytest.approx(E * (load * valid.softmax(-1).mean(0)).sum().item(), rel=1e-9)
    assert routing.z_loss.item() == pytest.approx(valid.exp().sum(-1).log().square().mean().item(), rel=1e-9)


def test_balance_loss_of_uniform_probabilities_is_one():
    assert dk.route_top_k(torch.zeros(7, 5), 2).balance_loss.item() == pytest.approx(1.0, rel=1e-6)


def test_unit_weights_carry_the_gradient_of_the_probabilities():
    logits = normal(20, 6, seed=15).requires_grad_()
    cotangent = normal(20, 2, seed=16)
    routing = dk.route_top_k(logits, 2)
    found = torch.autograd.grad((routing.weights * cotangent).sum(), logits)[0]
    q = logits.detach().softmax(-1)
    outer = torch.zeros_like(q).scatter_(1, routing.indices, cotangent)
    expected = q * (outer - (q * outer).sum(-1, keepdim=True))  # the softmax's Jacobian
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weights", ["softmax", "renormalized"])
def test_gradcheck(weights):
    logits = normal(6, 5, seed=17, scale=2.0).requires_grad_()
    torch.autograd.gradcheck(lambda z: differentiable(dk.route_top_k(z, 2, weights=weights)), logits)


# --- ties, order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("E", [5, 148])
def test_equal_logits_go_to_the_lower_index(E, device):
    indices = dk.route_top_k(torch.zeros(4, E, device=device), 3).indices
    assert indices.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("seed", range(4))
def test_ties(seed):
    logits = torch.randint(4, (50, 40), generator=generator(seed)).float()
    expected = [sorted(range(40), key=lambda e, row=row: (-row[e], e))[:9] for row in logits.tolist()]
    assert dk.route_top_k(logits, 9).indices.tolist() == expected


@given(T=st.integers(1, 20), E=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_invariants(T, E, seed, data):
    K = data.draw(st.integers(1, E))
    logits, mask = normal(T, E, seed=seed, scale=3.0), padding(T, seed=seed + 1)
    for weights in MODES:
        routing = dk.route_top_k(logits, K, weights=weights, mask=mask)
        assert routing.indices.shape == routing.weights.shape == (T, K)
        assert (routing.indices[~mask] == E).all()
        assert (routing.weights[~mask] == 0).all()
        assert (routing.indices[mask] < E).all()
        assert all(len(set(row)) == K for row in routing.indices[mask].tolist())
        chosen = logits[mask].gather(1, routing.indices[mask])
        assert (chosen.diff(dim=1) <= 0).all(), "best first"
        assert (routing.weights[mask] > 0).all()
        assert (routing.weights <= 1 + 1e-12).all()
        if weights == "renormalized":
            torch.testing.assert_close(routing.weights.sum(-1), mask.double(), rtol=0, atol=1e-12)
        assert routing.load.sum().item() == pytest.approx(float(mask.any()), abs=1e-6)
        assert (routing.load <= 1 / K + 1e-6).all()


# --- padding and empty inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
def test_padding_counts_in_nothing(weights):
    logits, mask = normal(30, 6, seed=20), padding(30, seed=21)
    other = torch.where(mask[:, None], logits, 1e4 * normal(30, 6, seed=22))
    only = dk.route_top_k(logits[mask], 2, weights=weights)

    def losses(routing):
        return routing.balance_loss, routing.z_loss, routing.weights

    a, b = (
        value_and_gradients(lambda logits: losses(dk.route_top_k(logits, 2, weights=weights, mask=mask)), {"logits": z})
        for z in (logits, other)
    )
    for name in ("output 0", "output 1", "output 2"):
        torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a["output 0"], only.balance_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(a["output 1"], only.z_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(a["output 2"][mask], only.weights, rtol=1e-12, atol=0)
    assert (a["gradient of logits"][~mask] == 0).all()
    assert (b["gradient of logits"][~mask] == 0).all()
    assert error(b["gradient of logits"], a["gradient of logits"]) < 1e-12


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("kind", ["no tokens", "only padding"])
def test_nothing_to_route(kind, weights):
    T = 0 if kind == "no tokens" else 4
    logits = torch.zeros(T, 6, requires_grad=True)
    routing = dk.route_top_k(logits, 2, weights=weights, mask=torch.zeros(T, dtype=torch.bool))
    assert routing.indices.shape == routing.weights.shape == (T, 2)
    assert routing.indices.eq(6).all()
    assert routing.load.tolist() == [0.0] * 6
    assert routing.balance_loss.item() == 0
    assert routing.z_loss.item() == 0
    (routing.balance_loss + routing.z_loss + routing.weights.sum()).backward()
    assert torch.equal(logits.grad, torch.zeros(T, 6))


def test_no_tokens_without_a_mask():
    routing = dk.route_top_k(torch.zeros(0, 6), 2)
    assert routing.indices.shape == (0, 2)
    assert (routing.balance_loss.item(), routing.z_loss.item()) == (0, 0)


# --- extremes, layouts, repeatability ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", MODES)
@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_extreme_logits_stay_finite(scale, weights):
    logits = normal(20, 6, seed=30, scale=scale, dtype=torch.float32)
    assert_finite(
        value_and_gradients(lambda logits: differentiable(dk.route_top_k(logits, 3, weights=weights)), {"logits": logits})
    )


@pytest.mark.parametrize("weights", MODES)
def test_any_strides(weights):
    logits = normal(20, 6, seed=31)
    run = lambda z: value_and_gradients(lambda logits: differentiable(dk.route_top_k(logits, 2, weights=weights)), {"logits": z})  # noqa: E731
    expected = run(logits)
    for z in (logits.T.contiguous().T, torch.zeros(40, 13, dtype=torch.float64)[::2, 1::2].copy_(logits)):
        assert not z.is_contiguous()
        found = run(z)
        assert all(error(found[name], expected[name]) < 1e-12 for name in expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weights", MODES)
@pytest.mark.usefixtures("nan_filled")
def test_repeatable_and_written_everywhere(weights, device):
    logits = normal(63, 37, seed=32, dtype=torch.float32).to(device)
    run = lambda: value_and_gradients(lambda logits: differentiable(dk.route_top_k(logits, 9, weights=weights)), {"logits": logits})  # noqa: E731
    first = run()
    assert_finite(first)
    assert_same(first, run())


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_never_waits_for_values_off_the_cpu(masked):
    """As float64 and more experts than a kernel takes are routed on a GPU: a tensor without values cannot be asked for any."""
    z = torch.empty(6, 600, device="meta")
    mask = torch.empty(6, dtype=torch.bool, device="meta") if masked else None
    for weights in MODES:
        outputs, _ = cpu.route(z, mask, 3, weights)
        assert outputs[3].shape == (600,)
    routing = dk.route_soft_top_k(z, 40.0, temperature=0.5, threshold=0.1, max_active=3, mask=mask)
    assert routing.load.shape == (600,)


def test_autocast_leaves_the_router_in_float32():
    logits = normal(20, 6, seed=33, dtype=torch.float32)
    expected = dk.route_top_k(logits, 2, weights="softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dk.route_top_k(logits, 2, weights="softmax")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_load_and_indices_carry_no_gradient():
    routing = dk.route_top_k(normal(9, 4, seed=34).requires_grad_(), 2)
    assert not routing.load.requires_grad
    assert routing.weights.requires_grad
    assert routing.probs.requires_grad


# --- bad inputs --------------------------------------------------------------------------------------------------------

BAD = {
    "no experts a token": ("top_k", {"top_k": 0}),
    "negative top_k": ("top_k", {"top_k": -1}),
    "more experts a token than experts": ("top_k", {"top_k": 5}),
    "logits of rank 1": ("router_logits", {"router_logits": torch.zeros(4)}),
    "logits of rank 3": ("router_logits", {"router_logits": torch.zeros(2, 3, 4)}),
    "integer logits": ("router_logits", {"router_logits": torch.zeros(6, 4, dtype=torch.int64)}),
    "unknown weights": ("weights", {"weights": "sigmoid"}),
    "mask of the wrong length": ("mask", {"mask": torch.ones(5, dtype=torch.bool)}),
    "mask of rank 2": ("mask", {"mask": torch.ones(6, 4, dtype=torch.bool)}),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(name, arguments):
    arguments = {"router_logits": torch.zeros(6, 4), "top_k": 2, **arguments}
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dk.route_top_k(arguments.pop("router_logits"), arguments.pop("top_k"), **arguments)


@pytest.mark.parametrize("rule", ["top_k", "soft"])
def test_padding_rows_may_hold_anything(rule):
    logits = torch.randn(6, 5)
    mask = torch.tensor([True, True, False, True, False, True])
    logits[2], logits[4] = float("nan"), float("inf")
    logits.requires_grad_()

    def route(z, m):
        if rule == "top_k":
            return dk.route_top_k(z, 2, mask=m)
        return dk.route_soft_top_k(z, 2.0, temperature=1.0, threshold=0.1, max_active=3, mask=m)

    routing, kept = route(logits, mask), route(logits.detach()[mask], None)
    assert torch.equal(routing.indices[mask], kept.indices)
    assert (routing.indices[~mask] == 5).all()
    torch.testing.assert_close(routing.balance_loss, kept.balance_loss)
    torch.testing.assert_close(routing.z_loss, kept.z_loss)
    (routing.weights.sum() + routing.balance_loss + routing.z_loss).backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask] == 0).all()


@pytest.mark.parametrize(("T", "E"), [(1, 5), (5, 1), (1, 1), (40, 7), (3000, 7), (1, 40)])
def test_the_logits_are_left_alone(T, E):
    """NumPy works on the tensor's own memory."""
    logits = normal(T, E, seed=9, dtype=torch.float32).requires_grad_()
    before = logits.detach().clone()
    routing = dk.route_top_k(logits, 1, weights="softmax")
    (routing.weights.sum() + routing.balance_loss + routing.z_loss).backward()
    assert torch.equal(logits.detach(), before)
