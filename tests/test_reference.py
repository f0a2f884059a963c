"""The plain PyTorch method itself, against oracles that share no code with it."""

import pytest
import torch
from checks import error
from scipy.optimize import linear_sum_assignment
from shapes import balanced_expert_of, capacities, dense_ffn, generator, integer_capacities, normal, routed_indices, uniform
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dotmoe_kernels import reference

SILU = functional.silu


# --- transport ---------------------------------------------------------------------------------------------------------


def test_sinkhorn_by_multiplication():
    """The textbook iteration on exp(A / tau), without logarithms."""
    affinity, capacity, tau = normal(12, 4, seed=0), capacities(12, 4, seed=1), 0.7
    kernel = torch.exp(affinity / tau)
    v = torch.ones(4, dtype=torch.float64)
    for steps in range(1, 6):
        u = 1 / (kernel @ v)
        v = capacity / (kernel.T @ u)
        row, info = reference.sinkhorn(affinity, capacity, tau=tau, num_iters=steps)
        column = reference.sinkhorn(affinity, capacity, tau=tau, num_iters=steps, final="column")[0]
        assert error(column, u[:, None] * kernel * v) < 1e-13
        assert error(row, (1 / (kernel @ v))[:, None] * kernel * v) < 1e-13
        assert error(info.log_v, v.log()) < 1e-12


@pytest.mark.parametrize("final", ["row", "column"])
def test_sinkhorn_equals_pot_at_convergence(final):
    ot = pytest.importorskip("ot", reason="POT is not installed")
    affinity, capacity, tau = normal(20, 5, seed=2), capacities(20, 5, seed=3), 0.5
    ones = torch.ones(20, dtype=torch.float64)
    expected = ot.bregman.sinkhorn_log(ones, capacity, -affinity, reg=tau, numItermax=5000, stopThr=1e-14, warn=False)
    assert error(reference.sinkhorn(affinity, capacity, tau=tau, num_iters=1000, final=final)[0], expected) < 1e-11


def test_the_plan_is_optimal():
    """No feasible direction raises <A, P> + tau H(P)."""
    affinity, capacity, tau = normal(9, 4, seed=4), capacities(9, 4, seed=5), 0.5
    plan = reference.sinkhorn(affinity, capacity, tau=tau, num_iters=1000)[0]

    def objective(p):
        return (affinity * p).sum() - tau * (p * (p.log() - 1)).sum()

    for seed in range(20):
        direction = normal(9, 4, seed=100 + seed)
        direction = direction - direction.mean(0) - direction.mean(1, keepdim=True) + direction.mean()
        step = 1e-2 * plan.min() / direction.abs().max() * direction
        assert objective(plan + step) < objective(plan)


def test_sinkhorn_gradcheck():
    affinity, raw, init = normal(6, 3, seed=6), normal(3, seed=7), normal(3, seed=8)
    tau = torch.tensor(0.8, dtype=torch.float64)

    def function(affinity, tau, raw, init):
        return reference.sinkhorn(affinity, 6 * raw.softmax(-1), tau=tau, init=init, num_iters=3)[0]

    torch.autograd.gradcheck(function, [t.requires_grad_() for t in (affinity, tau, raw, init)])


def test_sinkhorn_counts_and_measures():
    affinity = torch.stack([normal(30, 5, seed=9, scale=s) for s in (0.01, 1.0)])
    plan, info = reference.sinkhorn(affinity, num_iters=100, tol=1e-6)
    assert 1 <= info.num_iters[0] < info.num_iters[1] < 100
    expected = (plan.sum(-2) / 6 - 1).abs().amax(-1)
    torch.testing.assert_close(info.error, expected)
    assert (info.error <= 1e-6).all()
    for layer in range(2):
        steps = int(info.num_iters[layer])
        assert error(plan[layer], reference.sinkhorn(affinity[layer], num_iters=steps)[0]) < 1e-13
        before = reference.sinkhorn(affinity[layer], num_iters=steps - 1)[1].error if steps > 1 else torch.tensor(1.0)
        assert before <= 1e-6 or steps == 1, "the last step's column sums are the error of the step before"
        earlier = reference.sinkhorn(affinity[layer], num_iters=steps - 2)[1].error if steps > 2 else torch.tensor(1.0)
        assert earlier > 1e-6


