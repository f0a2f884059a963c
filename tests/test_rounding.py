"""balanced_assignment: plan -> exactly balanced hard assignment; straight_through."""

import math

import numpy as np
import pytest
import torch
from checks import DEVICES
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from shapes import AWKWARD, clustered, integer_capacities, normal

import dotmoe_kernels as dk
from dotmoe_kernels import reference


def even(F, E):
    return [F // E + (e < F % E) for e in range(E)]


def best_assignment(scores, capacity):
    """Largest total score [scipy over repeated columns]."""
    columns = np.repeat(np.arange(scores.shape[1]), capacity)
    rows, chosen = linear_sum_assignment(scores.numpy()[:, columns], maximize=True)
    assert (rows == np.arange(scores.shape[0])).all()
    return torch.from_numpy(columns[chosen])


def total(scores, expert_of):
    return scores.gather(-1, expert_of[..., None]).sum().item()


# --- against the reference ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("F", "E"), AWKWARD)
def test_equals_greedy(F, E, dtype, device):
    scores = normal(F, E, seed=0, dtype=dtype)  # sixteen bits make thousands of ties
    expert_of = dk.balanced_assignment(scores.to(device))
    assert expert_of.dtype == torch.int64
    assert expert_of.cpu().tolist() == reference.greedy_assignment(scores, even(F, E)).tolist()


@pytest.mark.parametrize("levels", [1, 2, 3, 10])
@pytest.mark.parametrize("seed", range(4))
def test_ties_go_to_the_first_pair_in_row_major_order(levels, seed):
    scores = torch.randint(levels, (63, 7), generator=torch.Generator().manual_seed(seed)).float()
    for capacity in (even(63, 7), integer_capacities(63, 7, seed=seed).tolist()):
        expected = reference.greedy_assignment(scores, capacity)
        assert dk.balanced_assignment(scores, capacity).tolist() == expected.tolist()


def test_equal_scores_fill_the_experts_in_order():
    assert dk.balanced_assignment(torch.zeros(8, 3)).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_the_two_zeros_tie():
    scores = torch.tensor([[-0.0, 0.0], [0.0, -0.0], [0.0, 0.0], [-0.0, -0.0]])
    assert dk.balanced_assignment(scores).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("F", "E"), [(200, 16), (63, 7)])
def test_identical_rows(F, E, device):
    scores = normal(1, E, seed=1, dtype=torch.float32).expand(F, E)
    assert dk.balanced_assignment(scores.to(device)).tolist() == reference.greedy_assignment(scores, even(F, E)).tolist()


def test_every_row_prefers_one_expert():
    scores = normal(60, 6, seed=2) + 50 * torch.eye(6, dtype=torch.float64)[3]
    assert dk.balanced_assignment(scores).tolist() == reference.greedy_assignment(scores, even(60, 6)).tolist()


def test_a_hidden_assignment_is_found():
    scores = clustered(96, 8, seed=3, strength=20.0)
    expert_of = dk.balanced_assignment(scores)
    assert torch.equal(expert_of, scores.argmax(-1))


def test_scores_of_a_saturated_plan():
    affinity = clustered(48, 6, seed=4, strength=10.0)
    plan, info = dk.sinkhorn(affinity, tau=0.1, return_info=True)
    scores = affinity / 0.1 + info.log_u[:, None] + info.log_v
    assert dk.balanced_assignment(scores).tolist() == reference.greedy_assignment(scores, even(48, 6)).tolist()
    assert torch.bincount(dk.balanced_assignment(plan), minlength=6).tolist() == even(48, 6)


# --- capacities --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("F", "E"), [(11, 4), (7, 5), (1000, 37)])
def test_the_first_experts_take_one_more(F, E):
    expert_of = dk.balanced_assignment(normal(F, E, seed=10))
    assert torch.bincount(expert_of, minlength=E).tolist() == even(F, E)


@pytest.mark.parametrize("kind", [list, torch.tensor, lambda c: torch.tensor(c, dtype=torch.int32)], ids=["list", "int64", "int32"])
def test_capacity_may_be(kind):
    capacity = [5, 0, 1, 6]
    scores = normal(12, 4, seed=11)
    expert_of = dk.balanced_assignment(scores, kind(capacity))
    assert torch.bincount(expert_of, minlength=4).tolist() == capacity
    assert expert_of.tolist() == reference.greedy_assignment(scores, capacity).tolist()


