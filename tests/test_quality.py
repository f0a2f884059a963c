"""bench.quality run and report: what is compared is what it says, the intervals, what is there already."""

import json
import math

import numpy as np
import pytest
import tiny
import torch

from bench.quality import __main__ as command
from bench.quality import clusterings, intervals, pruning, transports
from bench.quality.ablations import ablations
from bench.quality.layers import VariantFFN, neurons, shared_neurons
from bench.quality.measuring import measure
from bench.quality.methods import METHODS, Job
from bench.quality.report import report
from bench.quality.run import PRESETS, Part, read_result, run_parts
from bench.quality.settings import Held, Plan, Topology
from dotmoe_kernels.alignment.config import INITS, AlignmentConfig
from dotmoe_kernels.alignment.transport import Transport
from dotmoe_kernels.conversion import find_ffns

TOPOLOGY = Topology(tiny.E, tiny.K)
SMALL = Plan(
    "small",
    Topology(4, 2),
    {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    dense_steps=2,
    vocabulary=300,
    sequence=32,
    windows=2,
    texts=40,
    options={"steps": 2, "batch_size": 2},
)
QUICK = ("dense", "dot", "shared-rate", "masks", "prune-wanda", "2to4-wanda", "no-capacity", "soft-router")
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


# --- statistics ---


def test_the_bootstrap_of_a_mean_is_the_normal_interval():
    """Documents of one token each: log perplexity is a mean, whose standard error is known."""
    values = np.random.default_rng(0).normal(3.0, 0.5, 400)
    weights = intervals.draw_documents(400)
    found = intervals.estimate(np.log(intervals.perplexities(values, np.ones(400), weights)))
    error = values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_pairs_remove_what_documents_share():
    generator = np.random.default_rng(0)
    tokens, hard = np.full(60, 100.0), generator.normal(400, 80, 60)
    weights = intervals.draw_documents(60)
    base, ours = (intervals.perplexities(hard + extra, tokens, weights) for extra in (0.0, 100 * math.log(1.2)))
    ratio = intervals.estimate(intervals.mean_ratio([ours], base))
    assert ratio.low == pytest.approx(1.2) == ratio.high, "every document is 1.2 times as hard: nothing is left to vary"
    own = intervals.estimate(ours)
    assert own.high / own.low > 1.3, "though documents differ widely"


def test_the_best_other_is_found_anew_in_every_draw():
    ours, others = np.array([0.1, 0.1, 0.1]), [np.array([0.2, 0.4, 0.2]), np.array([0.4, 0.2, 0.5])]
    assert intervals.reduction(ours, others) == pytest.approx([0.5, 0.5, 0.5])


# --- runs ---


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("quality")
    part = Part(SMALL, (0, 1), ablations=True)
    said = []
    run_parts([part], place / "out", place / "data", only=QUICK, say=said.append)
    return place, part, said


def times(place):
    return {path.name: path.stat().st_mtime_ns for path in (place / "out" / "small").glob("*.json")}


def test_a_result_holds_what_a_report_needs(results):
    place, _, said = results
    found = read_result(place / "out" / "small" / "dot.1.json")
    assert found["seed"] == 1
    assert found["kind"] == "dot"
    assert found["source"]
    assert len(found["nll"]) == len(found["tokens"]) >= 2
    assert found["perplexity"] == pytest.approx(math.exp(sum(found["nll"]) / sum(found["tokens"])))
    assert found["trained_tokens"] == 2 * 2 * 32
    assert found["curve"][-1][0] == found["trained_tokens"]
    assert {"torch", "transformers"} <= set(found["machine"]["versions"])
    assert 0 <= found["mutual_information"] <= found["most_information"]
    # what does not depend on the seed is there once
    assert "dense.1.json" not in times(place)
    assert "prune-wanda.1.json" not in times(place)
    assert len(said) == 1 + len(times(place))


def test_a_second_run_makes_nothing_again(results):
    place, part, _ = results
    before, said = times(place), []
    run_parts([part], place / "out", place / "data", only=QUICK, say=said.append)
    assert times(place) == before
    assert len(said) == 1
    assert f"{len(before)} of {len(before)} results are there" in said[0]


def test_an_interrupted_run_goes_on_with_the_next(results):
    place, part, _ = results
    before, gone = times(place), place / "out" / "small" / "masks.0.json"
    first = json.loads(gone.read_text())
    gone.unlink()
    run_parts([part], place / "out", place / "data", only=QUICK, say=lambda line: None)
    after = times(place)
    assert {name for name in after if after[name] != before[name]} == {gone.name}
    assert json.loads(gone.read_text())["nll"] == first["nll"], "the same again"


@pytest.mark.parametrize("text", ['{"arm": "dot", ', "[]", "{}", "", "\udcff", "3"])
def test_what_is_no_result_is_refused_by_name(tmp_path, text):
    (tmp_path / "dot.0.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"dot\.0\.json cannot be read as a result: "):
        read_result(tmp_path / "dot.0.json")


def test_a_broken_result_is_named_and_made_again(results):
    place, part, _ = results
    broken, said = place / "out" / "small" / "dot.0.json", []
    whole = broken.read_text()
    broken.write_text(whole[:200])
    report(place / "out", said.append)
    assert any(str(broken) in line and "left out" in line for line in said)
    run_parts([part], place / "out", place / "data", only=["dot"], say=said.append)
    assert any(str(broken) in line and "made again" in line for line in said)
    assert json.loads(broken.read_text())["nll"] == json.loads(whole)["nll"]


def test_other_options_are_made_again(results):
    place, part, _ = results
    said, before = [], times(place)
    changed = Part(SMALL, (0,), ablations=True, options={"router_lr": 1e-3})
    run_parts([changed], place / "out", place / "data", only=["dot", "dense"], say=said.append)
    assert [line for line in said if "made again" in line] == [
        f"{place / 'out' / 'small' / 'dot.0.json'} is of other options, text or model; it is made again"
    ]
    assert times(place)["dense.0.json"] == before["dense.0.json"], "which trains nothing"
    run_parts([part], place / "out", place / "data", only=["dot"], say=lambda line: None)


def test_an_arm_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Interrupted inside an arm, the result is that of an uninterrupted run."""
    plan = Plan(**(vars(SMALL) | {"options": {"steps": 4, "batch_size": 2, "checkpoint_every": 1}}))
    part = Part(plan, (0,))
    run_parts([part], tmp_path / "whole", tmp_path / "data", only=["dense", "dot"], say=lambda line: None)
    from dotmoe_kernels.alignment import loop

    step, taken = loop._Run.step, []

    def stop_at_third(self, number):
        taken.append(number)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(loop._Run, "step", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_parts([part], tmp_path / "out", tmp_path / "data", only=["dot"], say=lambda line: None)
    assert not (tmp_path / "out" / "small" / "dot.0.json").exists()
    assert list((tmp_path / "data" / "runs").iterdir())
    run_parts([part], tmp_path / "out", tmp_path / "data", only=["dot"], say=lambda line: None)
    assert taken == [0, 1, 2, 2, 3]
    whole, resumed = (json.loads((tmp_path / place / "small" / "dot.0.json").read_text()) for place in ("whole", "out"))
    assert whole["nll"] == resumed["nll"]
    assert whole["curve"] == resumed["curve"]
    assert not list((tmp_path / "data" / "runs").iterdir()), "the checkpoints go with the result"


def test_the_report_has_every_arm_and_a_figure(results):
    place, _, _ = results
    text = report(place / "out", lambda line: None)
    for name in QUICK:
        assert f"\n| {name} | " in text
    assert "below the best of routed, same tokens" in text
    assert "below the best of structured pruning" in text
    found = json.loads((place / "out" / "report.json").read_text())[0]
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows["dot"]["seeds"] == [0, 1]
    assert rows["dense"]["excess"]["value"] == 0
    for row in found["rows"]:
        if row["arm"] != "dense":
            assert row["excess"]["low"] <= row["excess"]["value"] <= row["excess"]["high"]
    assert (place / "out" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (place / "out" / "report.md").read_text() == text


def test_results_of_another_model_are_left_out(results, tmp_path):
    place, _, _ = results
    (tmp_path / "small").mkdir()
    for name in ("dense.0.json", "dot.0.json", "dot.1.json"):
        found = json.loads((place / "out" / "small" / name).read_text())
        if name == "dot.1.json":
            found["marks"]["weights"] += 1
        (tmp_path / "small" / name).write_text(json.dumps(found))
    said = []
    report(tmp_path, said.append)
    assert said == ["left out: dot, seed 1: not of the dense result's weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--preset", "all"], "--preset is 'all'; allowed: ci | cpu | real | gpu"),
        (["run", "--only", "dott"], "--only is dott; allowed: dense dot "),
        (["run", "--preset", "cpu", "--setting", "big"], "--setting is big; allowed: demo | 7m"),
        (["run", "--preset", "real", "--data", "nowhere"], "--data is nowhere, without smollm2-135m-instruct; allowed: a folder"),
        (["report", "--out", "nowhere"], "--out is nowhere, without results; allowed: a folder"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_default_transport_is_the_package_s():
    assert named["dot"].transport is Transport