# --- rounding ----------------------------------------------------------------------------------------------------------


def by_deferred_acceptance(scores, capacity):
    """Neurons propose in their order of preference, experts hold their best: the stable matching under one order of pairs."""
    F, E = scores.shape
    rank = {(i, e): (-scores[i, e].item(), i * E + e) for i in range(F) for e in range(E)}
    wishes = [sorted(range(E), key=lambda e, i=i: rank[i, e]) for i in range(F)]
    held = [[] for _ in range(E)]
    free = list(range(F))
    while free:
        i = free.pop()
        e = wishes[i].pop(0)
        held[e] = sorted([*held[e], i], key=lambda i, e=e: rank[i, e])
        if len(held[e]) > capacity[e]:
            free.append(held[e].pop())
    return [next(e for e in range(E) if i in held[e]) for i in range(F)]


@pytest.mark.parametrize("seed", range(12))
def test_greedy_is_the_stable_matching(seed):
    levels = [2, 5, 1000][seed % 3]
    scores = torch.randint(levels, (17, 5), generator=generator(seed)).double()
    capacity = integer_capacities(17, 5, seed=seed).tolist()
    assert reference.greedy_assignment(scores, capacity).tolist() == by_deferred_acceptance(scores, capacity)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_is_close_to_the_best_assignment(seed):
    scores = normal(40, 5, seed=seed)
    columns = torch.arange(5).repeat_interleave(8)
    rows, chosen = linear_sum_assignment(scores[:, columns].numpy(), maximize=True)
    best = scores[rows, columns[chosen]].sum().item()
    expert_of = reference.greedy_assignment(scores, [8] * 5)
    assert torch.bincount(expert_of, minlength=5).tolist() == [8] * 5
    assert 0.9 * best <= scores.gather(1, expert_of[:, None]).sum().item() <= best + 1e-9


def test_straight_through():
    soft = normal(3, 4, seed=10).softmax(-1).requires_grad_()
    hard = functional.one_hot(soft.argmax(-1), 4)
    out = reference.straight_through(hard, soft)
    assert torch.equal(out, hard.double())
    assert torch.equal(torch.autograd.grad(out.sum(), soft)[0], torch.ones(3, 4, dtype=torch.float64))


# --- permutation -------------------------------------------------------------------------------------------------------


def test_expert_blocks():
    gate, up, down = dense_ffn(12, 5, seed=11)
    expert_of = balanced_expert_of(12, 3, seed=12)
    order = reference.neuron_order(expert_of)
    assert order.tolist() == sorted(range(12), key=lambda i: (expert_of[i].item(), i))
    gate_up_proj, down_proj = reference.expert_blocks(gate, up, down, order, 3)
    assert gate_up_proj.shape == (3, 8, 5)
    assert down_proj.shape == (3, 5, 4)
    assert down_proj.transpose(1, 2).is_contiguous()
    for e in range(3):
        mine = [i for i in range(12) if expert_of[i] == e]
        assert torch.equal(gate_up_proj[e, :4], gate[mine])
        assert torch.equal(gate_up_proj[e, 4:], up[mine])
        assert torch.equal(down_proj[e], down[:, mine])


# --- routing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_losses(masked):
    logits = normal(30, 6, seed=13)
    mask = uniform(30, seed=14) < 0.6 if masked else None
    routing = reference.route_top_k(logits, 2, mask=mask)
    expected = load_balancing_loss_func((logits,), 6, 2, None if mask is None else mask[None].long()) / 2
    assert routing.balance_loss.item() == pytest.approx(expected.item(), rel=1e-6)
    valid = logits if mask is None else logits[mask]
    assert routing.z_loss.item() == pytest.approx(valid.logsumexp(-1).square().mean().item(), rel=1e-12)
    assert routing.load.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("weights", ["unit", "softmax", "renormalized"])
def test_routed_weights(weights):
    logits = normal(10, 6, seed=15)
    q = logits.softmax(-1)
    top = q.topk(3)
    routing = reference.route_top_k(logits, 3, weights=weights)
    assert torch.equal(routing.indices, top.indices)
    expected = {"unit": torch.ones(10, 3).double(), "softmax": top.values, "renormalized": top.values / top.values.sum(-1, True)}
    torch.testing.assert_close(routing.weights, expected[weights], rtol=1e-12, atol=0)


