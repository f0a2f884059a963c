"""The stages of a conversion and the fine-tuning over two processes, as in one."""

import math

import pytest
import torch
from processes import run_ranks
from tiny import E, K, dense_model, sparse_model, tokens

import dotmoe_kernels as dk
from dotmoe_kernels.alignment.checkpoints import read_log
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.conversion import DotMoeConfig
from dotmoe_kernels.conversion.finetuning import FinetuneConfig, finetune

DATA = tokens(12, 12, seed=5)
CONVERSIONS = {
    "reconstruct and align": ({"micro_batch_size": 1}, {"stages": ("reconstruct", "align"), "reconstruct_steps": 2}),
    "soft router": ({"hidden": 0.5}, {"router": "soft"}),
    "fixed assignment": ({}, {"method": "kmeans"}),
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
    topology = DotMoeConfig(num_experts=E, top_k=K, router=arguments.pop("router", "top_k"))
    values = {"steps": 4, "batch_size": 4, "num_iters": 10, "checkpoint_every": 2, "affinity_lr": 0.05} | fields | options
    model = dk.convert(dense_model(), topology, data=DATA, alignment=AlignmentConfig(**values), folder=folder / case, **arguments)
    return read_log(folder / case / "log.jsonl"), model.state_dict(), model.config.stages


def tune(case, folder, **options):
    fields, arguments = TUNINGS[case]
    model = sparse_model()
    if arguments.get("router") == "soft":
        model = dk.convert(
            dense_model(), DotMoeConfig(num_experts=E, top_k=K, router="soft"), data=DATA, alignment=AlignmentConfig(steps=0)
        )
    values = FinetuneConfig(**({"steps": 4, "batch_size": 4, "checkpoint_every": 2, "lr": 2e-4} | fields | options))
    teacher = model if arguments.get("teach") else None
    finetune(model, DATA, values, teacher=teacher, folder=folder / f"tune {case}", held_out=DATA[:2])
    return read_log(folder / f"tune {case}" / "log.jsonl"), model.state_dict(), model.config.stages


def all_cases(folder):
    return {case: convert(case, folder) for case in CONVERSIONS} | {f"tune {case}": tune(case, folder) for case in TUNINGS}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), all_cases, tmp_path_factory.mktemp("run"))


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


@pytest.mark.parametrize("case", TUNINGS)
def test_a_fine_tuning_by_two_is_that_of_one(by_two, case, tmp_path):
    first, second = (found[f"tune {case}"] for found in by_two)
    expected = tune(case, tmp_path)
    assert_same(first, expected, {"loss", "ce", "z", "balance"} | ({"kl"} & expected[0][0].keys()))
    assert all(torch.equal(value, second[1][name]) for name, value in first[1].items())
    figures, others = (found[2]["finetune"][0] for found in (first, expected))
    assert figures["perplexity"] == pytest.approx(others["perplexity"], rel=1e-4)
