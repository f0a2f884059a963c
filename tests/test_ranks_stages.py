"""The stages of a conversion and the fine-tuning over two processes, as in one."""

import math

import pytest
import torch
from processes import run_ranks
from tiny import E, K, dense_model, sparse_model, tokens
from torch.distributed.tensor import DTensor

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.checkpoints import checkpoints_in, read_log
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.ranks import find_ranks
from dotmoe_kernels.alignment.sharding import shard_blocks, twin
from dotmoe_kernels.conversion import DotMoeConfig, find_ffns
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune
from dotmoe_kernels.conversion.pipeline import _start, _swap_in

DATA = tokens(12, 12, seed=5)
CONVERSIONS = {
    "reconstruct and align": ({"micro_batch_size": 1}, {"stages": ("reconstruct", "align"), "reconstruct_steps": 2}),
    "soft router": ({"hidden": 0.5}, {"router": "soft"}),
    "fixed assignment": ({}, {"method": "kmeans"}),
    "sharded": ({"micro_batch_size": 1}, {"shard": True}),
    "sharded, reconstruct and align": (
        {"micro_batch_size": 1},
        {"shard": True, "stages": ("reconstruct", "align"), "reconstruct_steps": 2, "layers": 3},  # one more than ranks
    ),
    "sharded and computed again": ({"hidden": 0.5}, {"shard": True, "activation_checkpointing": True}),
}
TUNINGS = {
    "text alone": ({"micro_batch_size": 1}, {}),
    "the model teaches": ({}, {"teach": True}),
    "zero experts": ({"zero_experts": 2, "clip": 0.1}, {"teach": True}),
    "soft router": ({}, {"router": "soft"}),
}


def convert(case, folder, **options):
    fields, arguments = CONVERSIONS[case]
    arguments = dict(arguments)
    if not (torch.distributed.is_initialized()):
        arguments.pop("shard", None)
    topology = DotMoeConfig(num_experts=E, top_k=K, router=arguments.pop("router", "top_k"))
    values = {"steps": 4, "batch_size": 4, "num_iters": 10, "checkpoint_every": 2, "affinity_lr": 0.05} | fields | options
    dense = dense_model(num_hidden_layers=arguments.pop("layers", 2))
    model = dk.convert(dense, topology, data=DATA, alignment=AlignmentConfig(**values), folder=folder / case, **arguments)
    return read_log(folder / case / "log.jsonl"), model.state_dict(), model.config.stages


class Stopped(Exception):
    pass


def tune(case, folder, *, until=math.inf, resume=False, **options):
    """``until``: the run is interrupted after so many steps; None then."""
    fields, arguments = TUNINGS[case]
    model = sparse_model()
    if arguments.get("router") == "soft":
        model = dk.convert(
            dense_model(), DotMoeConfig(num_experts=E, top_k=K, router="soft"), data=DATA, alignment=AlignmentConfig(steps=0)
        )
    values = FinetuneConfig(**({"steps": 5, "batch_size": 4, "checkpoint_every": 2, "lr": 2e-4} | fields | options))
    teacher = model if arguments.get("teach") else None

    def on_step(done):
        if done >= until:
            raise Stopped

    place = folder / f"tune {case}"
    try:
        finetune(model, DATA, values, teacher=teacher, folder=place, held_out=DATA[:2], resume=resume, on_step=on_step)
    except Stopped:
        return None
    return read_log(folder / f"tune {case}" / "log.jsonl"), model.state_dict(), model.config.stages


def shares():
    """Entries of the blocks' frozen weights that this rank holds, that there are, and whether the model kept its own."""
    model = dense_model()
    before = {name: p.clone() for name, p in model.named_parameters()}
    work, ffns = twin(model), find_ffns(model)
    topology, options = DotMoeConfig(num_experts=E, top_k=K), AlignmentConfig(init="noise")
    layers = {name: _swap_in(work, name, ffn, topology) for name, ffn in ffns.items()}
    shard_blocks(work, layers, find_ranks())
    _start(work, layers, topology, "dot", options, None)
    sharded = [p for p in work.parameters() if isinstance(p, DTensor)]
    whole = {name for name, p in work.named_parameters() if not isinstance(p, DTensor)}
    kept = all(torch.equal(p, before[name]) and not isinstance(p, DTensor) for name, p in model.named_parameters())
    return sum(p.to_local().numel() for p in sharded), sum(p.numel() for p in sharded), whole, kept, len(layers)


