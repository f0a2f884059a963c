"""The soft router (SoftMoE) as the router of a converted model: alignment, conversion, checkpoint, command line."""

import copy
import json

import pytest
import torch
from test_alignment import Interruption, assert_equal, interrupt_at, lines
from test_alignment import config as options
from test_alignment import run as align
from test_alignment import state as layer_state
from test_alignment import toy as hard_toy
from test_cli import (  # noqa: F401 (fixtures)
    S,
    assert_one_line,
    call,
    convert_arguments,
    here,
    prose,
    tiny_demo,
    tokenizer,
)
from tiny import E, K, dense_model
from tiny import tokens as tiny_tokens

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.soft import SoftRouting
from dotmoe_kernels.conversion import DotMoeConfig, all_experts, count_parameters, moe_blocks, restore_dense, self_check
from dotmoe_kernels.conversion.pipeline import METHODS
from dotmoe_kernels.evaluation import active_summary, collect_load, perplexity
from dotmoe_kernels.routing.budgets import slots

DATA = tiny_tokens(6, 12, seed=5)


def toy(**kwargs):
    model, layers = hard_toy(**kwargs)
    for layer in layers.values():
        layer.router = "soft"
    return model, layers


def convert(method="dot", model=None, config=None, steps=3, **kwargs):
    trained = AlignmentConfig(steps=steps, batch_size=2, num_iters=10, checkpoint_every=0, budget_lr=0.1)
    topology = DotMoeConfig(num_experts=E, top_k=K, router="soft") if config is None else config
    dense = dense_model() if model is None else model
    return dk.convert(dense, topology, method=method, data=DATA, **{"alignment": trained, **kwargs})


def logits(model, x=DATA):
    with torch.no_grad():
        return model(input_ids=x, use_cache=False).logits


# --- alignment ------------------------------------------------------------------------------------------------------------


def test_the_gradient_reaches_budgets_router_and_affinity():
    model, layers = toy()
    seen = []
    init = SoftRouting.__init__

    def record(self, *args):
        init(self, *args)
        seen.append(self.budgets.eta)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftRouting, "__init__", record)
        align(model, layers, options(steps=1, kl=1.0, z=0.0, balance=0.0))
    (eta,) = seen
    assert float(eta.grad.abs().min()) > 0
    assert float(eta.grad.sum()) == pytest.approx(0, abs=1e-6)  # a softmax does not see a common shift
    for layer in layers.values():
        assert float(layer.router_weight.grad.abs().max()) > 0
        assert float(layer.affinity.grad.abs().max()) > 0


@pytest.mark.parametrize("fixed", [False, True], ids=["learned", "fixed assignment"])
def test_learning_lowers_the_loss_and_logs_the_budget(fixed):
    model, layers = toy(fixed=fixed, planted=True)
    result = align(model, layers, options(steps=60, batch_size=5, affinity_lr=0.1, router_lr=0.05, budget_lr=0.05))
    assert result.log[-1]["kl"] < 0.7 * result.log[0]["kl"]
    for row in result.log:
        assert 1 <= row["k_min"] <= 2 <= row["k_max"] <= 3
        assert 1 <= row["mean_active"] <= 4
    assert result.log[0]["k_min"] == result.log[0]["k_max"] == 2
    assert result.log[-1]["k_min"] < result.log[-1]["k_max"]
    assert sum(result.budgets.k) == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("at", [3, 5])
def test_six_steps_equal_three_and_three_bit_for_bit(tmp_path, at):
    trained = options(steps=6, checkpoint_every=3, batch_size=3, micro_batch_size=2, affinity_lr=0.1, budget_lr=0.1)
    model, layers = toy()
    whole = align(model, layers, trained, folder=tmp_path / "whole")
    expected = layer_state(layers)
    model, layers = toy()
    with pytest.raises(Interruption):
        align(model, layers, trained, folder=tmp_path / "parts", on_step=interrupt_at(at))
    model, layers = toy(seed=7)
    parts = align(model, layers, trained, folder=tmp_path / "parts", resume=True)
    assert_equal(layer_state(layers), expected)
    assert parts.budgets == whole.budgets
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_options_of_the_soft_router_do_not_part_runs_of_the_hard_one(tmp_path):
    model, layers = hard_toy()
    align(model, layers, options(), folder=tmp_path)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert not {"cap", "threshold", "budget_lr"} & torch.load(path)["fingerprint"].keys()