@pytest.mark.parametrize("capacity", [[12, 0, 0, 0], [0, 0, 0, 12], [0, 6, 6, 0]], ids=str)
def test_zero_capacities(capacity):
    scores = normal(12, 4, seed=12)
    assert dk.balanced_assignment(scores, capacity).tolist() == reference.greedy_assignment(scores, capacity).tolist()


def test_more_experts_than_neurons_with_given_capacities():
    scores = normal(3, 5, seed=13)
    assert dk.balanced_assignment(scores, [1, 0, 1, 0, 1]).tolist() == reference.greedy_assignment(scores, [1, 0, 1, 0, 1]).tolist()


@given(F=st.integers(1, 40), E=st.integers(1, 9), levels=st.integers(1, 50), seed=st.integers(0, 999))
def test_exact_capacities_and_greedy(F, E, levels, seed):
    scores = torch.randint(levels, (F, E), generator=torch.Generator().manual_seed(seed)).double() / levels
    capacity = integer_capacities(F, E, seed=seed)
    expert_of = dk.balanced_assignment(scores, capacity)
    assert torch.equal(torch.bincount(expert_of, minlength=E), capacity)
    assert expert_of.tolist() == reference.greedy_assignment(scores, capacity.tolist()).tolist()


# --- batches and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_equals_its_layers(device):
    scores = normal(2, 3, 30, 4, seed=20, dtype=torch.float32)
    capacity = torch.stack([integer_capacities(30, 4, seed=s) for s in range(6)]).view(2, 3, 4)
    shared, own = dk.balanced_assignment(scores.to(device)), dk.balanced_assignment(scores.to(device), capacity.to(device))
    assert shared.shape == own.shape == (2, 3, 30)
    for i in range(2):
        for j in range(3):
            assert shared[i, j].tolist() == reference.greedy_assignment(scores[i, j], even(30, 4)).tolist()
            assert own[i, j].tolist() == reference.greedy_assignment(scores[i, j], capacity[i, j].tolist()).tolist()


def test_one_capacity_serves_every_layer():
    scores = normal(3, 12, 4, seed=21)
    expected = [reference.greedy_assignment(s, [5, 0, 1, 6]).tolist() for s in scores]
    assert dk.balanced_assignment(scores, [5, 0, 1, 6]).tolist() == expected
    assert dk.balanced_assignment(scores, torch.tensor([5, 0, 1, 6])).tolist() == expected


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_any_strides(layout):
    scores = normal(30, 4, seed=22)
    if layout == "transposed":
        scores = scores.T.contiguous().T
    elif layout == "sliced":
        scores = torch.zeros(60, 9, dtype=torch.float64)[::2, 1::2].copy_(scores)
    else:
        scores = scores[:, :1].expand(30, 4)
    assert not scores.is_contiguous()
    assert dk.balanced_assignment(scores).tolist() == dk.balanced_assignment(scores.contiguous()).tolist()


def test_an_empty_batch():
    expert_of, gap = dk.balanced_assignment(torch.zeros(0, 12, 4), return_gap=True)
    assert expert_of.shape == (0, 12)
    assert expert_of.dtype == torch.int64
    assert gap.shape == (0,)


def test_scores_are_left_alone_and_carry_no_gradient():
    scores = normal(12, 4, seed=23).requires_grad_()
    before = scores.detach().clone()
    expert_of, gap = dk.balanced_assignment(scores, return_gap=True)
    assert torch.equal(scores.detach(), before)
    assert not expert_of.requires_grad
    assert not gap.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.usefixtures("nan_filled")