# --- soft top-k --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "ties", "small k", "large k"])
def test_soft_top_k_gradcheck(case):
    scores = torch.zeros(3, 5, dtype=torch.float64) if case == "ties" else normal(3, 5, seed=16)
    k = {"small k": 1e-3, "large k": 5 - 1e-3}.get(case, 1.7)
    inputs = [scores, torch.full((3,), k, dtype=torch.float64), torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)]
    p = reference.soft_top_k(inputs[0], inputs[1], temperature=inputs[2])
    assert (p.sum(-1) - k).abs().max() < 1e-12
    function = lambda s, k, t: reference.soft_top_k(s, k, temperature=t)  # noqa: E731
    torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


def test_soft_top_k_is_the_laplace_distribution():
    scores, k = normal(4, 7, seed=17), 2.3
    p = reference.soft_top_k(scores, k)
    z = torch.where(p <= 0.5, (2 * p).log(), -(2 * (1 - p)).log())  # the quantiles: scores less one threshold a row
    shift = scores - z
    assert (shift - shift[:, :1]).abs().max() < 1e-10


# --- dispatch and experts ----------------------------------------------------------------------------------------------


def test_expert_ffn_by_loop():
    indices = routed_indices(9, 3, 5, seed=18, empty=0.3)
    x, weights = normal(9, 6, seed=19), normal(9, 3, seed=20)
    gate_up, down = normal(5, 8, 6, seed=21), normal(5, 6, 4, seed=22)
    expected = torch.zeros(9, 6, dtype=torch.float64)
    for t in range(9):
        for j in range(3):
            e = indices[t, j].item()
            if e < 5:
                hidden = SILU(gate_up[e, :4] @ x[t]) * (gate_up[e, 4:] @ x[t])
                expected[t] += weights[t, j] * (down[e] @ hidden)
    assert error(reference.expert_ffn(x, gate_up, down, indices, weights, activation=SILU), expected) < 1e-13


def test_expert_ffn_gradcheck():
    indices = torch.tensor([[0, 1], [2, 0], [1, 1]])  # of two experts: 2 is empty
    tensors = [normal(3, 4, seed=23), normal(2, 6, 4, seed=24), normal(2, 4, 3, seed=25), normal(3, 2, seed=26)]

    def function(x, gate_up, down, weights):
        return reference.expert_ffn(x, gate_up, down, indices, weights, activation=SILU)

    torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors])


def test_masked_ffn_equals_expert_ffn_and_dense():
    F, E, T, K, H = 24, 4, 9, 2, 6
    gate, up, down = dense_ffn(F, H, seed=27)
    expert_of = balanced_expert_of(F, E, seed=28)
    indices, x, weights = routed_indices(T, K, E, seed=29, empty=0.2), normal(T, H, seed=30), normal(T, K, seed=31)
    blocks = reference.expert_blocks(gate, up, down, reference.neuron_order(expert_of), E)
    expected = reference.expert_ffn(x, *blocks, indices, weights, activation=SILU)
    found = reference.masked_ffn(x, gate, up, down, expert_of, indices, weights=weights, activation=SILU)
    assert error(found, expected) < 1e-13
    everything = torch.arange(E).expand(T, E)
    dense = (SILU(x @ gate.T) * (x @ up.T)) @ down.T
    assert error(reference.masked_ffn(x, gate, up, down, expert_of, everything, activation=SILU), dense) < 1e-13


# --- losses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_distillation_losses(masked):
    teacher, student = normal(2, 7, 11, seed=32), normal(2, 7, 11, seed=33)
    labels = torch.randint(11, (2, 7), generator=generator(34))
    mask = torch.ones(2, 7, dtype=torch.bool)
    if masked:
        mask[0, 5:] = mask[1, 3:] = False
    kl, ce = reference.distillation_losses(teacher, student, labels, mask if masked else None)
    log_p, log_q = (z.log_softmax(-1)[mask] for z in (teacher, student))
    assert kl.item() == pytest.approx(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item(), rel=1e-12)
    target = mask[:, 1:]  # padding is on the right: a token that is valid has a valid one before it
    expected = functional.cross_entropy(student[:, :-1][target], labels[:, 1:][target])
    assert ce.item() == pytest.approx(expected.item(), rel=1e-12)
    assert reference.distillation_losses(teacher, teacher, labels)[0].abs() < 1e-14
