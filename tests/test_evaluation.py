"""Perplexity, load of the experts, reconstruction error."""

import math
from types import SimpleNamespace

import pytest
import torch
from shapes import normal
from tiny import E, K, V, dense_model, sparse_model, tokens
from torch import nn

from dotmoe_kernels.conversion import all_experts
from dotmoe_kernels.evaluation import (
    RoutingCounts,
    collect_load,
    load_summary,
    perplexity,
    reconstruction_error,
    retention,
    unused_experts,
    unused_line,
)


class Constant(nn.Module):
    """Logits [V] for every next token, whatever came before."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_perplexity_is_the_models_own_loss_exponentiated(batch_size):
    model, x = dense_model(), tokens(5, 12)
    with torch.no_grad():
        loss = sum(float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in x) / len(x)
    assert perplexity(model, x, batch_size=batch_size) == pytest.approx(math.exp(loss), rel=1e-5)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    assert perplexity(Constant(torch.full((V,), 0.3)), tokens(3, 7)) == pytest.approx(V, rel=1e-6)


def test_perplexity_of_a_known_distribution():
    logits = torch.full((4,), -math.inf)
    logits[1], logits[2] = math.log(0.25), math.log(0.75)
    x = torch.tensor([[0, 1, 2, 2], [0, 2, 2, 2]])  # the first token of a sequence is not predicted
    exact = (0.25 * 0.75**5) ** (-1 / 6)
    assert perplexity(Constant(logits), x) == pytest.approx(exact, rel=1e-6)


def test_an_impossible_token_is_infinitely_perplexing():
    logits = torch.zeros(4)
    logits[3] = -math.inf
    assert perplexity(Constant(logits), torch.tensor([[0, 3]])) == math.inf


def test_a_loss_beyond_the_range_of_exp_is_infinite():
    logits = torch.zeros(4)
    logits[1] = 2000.0
    assert perplexity(Constant(logits), torch.tensor([[0, 3]])) == math.inf


def test_perplexity_leaves_no_gradients():
    model = dense_model()
    perplexity(model, tokens())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, dtype=torch.int64), r"tokens is of shape \[4\]; allowed: shape \[N, S\]"),
        (torch.zeros(2, 4), "tokens is of dtype torch.float32; allowed: int64 or int32"),
        (torch.zeros(0, 4, dtype=torch.int64), r"tokens is of shape \[0, 4\]; allowed: at least one pair of tokens"),
        (torch.zeros(4, 1, dtype=torch.int64), r"tokens is of shape \[4, 1\]; allowed: at least one pair of tokens"),
    ],
    ids=["rank", "dtype", "empty", "one token"],
)
def test_bad_tokens(x, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Constant(torch.zeros(V)), x)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_bad_batch_size(batch_size):
    with pytest.raises(ValueError, match=f"batch_size is {batch_size}; allowed: an integer of at least 1"):
        perplexity(Constant(torch.zeros(V)), tokens(), batch_size=batch_size)


def test_retention():
    assert retention(10.0, 12.5) == 0.8
    assert retention(10.0, 10.0) == 1.0


def test_reconstruction_error_is_relative():
    y, noise = normal(9, 5, seed=1, scale=7), normal(9, 5, seed=2)
    assert reconstruction_error(y, y) == 0
    assert reconstruction_error(y, torch.zeros_like(y)) == pytest.approx(1)
    assert reconstruction_error(y, y + noise) == pytest.approx(float(noise.norm() / y.norm()), rel=1e-12)
    assert math.isfinite(reconstruction_error(torch.zeros(2, 2), torch.ones(2, 2)))


# --- load -----------------------------------------------------------------------------------------------------------------


def test_load_counts_what_the_router_chose():
    model, x = sparse_model(), tokens(4, 9)
    chosen = {}

    def record(name):
        return lambda module, args, output: chosen.setdefault(name, []).append(output[2])

    handles = [
        model.get_submodule(f"model.layers.{n}.mlp.gate").register_forward_hook(record(f"model.layers.{n}.mlp")) for n in range(2)
    ]
    with collect_load(model) as loads:
        perplexity(model, x, batch_size=2)
    for handle in handles:
        handle.remove()
    found = loads()
    assert list(found) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for name, load in found.items():
        counts = torch.bincount(torch.cat(chosen[name]).flatten(), minlength=E)
        assert int(counts.sum()) == x.numel() * K
        torch.testing.assert_close(load, counts.double() / counts.sum(), rtol=0, atol=1e-15)
        assert float(load.sum()) == pytest.approx(1, abs=1e-12)
        assert load.shape == (E,)


def test_every_expert_on_is_an_even_load():
    model = sparse_model(top_k=E)
    with collect_load(model) as loads:
        perplexity(model, tokens())
    assert all(torch.equal(load, torch.full((E,), 1 / E, dtype=torch.float64)) for load in loads().values())


def test_load_is_counted_only_inside():
    model = sparse_model()
    with collect_load(model) as loads:
        assert loads() == {}
        perplexity(model, tokens(1, 3))
        inside = loads()
    perplexity(model, tokens(4, 9, seed=8))
    assert all(torch.equal(loads()[name], load) for name, load in inside.items())
    with pytest.raises(KeyError), collect_load(model):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_has_no_load():
    with collect_load(dense_model()) as loads:
        pass
    assert loads() == {}


def test_load_of_an_unconverted_pass_is_not_mixed_in():
    model = sparse_model()
    with all_experts(model):
        perplexity(model, tokens())
    with collect_load(model) as loads:
        perplexity(model, tokens())
    assert any(float(load.max()) > 1 / E for load in loads().values())


def test_load_summary_counts_in_multiples_of_the_even_share():
    load = torch.tensor([0.0, 0.1, 0.15, 0.75, 0.0], dtype=torch.float64)
    found = load_summary(load)
    assert found == {"min": 0.0, "median": pytest.approx(0.5), "max": pytest.approx(3.75), "unused": 2}
    assert load_summary(torch.full((8,), 1 / 8)) == {"min": 1.0, "median": 1.0, "max": 1.0, "unused": 0}


# --- does a token tell its experts ----------------------------------------------------------------------------------------


def information(*batches, num_experts=E):
    counts = RoutingCounts()
    for indices in batches:
        counts.add("layer", torch.as_tensor(indices), num_experts)
    return counts.mutual_information()["layer"]


@pytest.mark.parametrize("row", [[0], [3, 5], [7, 1, 2], list(range(E))])
def test_the_same_experts_for_every_token_say_nothing(row):
    assert information([row] * 20) == pytest.approx(0, abs=1e-12)


def test_one_expert_told_by_the_token_is_the_entropy_of_the_load():
    expert_of = torch.tensor([0, 0, 0, 1, 1, 5])
    ids = torch.randint(0, 6, (1000,), generator=torch.Generator().manual_seed(0))
    load = torch.bincount(expert_of[ids], minlength=E).double() / 1000
    entropy = float(-torch.xlogy(load, load).sum())
    assert entropy > 0.5
    assert information(expert_of[ids][:, None]) == pytest.approx(entropy, rel=1e-12)
    assert information(*expert_of[ids][:, None].split(300)) == pytest.approx(entropy, rel=1e-12)  # batch by batch


def test_an_even_load_of_several_experts_is_log_of_e_over_k():
    rows = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert information(rows * 5) == pytest.approx(math.log(E / 2), rel=1e-12)


def test_tokens_with_different_numbers_of_experts():
    """r: (1, 0, 0), (1/2, 1/2, 0), (1/3, 1/3, 1/3); an empty slot is E, and a token without any counts nowhere."""
    mean = torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3], dtype=torch.float64) / 3
    expected = float(-(mean * mean.log()).sum()) - (math.log(2) + math.log(3)) / 3
    rows = [[0, 3, 3], [1, 0, 3], [2, 0, 1], [3, 3, 3]]
    assert information(rows, num_experts=3) == pytest.approx(expected, rel=1e-12)


def test_no_token_no_information():
    assert information(torch.zeros(0, 2, dtype=torch.int64)) == 0


def test_information_of_a_model():
    model, x = sparse_model(), tokens(8, 16)
    with collect_load(model) as counts:
        perplexity(model, x)
    for name, value in counts.mutual_information().items():
        load = counts()[name]
        assert value == pytest.approx(float(-torch.xlogy(load, load).sum()) - math.log(K), abs=1e-12)
        assert 0 < value < math.log(E / K)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "neuron_order"):
                module.gate.weight.zero_()  # ties go to the first experts
    with collect_load(model) as counts:
        perplexity(model, x)
    assert set(counts.mutual_information().values()) == {0.0}


def test_unused_experts_are_named_where_there_are_enough_slots_to_say():
    slots = {"a": torch.tensor([40, 0, 24, 0]), "b": torch.tensor([16, 16, 16, 16]), "c": torch.tensor([63, 0, 0, 0])}
    assert unused_experts(slots) == {"a": 2}  # c has fewer than 16 an expert
    line = "1 of 3 layers leave experts without a token (the most in a, 2 of 4)"
    assert unused_line({"a": 2}, slots) == line
