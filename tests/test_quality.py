"""bench.quality: what is compared is what it says, balanced, of one budget, of a source."""

import math

import pytest
import tiny
import torch

from bench.quality import clusterings, pruning, transports
from bench.quality.ablations import ablations, varied
from bench.quality.layers import VariantFFN, neurons, shared_neurons
from bench.quality.measuring import measure
from bench.quality.methods import METHODS, Job
from bench.quality.presets import PRESETS
from bench.quality.settings import Held, Topology
from dotmoe_kernels.alignment.config import INITS, AlignmentConfig
from dotmoe_kernels.alignment.loop import align
from dotmoe_kernels.alignment.transport import Transport
from dotmoe_kernels.conversion import find_ffns

TOPOLOGY = Topology(tiny.E, tiny.K)
named = {method.name: method for method in METHODS}


def job(**options):
    return Job(tiny.dense_model(), TOPOLOGY, tiny.tokens(64, 16), AlignmentConfig(steps=2, **options))


def held(rows=4, length=16):
    tokens = tiny.tokens(rows, length, seed=5)
    return Held(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.arange(rows), [str(n) for n in range(rows)])


# --- the registries ---


def test_every_arm_has_a_source_and_says_what_it_does():
    arms = [*METHODS, *ablations(AlignmentConfig()), *(arm for parts in PRESETS.values() for part in parts for arm in part.arms())]
    for arm in arms:
        assert (arm.source and arm.about) or arm.name == "dense", arm.name
        assert not set(arm.name) & set("/: "), "it names a file"
    for start in INITS:
        assert any(arm.kind == "dot" and AlignmentConfig(**arm.options).init == start for arm in METHODS), start
    for preset, parts in PRESETS.items():
        for part in parts:
            names = [arm.name for arm in part.arms()]
            assert len(names) == len(set(names)), preset


def test_an_ablation_differs_from_dot():
    base = AlignmentConfig(backward="implicit", centre=True)
    names = {arm.name for arm in ablations(base)}
    assert {
        name for parts in PRESETS.values() for part in parts if isinstance(part.ablations, tuple) for name in part.ablations
    } <= names
    assert {"unrolled", "no-centre", "hidden"} <= names
    assert not {"implicit", "centre", "no-hidden"} & names
    assert "no-hidden" in {arm.name for arm in ablations(AlignmentConfig(hidden=4.0))}


# --- routed ---


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.kind in ("moe", "dot")])
def test_every_assignment_is_balanced_and_a_token_visits_as_many_neurons(name):
    work = job(**named[name].options)
    made = named[name].make(work)
    if made.layers[next(iter(made.layers))].affinity is not None:
        named[name].transport(made.layers, work.options).refresh(0.1)
    found = measure(work.model, made.layers, made.zeroed, held())
    width, visited = tiny.F // tiny.E, []
    for layer in made.layers.values():
        layer.plan = None
        sizes = neurons(layer)
        if name == "masks":
            visited.append(float(sizes.double().mean()))
            continue
        assert torch.equal(sizes, torch.full_like(sizes, width)), "exactly F / E each"
        shared = shared_neurons(layer)
        assert int(sizes.sum()) + shared == tiny.F
        assert layer.top_k * width + shared == tiny.K * width
        assert layer.top_k >= 1
    if name == "masks":
        assert sum(visited) / len(visited) == pytest.approx(tiny.K * width, abs=0.5), "one budget, all layers together"
        return
    dense = sum(p.numel() for p in tiny.dense_model().parameters())
    routers = sum(layer.router_weight.numel() for layer in made.layers.values())
    assert found["active_parameters"] == dense + routers - len(made.layers) * 3 * tiny.H * (tiny.F - tiny.K * width)