def test_a_padding_token_has_no_expert_and_moves_nothing():
    _, layers = toy()
    layer = next(iter(layers.values()))
    SoftRouting(layers, options(steps=1)).refresh(0)
    layer.expert_of = torch.arange(32) % 4
    x, mask = torch.randn(6, 16), torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    layer.mask = mask
    y = layer(x)
    assert not y[~mask].any()
    assert (layer.routing.indices[~mask] == 4).all()
    assert ((layer.routing.indices[mask] < 4).sum(-1) >= 1).all()
    losses = layer.routing.z_loss, layer.routing.balance_loss
    layer.mask = None
    torch.testing.assert_close(layer(x[mask]), y[mask])
    for ours, theirs in zip(losses, (layer.routing.z_loss, layer.routing.balance_loss), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_slots():
    assert [slots(2.0, 2.0, 8), slots(2.1, 2.0, 8), slots(7.0, 2.0, 8), slots(2.0000001, 1.0, 8)] == [4, 5, 8, 2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"threshold": 1.0}, r"threshold is 1.0; allowed: a number in \[0, 1\)"),
        ({"threshold": -0.1}, "threshold is -0.1; allowed"),
        ({"router_temperature_end": 0.0}, "router_temperature_end is 0.0; allowed: a positive number"),
        ({"router_temperature_start": -1.0}, "router_temperature_start is -1.0; allowed: a positive number"),
        ({"cap": 0.9}, "cap is 0.9; allowed: a number of at least 1"),
        ({"budget_lr": 0.0}, "budget_lr is 0.0; allowed: a positive number"),
    ],
)
def test_bad_training_options(fields, message):
    with pytest.raises(ValueError, match=message):
        AlignmentConfig(**fields)


# --- conversion -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_round_trips(method, tmp_path):
    dense = dense_model()
    before, reference = copy.deepcopy(dense.state_dict()), logits(dense)
    model = convert(method, dense)
    config = model.config
    assert (config.format_version, config.router_threshold, config.router_cap) == (2, 0.05, 2.0)
    assert sum(config.router_k) == pytest.approx(2 * K, rel=1e-5)
    assert config.router_k[0] != config.router_k[1]
    with all_experts(model):
        torch.testing.assert_close(logits(model), reference, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(model), reference, rtol=1e-2, atol=1e-2)
    dk.save(model, tmp_path / "m")
    again = dk.load(tmp_path / "m")
    assert [b.gate.soft for b in moe_blocks(again).values()] == [b.gate.soft for b in moe_blocks(model).values()]
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    assert self_check(model, reference, DATA, folder=tmp_path / "m")["passed"]
    for name, value in restore_dense(again).state_dict().items():
        assert torch.equal(value, before[name]), name
    assert "## Router" in (tmp_path / "m" / "README.md").read_text()
    assert json.loads((tmp_path / "m" / "config.json").read_text())["router_k"] == config.router_k


def test_another_top_k_scales_the_budgets(tmp_path):
    model = convert()
    saved = model.config.router_k
    assert saved[0] != saved[1]
    dk.save(model, tmp_path / "m")
    loaded = dk.load(tmp_path / "m", top_k=4)
    found = [block.gate.soft.k for block in moe_blocks(loaded).values()]
    assert sum(found) / 2 == pytest.approx(4)
    # each has the share of what lies above one expert a layer that it had
    assert [(k - 1) / (4 - 1) for k in found] == pytest.approx([(k - 1) / (sum(saved) / 2 - 1) for k in saved])
    assert [b.gate.soft.max_active for b in moe_blocks(loaded).values()] == [slots(k, 2.0, E) for k in found]
    dk.save(loaded, tmp_path / "again")
    assert dk.load(tmp_path / "again").config.router_k == found
    again = dk.DotMoeForCausalLM.from_pretrained(tmp_path / "again", num_experts_per_tok=K)
    assert again.config.router_k == pytest.approx(saved)
    assert dk.load(tmp_path / "m", top_k=K).config.router_k == saved


