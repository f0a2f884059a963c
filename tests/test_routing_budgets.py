"""LayerBudgets: the layers' shared number of experts a token."""

import pytest
import torch
from shapes import normal

import dotmoe_kernels as dk
from dotmoe_kernels.routing.budgets import LayerBudgets


@pytest.mark.parametrize(("L", "kbar", "E"), [(1, 1, 2), (6, 2.5, 9), (28, 37, 148), (4, 1.0, 8), (3, 7.0, 8)])
def test_starts_even(L, kbar, E):
    k = LayerBudgets(L, kbar, E)()
    assert k.shape == (L,)
    assert k.dtype == torch.float32
    torch.testing.assert_close(k, torch.full((L,), float(kbar)))


def test_the_sum_stays_while_nothing_is_clamped():
    budgets = LayerBudgets(6, 2.5, 20)
    budgets.eta.data = normal(6, seed=0, dtype=torch.float32)
    k = budgets()
    share = budgets.eta.exp() / budgets.eta.exp().sum()
    torch.testing.assert_close(k, 1 + 6 * 1.5 * share)
    assert k.max() < 19, "otherwise this tests nothing"
    assert k.sum().item() == pytest.approx(15.0, rel=1e-6)


def test_stays_within_the_experts():
    budgets = LayerBudgets(4, 3, 8)
    budgets.eta.data = torch.tensor([50.0, 0.0, -50.0, 0.0])
    k = budgets()
    assert k.tolist() == [7.0, 1.0, 1.0, 1.0]
    k[0].backward()
    assert (budgets.eta.grad == 0).all(), "no gradient through a clamped layer"


def test_gradient():
    budgets = LayerBudgets(5, 2.0, 16)
    budgets.eta.data = normal(5, seed=1, dtype=torch.float32)
    cotangent = normal(5, seed=2, dtype=torch.float32)
    (budgets() * cotangent).sum().backward()
    share = budgets.eta.detach().softmax(0)
    expected = 5 * share * (cotangent - (share * cotangent).sum())
    torch.testing.assert_close(budgets.eta.grad, expected)


def test_a_layer_learns_its_budget_through_the_router():
    budgets = LayerBudgets(3, 2.0, 6)
    scores = normal(3, 10, 6, seed=3, dtype=torch.float32)
    k = budgets()
    for layer in range(3):
        routing = dk.route_soft_top_k(scores[layer], k[layer], temperature=0.5, threshold=0.1, max_active=4)
        (routing.weights.sum() * (layer + 1)).backward(retain_graph=True)
    assert budgets.eta.grad.abs().min() > 1e-3
    assert list(dict(budgets.named_parameters())) == ["eta"]
    half = LayerBudgets(3, 2.0, 6).to(torch.bfloat16)
    assert half().dtype == torch.float32


BAD = {
    "no layers": ("num_layers", (0, 2.0, 8)),
    "a fraction of layers": ("num_layers", (1.5, 2.0, 8)),
    "one expert": ("num_experts", (3, 1.0, 1)),
    "less than one a layer": ("mean_active", (3, 0.5, 8)),
    "every expert": ("mean_active", (3, 7.5, 8)),
    "NaN": ("mean_active", (3, float("nan"), 8)),
}


@pytest.mark.parametrize(("name", "arguments"), BAD.values(), ids=BAD.keys())
def test_bad_input(name, arguments):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        LayerBudgets(*arguments)