ARMS = {arm.name: arm for arm in [*METHODS, *ablations(AlignmentConfig())]}


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.trained])
def test_every_arm_takes_a_step_in_16_bits(name):
    arm, tokens = ARMS[name], tiny.tokens(8, 16)
    options = AlignmentConfig(**({"steps": 1, "batch_size": 2} | arm.options))
    work = Job(tiny.dense_model(dtype=torch.bfloat16), TOPOLOGY, tokens, options)
    made = arm.make(work)
    before = [layer.router_weight.detach().clone() for layer in made.layers.values()]
    result = align(work.model, made.layers, tokens, options, progress=False, transport=arm.transport)
    assert math.isfinite(result.log[0]["loss"])
    assert any(not torch.equal(old, layer.router_weight) for old, layer in zip(before, made.layers.values(), strict=True))
    assert math.isfinite(measure(work.model, made.layers, made.zeroed, held())["perplexity"])


def test_shared_experts_hold_the_neurons_most_often_among_the_strongest():
    work = job()
    inputs = torch.randn(200, tiny.H)
    ffn = next(iter(work.ffns.values()))
    layer = VariantFFN(
        ffn.gate_proj,
        ffn.up_proj,
        ffn.down_proj,
        router_weight=torch.zeros(tiny.E, tiny.H),
        top_k=tiny.K,
        activation=ffn.activation,
    )
    rate = clusterings.strongest(clusterings.hidden_size(layer, inputs)).mean(0)
    clusterings.by_rate(layer, inputs, torch.Generator().manual_seed(0))
    always = layer.expert_of >= layer.num_experts
    assert int(always.sum()) == tiny.F // tiny.E
    assert float(rate[always].min()) >= float(rate[~always].max())


def test_the_shared_forward_is_the_sum_of_its_experts():
    made = named["shared-rate"].make(job())
    layer = next(iter(made.layers.values()))
    x = torch.randn(7, tiny.H)
    y = layer(x)
    inner = torch.nn.functional.silu(x @ layer.gate_proj.T) * (x @ layer.up_proj.T)
    for t in range(7):
        on = [*layer.routing.indices[t].tolist(), *range(layer.num_experts, layer.num_experts + layer.shared)]
        chosen = torch.isin(layer.expert_of, torch.tensor(on))
        torch.testing.assert_close(y[t], (inner[t] * chosen) @ layer.down_proj.T, rtol=1e-4, atol=1e-4)


def first_layer(**attributes):
    work = job()
    layers = varied(**attributes)(work).layers
    Transport(layers, work.options).refresh(1.0)
    return next(iter(layers.values()))


def test_a_bias_evens_the_load_and_stays():
    """Of inputs with a common part, which gives the first experts every token; without a gradient nothing moves."""
    layer = first_layer(bias_rate=2e-3)
    x = torch.randn(400, tiny.H) + 3 * torch.nn.functional.normalize(layer.router_weight[0].detach(), dim=0)
    layer(x)
    before, mean = layer.routing.load.max(), 1 / layer.num_experts
    for _ in range(300):
        layer(x)
    with torch.no_grad():
        layer(x)
        bias, chosen = layer.bias, layer.routing.indices
        layer(x)
    assert torch.equal(layer.bias, bias)
    assert before > 1.5 * mean
    assert layer.routing.load.max() < 1.15 * mean
    logits = x @ layer.router_weight.T
    assert torch.equal(chosen.sort(1).values, (logits + bias).topk(layer.top_k).indices.sort(1).values)
    assert torch.allclose(layer.routing.probs, logits.softmax(1), atol=1e-5)  # the gradient's, without it


def test_a_sharper_balance_term_sees_what_the_logits_choose():
    x, plain, sharp = torch.randn(400, tiny.H) + 1, first_layer(), first_layer(sharpness=100.0)
    assert torch.equal(plain(x), sharp(x))
    soft = sharp.num_experts * (sharp.routing.load * sharp.routing.probs.mean(0)).sum()
    assert float(plain.routing.balance_loss) == pytest.approx(float(soft), rel=1e-4)
    first = torch.nn.functional.one_hot(sharp.routing.indices[:, 0], sharp.num_experts).float().mean(0)
    hard = sharp.num_experts * (sharp.routing.load * first).sum()
    assert float(sharp.routing.balance_loss) == pytest.approx(float(hard), rel=0.05)


