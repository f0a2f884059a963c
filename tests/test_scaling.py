"""The dry run of several GPUs: one GPU is the dry run itself, more take what they send, and it says what bounds them."""

import json

import pytest
import torch
from test_recipes import call

from dotmoe_kernels._tiles import NETWORK, NVLINK
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.conversion import DotMoeConfig
from dotmoe_kernels.conversion.dryrun import dense_config, predict_run, run_lines
from dotmoe_kernels.conversion.finetuning import FinetuneConfig
from dotmoe_kernels.conversion.recipes import load_recipe
from dotmoe_kernels.conversion.scaling import gpu_counts

GB = 1e9


def predict(gpus=64, *, name="llama3-8b", stages=("align",), tuning=None, **changes):
    recipe = load_recipe(name)
    dense = dense_config(None, recipe)
    return predict_run(
        dense,
        DotMoeConfig.for_dense(dense, **recipe.topology),
        AlignmentConfig(**(recipe.alignment | changes)),
        sequence_length=recipe.sequence_length,
        dtype=torch.bfloat16,
        stages=stages,
        tuning=tuning,
        gpus=gpus,
    )


def rows(report, kind="whole"):
    return {row["gpus"]: row[kind] for row in report["gpus"] if row[kind] is not None}


@pytest.mark.parametrize(("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (64, [1, 2, 4, 8, 16, 32, 64])])
def test_counts(most, counts):
    assert gpu_counts(most) == counts


@pytest.mark.parametrize("stages", [("align",), ("reconstruct", "align", "finetune")])
def test_one_gpu_is_the_dry_run_itself(stages):
    report = predict(1, stages=stages)
    (row,) = report["gpus"]
    assert row["whole"]["predicted_seconds"] == pytest.approx(report["predicted_seconds"], abs=1e-2)
    assert row["whole"]["predicted_memory_gb"] == report["predicted_memory_gb"]
    assert row["whole"]["share_of_the_ideal"] == 1
    assert row["sharded"] is None


def test_more_gpus_take_less_time_each_and_send_what_the_formula_says():
    L, F, E, H, steps = 32, 14336, 112, 4096, 3500
    found = rows(predict())
    assert list(found) == [1, 2, 4, 8, 16, 32, 64]
    seconds = {n: f["predicted_seconds"] for n, f in found.items()}
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    transport = steps * 2 * 50 * 4 * L * F * E / 4.3e12
    for n, link in ((2, NVLINK), (8, NVLINK), (16, NETWORK)):
        messages = steps * (16 * L * F * E + 8 * L * E * H) * (n - 1) / n / link
        assert seconds[n] == pytest.approx((seconds[1] - transport) / n + transport / n + messages, rel=1e-4)
        assert found[n]["bound_by"] == "products"


def test_sharded_blocks_weigh_less_and_slow_links_bound_them():
    report = predict()
    whole, sharded = rows(report), rows(report, "sharded")
    L, blocks = 32, 8_030_261_248 - 2 * 128256 * 4096 - 4096
    for n, figures in sharded.items():
        less = (whole[n]["predicted_memory_gb"] - figures["predicted_memory_gb"]) * GB
        assert less == pytest.approx(2 * blocks * (1 - 1 / n - 2 / L), abs=2e6)
        assert figures["predicted_seconds"] >= whole[n]["predicted_seconds"]
    assert sharded[8]["bound_by"] == "products"
    assert sharded[64]["bound_by"] == "gathering of weights"  # a micro-batch of one sequence, and the weights over the network


def test_passes_get_smaller_where_there_are_fewer_than_gpus():
    report = predict()
    assert [row["micro_batch_size"] for row in report["gpus"]] == [None] * 5 + [2, 1]
    few = predict(8, batch_size=4, micro_batch_size=1)["gpus"]
    assert [row["whole"] is None for row in few] == [False, False, False, True]
    lines = run_lines(predict(8, batch_size=4, micro_batch_size=1))
    assert "predicted on 8 GPUs: fewer sequences a step than GPUs; --batch-size 8 at the least" in lines


def test_a_model_too_large_for_a_gpu_is_bound_by_memory():
    found = rows(predict(8, stages=("finetune",), tuning=FinetuneConfig(steps=10, batch_size=8, micro_batch_size=1)))
    assert {f["bound_by"] for f in found.values()} == {"memory"}
    few = rows(predict(8, stages=("finetune",), tuning=FinetuneConfig(steps=10, batch_size=8, micro_batch_size=1, lora_rank=8)))
    assert {f["bound_by"] for f in few.values()} == {"products"}


def test_the_command_line(capsys):
    status, out, err = call(capsys, "convert", "--recipe", "llama3-8b", "--dry-run", "--gpus", "8")
    assert (status, err) == (0, "")
    lines = [line for line in out.splitlines() if line.startswith("predicted on ")]
    assert [line.split(":")[0] for line in lines] == [
        "predicted on 1 GPU",
        *(f"predicted on {n} GPUs{kind}" for n in (2, 4, 8) for kind in ("", " with --shard")),
    ]
    assert all("; bound by " in line for line in lines)
    status, out, _ = call(capsys, "convert", "--recipe", "llama3-8b", "--dry-run", "--gpus", "8", "--json")
    assert [row["gpus"] for row in json.loads(out)["gpus"]] == [1, 2, 4, 8]
