"""The training-free partitions: exactly balanced, repeatable, and able to find what was planted."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shapes import AWKWARD, balanced_expert_of, generator, normal
from torch.nn import functional

from dotmoe_kernels.partitions import (
    Partition,
    activation_partition,
    balanced_kmeans,
    constant_direction,
    kmeans_partition,
    least_squares_router,
    noise_router,
    random_partition,
    shared_partition,
    start_affinity,
)

H, F, E, T = 16, 64, 4, 256


def sizes(expert_of, num_experts):
    return torch.bincount(expert_of, minlength=num_experts).tolist()


def even(F, E):
    """The first F % E experts take one more."""
    return [F // E + (e < F % E) for e in range(E)]


def agreement(found, planted, num_groups):
    """Share of neurons in the right group under the best matching of names."""
    table = torch.zeros(num_groups, num_groups).index_put_((planted, found), torch.ones(1), accumulate=True)
    return max(sum(float(table[g, e]) for g, e in enumerate(p)) for p in permutations(range(num_groups))) / len(planted)


def co_firing(seed=0, noise=0.05):
    """x [T, H], gate, up [F, H], down [H, F] and the group of each neuron: group g fires on the tokens of topic g alone."""
    group = balanced_expert_of(F, E, seed=seed)
    topic = torch.randint(0, E, (T,), generator=generator(seed + 1))
    x = noise * normal(T, H, seed=seed + 2, dtype=torch.float32)
    x[torch.arange(T), topic] += 1
    gate = noise * normal(F, H, seed=seed + 3, dtype=torch.float32)
    gate[:, :E] += 6 * functional.one_hot(group, E) - 3
    up, down = normal(F, H, seed=seed + 4, dtype=torch.float32), normal(H, F, seed=seed + 5, dtype=torch.float32)
    return x, gate, up, down, group, topic


def parts(kind, F, E, seed=0):
    weights = [normal(F, H, seed=i, dtype=torch.float32) for i in range(2)]
    down, x = normal(H, F, seed=2, dtype=torch.float32), normal(40, H, seed=3, dtype=torch.float32)
    draw = generator(seed)
    if kind == "random":
        return random_partition(F, E, H, draw)
    if kind == "kmeans":
        return kmeans_partition(*weights, E, draw)
    if kind == "shared":
        return shared_partition(x, *weights, down, E, "silu", draw, shared=E // 2)
    return activation_partition(x, *weights, down, E, "silu", draw)


KINDS = pytest.mark.parametrize("kind", ["random", "kmeans", "activation", "shared"])


@KINDS
@pytest.mark.parametrize(("F", "E"), [*AWKWARD, (64, 4), (10, 4), (7, 1)])
def test_experts_are_exactly_balanced(kind, F, E):
    partition = parts(kind, F, E)
    assert partition.expert_of.dtype == torch.int64
    assert partition.expert_of.shape == (F,)
    assert sizes(partition.expert_of, E) == even(F, E)
    assert partition.router_weight.dtype == torch.float32
    assert partition.router_weight.shape == (E, H)
    assert torch.isfinite(partition.router_weight).all()


@KINDS
def test_the_generator_fixes_the_partition(kind):
    first, again, other = (parts(kind, F, E, seed) for seed in (0, 0, 1))
    assert torch.equal(first.expert_of, again.expert_of)
    assert torch.equal(first.router_weight, again.router_weight)
    assert not torch.equal(first.expert_of, other.expert_of)


@given(F=st.integers(1, 40), E=st.integers(1, 40), seed=st.integers(0, 3))
def test_kmeans_is_balanced_for_any_shape(F, E, seed):
    if E <= F:
        assert sizes(balanced_kmeans(normal(F, 3, seed=seed), E, generator(seed)), E) == even(F, E)


def test_kmeans_of_equal_points_is_balanced():
    assert sizes(balanced_kmeans(torch.ones(12, 3), 4, generator(0)), 4) == [3] * 4


def test_kmeans_recovers_separated_clusters():
    found = []
    for seed in range(8):
        group = balanced_expert_of(F, E, seed=seed)
        points = 4 * torch.eye(E)[group] + 0.3 * normal(F, E, seed=seed + 50, dtype=torch.float32)
        found.append(agreement(balanced_kmeans(points, E, generator(seed)), group, E))
    assert sum(share == 1 for share in found) >= 5, found  # Lloyd's algorithm may stop at a local optimum
    assert min(found) > 0.5, found


def test_kmeans_never_ends_worse_than_its_first_assignment():
    points = normal(F, 6, seed=1, dtype=torch.float32)

    def cost(cluster_of):
        centres = torch.stack([points[cluster_of == e].mean(0) for e in range(E)])
        return float((points - centres[cluster_of]).square().sum())

    costs = [cost(balanced_kmeans(points, E, generator(0), max_iters=n)) for n in (1, 20)]
    assert costs[1] < 0.98 * costs[0]


def test_kmeans_partition_ignores_the_scale_of_a_neuron():
    group = balanced_expert_of(F, E, seed=3)
    direction = torch.eye(H)[group] + 0.05 * normal(F, H, seed=4, dtype=torch.float32)
    scale = torch.logspace(-2, 2, F)[torch.randperm(F, generator=generator(5)), None]
    best = max(
        agreement(kmeans_partition(direction * scale, direction * scale, E, generator(s)).expert_of, group, E) for s in range(4)
    )
    assert best == 1


def test_kmeans_partition_looks_at_gate_and_up():
    group = balanced_expert_of(F, E, seed=3)
    clear, same = torch.eye(H)[group], torch.ones(F, H)
    for gate, up in ((clear, same), (same, clear)):
        assert max(agreement(kmeans_partition(gate, up, E, generator(s)).expert_of, group, E) for s in range(4)) == 1


def test_activation_partition_recovers_neurons_that_fire_together():
    shares, chance = [], []
    for seed in range(6):
        x, gate, up, down, group, _ = co_firing(seed)
        shares.append(agreement(activation_partition(x, gate, up, down, E, "silu", generator(seed)).expert_of, group, E))
        chance.append(agreement(random_partition(F, E, H, generator(seed)).expert_of, group, E))
    assert min(shares) > max(chance), (shares, chance)
    assert sorted(shares)[2] > 0.9, shares


def test_activation_partition_weighs_neurons_by_their_part_of_the_output():
    """A neuron without an output column contributes nothing, however it fires."""
    x, gate, up, down, _, _ = co_firing()
    down[:, 5] = 0
    a = activation_partition(x, gate, up, down, E, "silu", generator(0))
    gate[5], up[5] = 7.0, -3.0
    b = activation_partition(x, gate, up, down, E, "silu", generator(0))
    assert torch.equal(a.expert_of, b.expert_of)
    torch.testing.assert_close(a.router_weight, b.router_weight)


def test_the_activation_router_sends_tokens_to_the_experts_that_fire():
    x, gate, up, down, group, topic = co_firing()
    for seed in range(6):
        partition = activation_partition(x, gate, up, down, E, "silu", generator(seed))
        if agreement(partition.expert_of, group, E) == 1:
            break
    expert_of_topic = torch.stack([partition.expert_of[group == g][0] for g in range(E)])
    assert torch.equal((x @ partition.router_weight.T).argmax(1), expert_of_topic[topic])


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_the_activation_of_the_model_is_the_one_that_counts(activation):
    x, gate, up, down, group, _ = co_firing()
    shares = [agreement(activation_partition(x, gate, up, down, E, activation, generator(s)).expert_of, group, E) for s in range(4)]
    assert max(shares) > 0.9


def with_a_constant(seed=0):
    """As ``co_firing``, with one vector in every input, a third of it by size, and 16 neurons that matter to every token."""
    x, gate, up, down, _, _ = co_firing(seed)
    x[:, E:] += 0.2
    important = torch.randperm(F, generator=generator(seed + 9))[: F // E]
    gate[important, E:] += 4
    down[:, important] *= 10
    return x, gate, up, down, important


@pytest.mark.parametrize("seed", range(4))
def test_the_shared_expert_holds_what_matters_to_every_token_and_every_token_visits_it(seed):
    x, gate, up, down, important = with_a_constant(seed)
    partition = shared_partition(x, gate, up, down, E, "silu", generator(seed), shared=1)
    assert set((partition.expert_of == 0).nonzero()[:, 0].tolist()) == set(important.tolist())
    logits = x @ partition.router_weight.T
    assert bool((logits.argmax(1) == 0).all())
    assert float(logits[:, 0].mean()) == pytest.approx(4, rel=0.02)
    assert float(logits[:, 0].std()) < 0.4
    others = shared_partition(x, gate, up, down, E, "silu", generator(seed), shared=0)
    assert len(set((x @ others.router_weight.T).argmax(1).tolist())) > 1


def test_two_shared_experts_are_not_alike():
    x, gate, up, down, _ = with_a_constant()
    first, second = shared_partition(x, gate, up, down, E, "silu", generator(0), shared=2).router_weight[:2]
    assert 1e-4 < float((x @ (first - second)).abs().max()) < 0.2


def test_without_shared_experts_it_is_the_activation_partition():
    x, gate, up, down, _ = with_a_constant()
    sample = (x, gate, up, down, E, "silu")
    ours, plain = shared_partition(*sample, generator(0), shared=0), activation_partition(*sample, generator(0))
    assert torch.equal(ours.expert_of, plain.expert_of)
    assert torch.equal(ours.router_weight, plain.router_weight)


@pytest.mark.parametrize("shared", [-1, E])
def test_more_shared_experts_than_there_are(shared):
    x, gate, up, down, _ = with_a_constant()
    with pytest.raises(ValueError, match=rf"shared is {shared}; allowed: 0 to E - 1 = 3"):
        shared_partition(x, gate, up, down, E, "silu", generator(0), shared=shared)


def test_the_constant_direction_makes_one_of_every_token():
    """Inputs m + noise off m: x c = 1 exactly; without a common part there is no such direction."""
    m = normal(H, seed=1)
    noise = normal(T, H, seed=2)
    x = m + noise - torch.outer(noise @ m, m) / m.dot(m)
    torch.testing.assert_close(x @ constant_direction(x, ridge=1e-9), torch.ones(T, dtype=x.dtype), rtol=1e-5, atol=0)
    assert float((noise @ constant_direction(noise)).mean()) < 0.5


# --- routers --------------------------------------------------------------------------------------------------------------


def test_least_squares_recovers_a_planted_router_up_to_scale():
    x, planted = normal(T, H, seed=1), normal(E, H, seed=2)
    targets = 3 * x @ planted.T + torch.arange(E)  # an offset of each expert is centred away
    found = least_squares_router(x, targets, ridge=0.0).double()
    centred = x - x.mean(0)
    exact = torch.linalg.lstsq(x, targets - targets.mean(0)).solution.T
    cosine = functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    assert float(cosine) > 1 - 1e-6
    assert float(functional.cosine_similarity(found.flatten(), planted.flatten(), dim=0)) > 0.99
    assert centred.shape == x.shape


def test_a_routers_logits_have_unit_variance():
    x, targets = 10 * normal(T, H, seed=1), 0.01 * normal(T, E, seed=2)
    logits = x @ least_squares_router(x, targets).double().T
    assert float(logits.std()) == pytest.approx(1, rel=1e-5)


def test_ridge_keeps_a_singular_problem_finite():
    x = normal(5, H, seed=1)  # fewer tokens than dimensions
    assert torch.isfinite(least_squares_router(x, normal(5, E, seed=2))).all()
    x[:, 3] = 0
    assert torch.isfinite(least_squares_router(x, torch.ones(5, E))).all()


def test_ridge_is_relative_to_the_inputs():
    x, targets = normal(T, H, seed=1), normal(T, E, seed=2)
    small, large = least_squares_router(x, targets, ridge=0.1), least_squares_router(1000 * x, targets, ridge=0.1)
    torch.testing.assert_close(small, 1000 * large, rtol=1e-5, atol=1e-6)


def test_noise_router_has_the_asked_deviation():
    w = noise_router(50, 200, generator(0), std=0.03)
    assert w.dtype == torch.float32
    assert float(w.std()) == pytest.approx(0.03, rel=0.05)
    assert abs(float(w.mean())) < 0.001


# --- starting from a partition --------------------------------------------------------------------------------------------


def test_start_affinity_without_a_partition_is_noise():
    a = start_affinity(None, (200, 50), strength=9.0, std=0.02, generator=generator(0))
    assert a.dtype == torch.float32
    assert float(a.std()) == pytest.approx(0.02, rel=0.05)


def test_start_affinity_leans_on_the_partition():
    expert_of = balanced_expert_of(F, E, seed=0)
    noise = start_affinity(None, (F, E), strength=0.5, std=0.01, generator=generator(0))
    found = start_affinity(Partition(expert_of, torch.zeros(E, H)), (F, E), strength=0.5, std=0.01, generator=generator(0))
    torch.testing.assert_close(found - noise, 0.5 * functional.one_hot(expert_of, E).float(), rtol=0, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [0, 6, -1])
def test_more_clusters_than_points(clusters):
    with pytest.raises(ValueError, match=f"num_clusters is {clusters}; allowed: 1 to F = 5"):
        balanced_kmeans(torch.zeros(5, 2), clusters, generator(0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_points_that_are_not_finite(value):
    points = torch.ones(6, 2)
    points[3, 1] = value
    with pytest.raises(ValueError, match="finite"):
        balanced_kmeans(points, 2, generator(0))


def test_an_unknown_activation():
    x, gate, up, down, *_ = co_firing()
    with pytest.raises(ValueError, match="activation is 'step'"):
        activation_partition(x, gate, up, down, E, "step", generator(0))