def test_a_cut_finds_the_blocks_of_a_graph():
    true = torch.arange(24) % 4
    weights = 0.1 * torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    weights = weights + weights.T + (true[:, None] == true[None]).float()
    found = clusterings.balanced_cut(weights, 4, torch.Generator().manual_seed(1))
    assert torch.equal(torch.bincount(found), torch.full((4,), 6))
    assert all(len(set(true[found == e].tolist())) == 1 for e in range(4))


def test_exchanges_only_gain():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(32, 32, generator=generator)
    weights = (weights + weights.T).fill_diagonal_(0).double()
    start = torch.randperm(32, generator=generator) % 4
    found = clusterings.refine(weights, start, 4, swaps=100)
    assert torch.equal(torch.bincount(found), torch.bincount(start))
    assert clusterings.inside(weights, found) > clusterings.inside(weights, start)
    assert torch.equal(clusterings.refine(weights, found, 4, swaps=100), found)


def test_optimal_rounding_is_at_least_the_greedy():
    from dotmoe_kernels.rounding import balanced_assignment

    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    best, greedy = transports.optimal_assignment(scores), balanced_assignment(scores)
    assert torch.equal(torch.bincount(best), torch.full((8,), 8))
    kept = [float(scores.gather(1, of[:, None]).sum()) for of in (best, greedy)]
    assert kept[0] > kept[1]


# --- static ---


def test_structured_pruning_has_the_active_parameters_of_the_moe():
    dense = sum(p.numel() for p in tiny.dense_model().parameters())
    layers, width = len(find_ffns(tiny.dense_model())), 3 * tiny.H
    budget = dense + layers * (tiny.E * tiny.H - width * (tiny.F - tiny.K * tiny.F // tiny.E))
    for name in ("prune-magnitude", "prune-wanda"):
        work = job()
        made = named[name].make(work)
        found = measure(work.model, made.layers, made.zeroed, held())
        assert budget - layers * width < found["active_parameters"] <= budget, "as near as whole neurons allow"
        assert math.isfinite(found["perplexity"])


def test_pruning_keeps_the_neurons_of_the_largest_scores():
    model = tiny.dense_model()
    ffns = find_ffns(model)
    first = next(iter(ffns))
    score = pruning.wanda_scores(model, ffns, tiny.tokens(4, 16))
    kept = score[first].topk(pruning.neurons_kept(tiny.F, tiny.H, tiny.E, tiny.K)).indices.sort().values
    expected = ffns[first].gate_proj[kept].clone()
    pruning.keep_neurons(ffns, score, tiny.E, tiny.K)
    assert torch.equal(find_ffns(model)[first].gate_proj, expected)


def test_the_blocks_of_least_influence_are_dropped():
    model = tiny.dense_model(num_hidden_layers=4)
    size = sum(p.numel() for p in model.model.layers[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    kept = [model.model.layers[n] for n in (0, 3)]
    pruning.drop_blocks(model, torch.tensor([0.9, 0.1, 0.2, 0.8]), total - 2 * size + size // 3)
    assert list(model.model.layers) == kept
    assert model(input_ids=tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("name", ["2to4-magnitude", "2to4-wanda"])
def test_two_of_every_four_weights_stay(name):
    work = job()
    made = named[name].make(work)
    linears = pruning.block_linears(work.model)
    assert len(made.zeroed) == len(linears) == 2 * 7
    for linear in linears.values():
        four = (linear.weight != 0).view(linear.weight.shape[0], -1, 4).sum(2)
        assert torch.equal(four, torch.full_like(four, 2))
    half = sum(weight.numel() for weight in made.zeroed) // 2
    total = sum(p.numel() for p in work.model.parameters())
    assert measure(work.model, {}, made.zeroed, held())["active_parameters"] == total - half


def test_two_to_four_keeps_the_largest_scores():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 5.0, 6.0, 7.0, 8.0]])
    assert pruning.two_to_four(weight, weight.abs()).tolist() == [[0, -4, 3, 0, 0, 0, 7, 8]]
    with pytest.raises(ValueError, match=r"weight is of shape \[1, 6\]; allowed: \[O, I\] with I divisible by 4"):
        pruning.two_to_four(weight[:, :6], weight[:, :6])


def test_the_default_transport_is_the_package_s():
    assert named["dot"].transport is Transport