def test_repeatable(device):
    scores = normal(2, 296, 148, seed=24, dtype=torch.float32).to(device)
    first, second = (dk.balanced_assignment(scores, return_gap=True) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


# --- the certificate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_gap_bounds_the_loss_against_the_best_assignment(seed):
    scores = normal(40, 5, seed=30 + seed)
    capacity = integer_capacities(40, 5, seed=seed) if seed % 2 else torch.tensor(even(40, 5))
    expert_of, gap = dk.balanced_assignment(scores, capacity, return_gap=True)
    assert gap.shape == ()
    assert gap.item() == pytest.approx(scores.amax(-1).sum().item() - total(scores, expert_of), abs=1e-9)
    loss = total(scores, best_assignment(scores, capacity)) - total(scores, expert_of)
    assert -1e-9 <= loss <= gap.item() + 1e-9


def test_gap_of_converged_scores_is_tight():
    """Rounding the potentials' scores loses little, and the gap says so without knowing the best assignment."""
    affinity, tau = clustered(96, 6, seed=40), 0.1
    info = dk.sinkhorn(affinity, tau=tau, num_iters=2000, return_info=True)[1]
    scores = affinity / tau + info.log_u[:, None] + info.log_v
    expert_of, gap = dk.balanced_assignment(scores, return_gap=True)
    loss = total(affinity, best_assignment(affinity, even(96, 6))) - total(affinity, expert_of)
    assert -1e-9 <= loss <= tau * gap.item() + 1e-9
    assert tau * gap.item() < 0.05 * total(affinity, expert_of)


def test_no_gap_when_every_neuron_gets_its_favourite():
    expert_of, gap = dk.balanced_assignment(clustered(96, 8, seed=41, strength=20.0), return_gap=True)
    assert expert_of.shape == (96,)
    assert gap.item() == 0


def test_gap_of_a_batch():
    scores = normal(3, 40, 5, seed=42)
    expert_of, gap = dk.balanced_assignment(scores, return_gap=True)
    assert gap.shape == (3,)
    expected = (scores.amax(-1) - scores.gather(-1, expert_of[..., None])[..., 0]).sum(-1)
    torch.testing.assert_close(gap.double(), expected, rtol=1e-6, atol=1e-6)


# --- bad inputs --------------------------------------------------------------------------------------------------------

GOOD = torch.zeros(12, 4)
BAD = {
    "fractional capacity": ("capacity", GOOD, [2.5, 3.5, 3.0, 3.0]),
    "fractional capacity tensor": ("capacity", GOOD, torch.tensor([2.5, 3.5, 3.0, 3.0])),
    "capacity that sums to less": ("capacity", GOOD, [2, 2, 2, 2]),
    "capacity that sums to more": ("capacity", GOOD, torch.tensor([4, 4, 4, 4])),
    "negative capacity": ("capacity", GOOD, [-1, 5, 4, 4]),
    "capacity of the wrong length": ("capacity", GOOD, [6, 3, 3]),
    "capacity of the wrong batch": ("capacity", GOOD.expand(2, 12, 4), torch.full((3, 4), 3)),
    "one bad layer of capacity": ("capacity", GOOD.expand(2, 12, 4), torch.tensor([[3, 3, 3, 3], [3, 3, 3, 2]])),
    "more experts than neurons": ("E <= F", torch.zeros(3, 5), None),
    "NaN scores": ("scores", GOOD.clone().fill_diagonal_(math.nan), None),
    "scores of rank 1": ("scores", torch.zeros(12), None),
}


@pytest.mark.parametrize(("name", "scores", "capacity"), BAD.values(), ids=BAD.keys())
def test_bad_input(name, scores, capacity):
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        dk.balanced_assignment(scores, capacity)


# --- straight-through --------------------------------------------------------------------------------------------------


def one_hot_of(soft):
    return torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1])


@pytest.mark.parametrize("hard_dtype", [torch.int64, torch.bool, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_straight_through(dtype, hard_dtype):
    soft = torch.softmax(normal(2, 9, 4, seed=50, dtype=dtype), -1).requires_grad_()
    hard = one_hot_of(soft).to(hard_dtype)
    out = dk.straight_through(hard, soft)
    assert out.dtype == dtype
    assert torch.equal(out, hard.to(dtype)), "the forward is exactly hard"
    cotangent = normal(2, 9, 4, seed=51, dtype=dtype)
    assert torch.equal(torch.autograd.grad(out, soft, cotangent)[0], cotangent), "the backward is the identity to soft"


def test_straight_through_passes_on_to_what_made_soft():
    logits = normal(9, 4, seed=52).requires_grad_()
    soft = torch.softmax(logits, -1)
    cotangent = normal(9, 4, seed=53)
    found = torch.autograd.grad(dk.straight_through(one_hot_of(soft), soft), logits, cotangent)[0]
    expected = torch.autograd.grad(torch.softmax(logits, -1), logits, cotangent)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_straight_through_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\bhard\b"):
        dk.straight_through(torch.zeros(3, 4), torch.zeros(4, 3))