def convert_all(folder):
    return {case: convert(case, folder) for case in CONVERSIONS} | {"shares": shares()}


def tune_all(folder):
    tune("the model teaches", folder / "begun", until=4, resume=True)
    return {case: tune(case, folder) for case in TUNINGS}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), convert_all, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def tuned_by_two(folder, tmp_path_factory):
    tune("the model teaches", folder / "begun", until=2)
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), tune_all, folder)


def assert_same(found, expected, names):
    log, state, stages = found
    expected_log, expected_state, expected_stages = expected
    assert math.isclose(log[0]["grad_norm"], expected_log[0]["grad_norm"], rel_tol=1e-5)
    for entry, other in zip(log, expected_log, strict=True):
        for name in names:
            assert math.isclose(entry[name], other[name], rel_tol=1e-5, abs_tol=1e-9), (entry["step"], name)
    assert state.keys() == expected_state.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected_state[name], rtol=1e-3, atol=1e-4)
    assert stages.keys() == expected_stages.keys()


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_by_two_is_that_of_one(by_two, case, tmp_path):
    first, second = (found[case] for found in by_two)
    expected = convert(case, tmp_path)
    assert_same(first, expected, ("loss", "kl", "ce", "z", "balance", "experts_in_use"))
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    if "reconstruct" in expected[2]:
        errors, others = (found[2]["reconstruct"]["relative_error"] for found in (first, expected))
        assert errors.keys() == others.keys()
        for name, pair in errors.items():
            assert pair == pytest.approx(others[name], rel=1e-4)


def test_each_rank_holds_half_of_the_frozen_weights(by_two):
    model = dense_model()
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    for held, total, whole, kept, count in (found["shares"] for found in by_two):
        assert total == inside
        assert held == inside // 2
        trained = {f"model.layers.{n}.mlp.{name}" for n in range(count) for name in ("affinity", "router_weight")}
        assert whole == trained | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert kept


def test_sharding_without_ranks_is_refused():
    with pytest.raises(ValueError) as raised:
        dk.convert(dense_model(), DotMoeConfig(num_experts=E, top_k=K), data=DATA, shard=True)
    assert str(raised.value) == "shard is True; allowed: in a process group, such as torchrun's"


@pytest.mark.parametrize("router", ["top_k", "soft"])
def test_computing_blocks_again_changes_nothing(router):
    def trained(again):
        topology = DotMoeConfig(num_experts=E, top_k=K, router=router)
        options = AlignmentConfig(steps=3, batch_size=2, num_iters=10, hidden=0.5, checkpoint_every=0)
        return dk.convert(dense_model(), topology, data=DATA, alignment=options, activation_checkpointing=again).state_dict()

    for (name, value), other in zip(trained(True).items(), trained(False).values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("case", TUNINGS)
def test_a_fine_tuning_by_two_is_that_of_one(tuned_by_two, case, tmp_path):
    first, second = (found[case] for found in tuned_by_two)
    expected = tune(case, tmp_path)
    assert_same(first, expected, {"loss", "ce", "z", "balance"} | ({"kl"} & expected[0][0].keys()))
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    figures, others = (found[2]["finetune"][0] for found in (first, expected))
    assert figures["perplexity"] == pytest.approx(others["perplexity"], rel=1e-4)


def test_a_fine_tuning_by_one_then_two_then_one(tuned_by_two, folder, tmp_path):
    found = tune("the model teaches", folder / "begun", resume=True)
    checkpoints = folder / "begun" / "tune the model teaches" / "checkpoints"
    assert [path.name for path in checkpoints_in(checkpoints)] == ["step-0000004", "step-0000005.pt"]
    assert_same(found, tune("the model teaches", tmp_path), {"loss", "ce", "kl", "z", "balance"})