@pytest.mark.parametrize(
    ("k", "top_k", "expected"),
    [([2.0, 4.0], 1, [1.0, 1.0]), ([2.0, 6.0], 7, [3.0, 7.0]), ([1.0, 1.0], 4, [4.0, 4.0]), ([2.0, 4.0], 3, [2.0, 4.0])],
    ids=["one expert", "clamped to E - 1", "no shares", "the same"],
)
def test_budgets_stay_in_their_range(k, top_k, expected):
    values = {"num_experts": 8, "num_experts_per_tok": 3, "router": "soft", "router_k": k}
    assert DotMoeConfig.from_dict(values, top_k=top_k).router_k == pytest.approx(expected)
    assert DotMoeConfig.from_dict(values, top_k=top_k, router_k=[5.0, 5.0]).router_k == [5.0, 5.0]
    assert DotMoeConfig.from_dict(values).router_k == k


def test_the_block_is_the_masked_ffn_of_its_routing():
    model = convert()
    block = next(iter(moe_blocks(model).values()))
    x = torch.randn(9, block.gate.hidden_size)
    scores, weights, indices = block.gate(x)
    k, temperature, threshold, most = block.gate.soft
    p = dk.soft_top_k(scores, k, temperature=temperature)
    assert indices.shape == weights.shape == (9, most)
    kept = torch.zeros_like(p).scatter(1, scores.topk(most).indices, 1) * (p > threshold)
    kept.scatter_(1, p.argmax(1, keepdim=True), 1)
    dense = torch.zeros(9, E + 1).scatter_add(1, indices, weights)
    torch.testing.assert_close(dense[:, :E], kept * p)
    assert not weights[indices == E].any()


@pytest.mark.parametrize("path", ["grouped", "decode", "masked"])
def test_paths_agree(path):
    model = convert()
    expected = perplexity(model, DATA)
    for block in moe_blocks(model).values():
        block.path = path
    assert perplexity(model, DATA) == pytest.approx(expected, rel=1e-5)


def test_generates_with_a_cache_as_without():
    model = convert()
    x = DATA[:1, :4]
    out = model.generate(x, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for _ in range(out.shape[1] - 4):
        x = torch.cat((x, logits(model, x)[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, x)


def test_parameters_are_counted_by_the_nominal_or_the_measured_mean():
    fields = {"router_k": [2.0, 3.0]}
    model = dk.DotMoeForCausalLM(DotMoeConfig(num_experts=E, top_k=K, router="soft", dense_config=dense_model().config, **fields))
    total, active = count_parameters(model)
    experts = [sum(p.numel() for p in b.experts.parameters()) // E for b in moe_blocks(model).values()]
    assert total - active == experts[0] * (E - 2) + experts[1] * (E - 3)
    measured = dict.fromkeys(moe_blocks(model), float(E))
    assert count_parameters(model, measured) == (total, total)


def test_structure_given_goes_before_the_training_options():
    given = {"router_temperature": 0.07, "router_threshold": 0.11, "router_cap": 1.5}
    model = convert(config=DotMoeConfig(num_experts=E, top_k=K, router="soft", **given))
    assert {name: getattr(model.config, name) for name in given} == pytest.approx(given)
    with pytest.raises(ValueError, match=r"config.router_k is .*allowed: None: it is learned"):
        convert(config=DotMoeConfig(num_experts=E, top_k=K, router="soft", router_k=[2.0, 2.0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "hash"}, r"router is 'hash'; allowed: top_k \| soft"),
        ({"router_threshold": 1}, r"router_threshold is 1; allowed: a number in \[0, 1\)"),
        ({"router_temperature": 0}, "router_temperature is 0; allowed: a number above 0"),
        ({"router_cap": 0.5}, "router_cap is 0.5; allowed: a number of at least 1"),
        ({"router_k": [0.5, 2]}, r"router_k is \[0.5, 2\]; allowed: a list of numbers from 1 to num_experts - 1 = 7"),
        ({"router_k": 2.0}, "router_k is 2.0; allowed: a list"),
        ({"top_k": 8}, "top_k is 8; allowed: at most num_experts - 1 = 7"),
        ({"router": "top_k", "router_cap": 2.0}, 'router_cap is 2.0; allowed: None, unless router is "soft"'),
    ],
)
def test_bad_structure(fields, message):
    with pytest.raises(ValueError, match=message):
        DotMoeConfig(**({"num_experts": E, "top_k": K, "router": "soft"} | fields))


def test_budgets_of_another_number_of_layers():
    config = DotMoeConfig(num_experts=E, top_k=K, router="soft", router_k=[2.0] * 3, dense_config=dense_model().config)
    with pytest.raises(ValueError, match="router_k is of length 3; allowed: one a layer, 2"):
        dk.DotMoeForCausalLM(config)


def test_a_hard_router_is_still_written_for_older_readers():
    assert DotMoeConfig(num_experts=E, top_k=K).format_version == 1


# --- how many experts a token visits --------------------------------------------------------------------------------------


def test_the_distribution_adds_up_to_the_tokens():
    model = convert()
    with collect_load(model) as counts:
        perplexity(model, DATA, batch_size=4)
    for name, block in moe_blocks(model).items():
        found = counts.active[name]
        assert int(found.sum()) == DATA.numel()
        assert int((found * torch.arange(E + 1)).sum()) == int(counts.slots[name].sum())
        s = active_summary(found)
        assert 1 <= s["min"] <= s["median"] <= s["max"] <= block.gate.soft.max_active
        assert s["min"] <= s["mean"] <= s["max"]


def test_active_summary():
    assert active_summary(torch.tensor([0, 2, 1, 0, 1])) == {"mean": 2.0, "min": 1, "median": 1, "max": 4}
    assert active_summary(torch.zeros(3, dtype=torch.int64))["mean"] == 0


# --- command line ---------------------------------------------------------------------------------------------------------


def test_convert_eval_and_info(capsys, here, tmp_path):  # noqa: F811
    out = tmp_path / "soft"
    status, text, err = call(capsys, *convert_arguments(here, out, "--router", "soft", "--cap", "1.5", "--budget-lr", "0.1"))
    assert (status, err) == (0, "")
    assert "experts a token" in text
    held = ("eval", out, "--data", here / "held.txt", "--sequence-length", S)
    values = set()
    for path in ("auto", "grouped", "decode", "masked"):
        status, text, err = call(capsys, *held, "--path", path, "--json")
        assert (status, err) == (0, "")
        report = json.loads(text)
        values.add(f"{report['perplexity_sparse']:.4g}")
    assert len(values) == 1
    for entry in report["active_experts"].values():
        assert sum(entry["tokens"]) == report["tokens"]
    mean = sum(entry["mean"] for entry in report["active_experts"].values()) / 2
    assert report["mean_active_experts"] == pytest.approx(mean)
    status, text, err = call(capsys, *held)
    assert (status, err) == (0, "")
    assert "active experts a token:" in text
    status, text, err = call(capsys, "info", out)
    assert (status, err) == (0, "")
    for part in ("router: soft\n", "k a layer", "cap 1.5", "threshold 0.05"):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--router", "hash"), "invalid choice: 'hash'"),
        (("--threshold", "1"), "--threshold is 1.0; allowed: a number in [0, 1)"),
        (("--cap", "0.5"), "--cap is 0.5; allowed: a number of at least 1"),
        (("--router-temperature-end", "0"), "--router-temperature-end is 0.0; allowed: a positive number"),
    ],
)
def test_wrong_flags(capsys, here, tmp_path, flags, message):  # noqa: F811
    status, _, err = call(capsys, *convert_arguments(here, tmp_path / "out", "--router", "soft", *flags))
    assert_one_line(status, err, "convert", message)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_with_the_soft_router(capsys, tmp_path, tiny_demo):  # noqa: F811
    (tmp_path / "text.txt").write_text(prose(1200))
    arguments = ("demo", "--quick", "--router", "soft", "--data", tmp_path / "text.txt", "--output", tmp_path / "demo")
    status, out, err = call(capsys, *arguments)
    assert (status, err) == (0, "")
    report = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert report["router"] == "soft"
    assert report["self_check"]["passed"]
    for row in report["rows"][1:]:
        assert f"{row['mean_active']:.2f}" in out
        assert 1 <= row["mean_active"] <= 16
