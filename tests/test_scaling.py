"""The dry run of several GPUs: one GPU is the dry run itself, more take what they send, and it says what bounds them."""

import json

import pytest
import torch
from test_recipes import call

from dotmoe_kernels._tiles import NETWORK, NVLINK, leaves_zeros_out
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.conversion import DotMoeConfig
from dotmoe_kernels.conversion.dryrun import dense_config, predict_run, run_lines
from dotmoe_kernels.conversion.finetuning import FinetuneConfig
from dotmoe_kernels.conversion.recipes import load_recipe
from dotmoe_kernels.conversion.scaling import gpu_counts

GB = 1e9


def predict(gpus=64, *, name="llama3-8b", stages=("align",), tuning=None, teacher=None, again=False, **changes):
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
        teacher=teacher,
        gpus=gpus,
        activation_checkpointing=again,
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


L, F, H, E, K, V, Q, W, S = 32, 14336, 4096, 112, 28, 128256, 4096, 1024, 2048  # LLaMA-3-8B; queries, keys
PRODUCTS, ATTENTION = L * (2 * H * (Q + W) + 3 * F * H) + V * H, 2 * S * Q * L
NORMS, AROUND = L * 2 * H, 2 * V * H + H
BLOCKS = PRODUCTS - V * H + NORMS  # parameters, dense
ROUTERS = L * E * H


def stage(report, name):
    return report["stages"][name]


def test_blocks_computed_again_by_hand():
    """align: of a block its input in 2 bytes is kept, and one block's activations; a pass without the head is added."""
    plain, again = (stage(predict(1, again=flag, micro_batch_size=1, hidden=0.0), "align") for flag in (False, True))
    kept = 2 * (2 * F + 2 * Q + 2 * W + E) + 4 * (3 * H + 2 * E) + 12 * K
    less = (plain["predicted_memory_gb"]["activations"] - again["predicted_memory_gb"]["activations"]) * GB
    assert less == pytest.approx(S * (L * kept - L * 2 * H - kept), abs=2e6)
    masked = 2 * L * F * H * (K / E if leaves_zeros_out(S, E, F // E, K, H) else 1) - 2 * L * F * H
    more = 2 * (PRODUCTS - V * H) + ATTENTION + 2 * ROUTERS + masked
    assert (again["flops"] - plain["flops"]) / plain["tokens"] == pytest.approx(more, rel=1e-9)
    rows = [row for flag in (False, True) for row in predict(8, again=flag)["gpus"] if row["gpus"] == 8]
    for kind in ("whole", "sharded"):
        few, many = (row[kind] for row in rows)
        assert many["predicted_memory_gb"] < few["predicted_memory_gb"]
        assert many["predicted_seconds"] > few["predicted_seconds"]


@pytest.mark.parametrize("rank", [0, 8])
def test_blocks_computed_again_while_fine_tuning_by_hand(rank):
    tuning = FinetuneConfig(steps=10, batch_size=8, micro_batch_size=1, lora_rank=rank)
    plain, again = (stage(predict(1, again=flag, stages=("finetune",), tuning=tuning), "finetune") for flag in (False, True))
    kept = 28 * H + 2 * (2 * Q + 2 * W + 2 * K * F // E) + 8 * E + 32 * K
    less = (plain["predicted_memory_gb"]["activations"] - again["predicted_memory_gb"]["activations"]) * GB
    assert less == pytest.approx(S * (L * kept - L * 4 * H - kept), abs=2e6)
    active = PRODUCTS - V * H - 3 * L * F * H * (1 - K / E)
    adapters = rank * L * (2 * (H + Q) + 2 * (H + W))
    more = 2 * active + ATTENTION + 2 * ROUTERS + 2 * adapters
    assert (again["flops"] - plain["flops"]) / plain["tokens"] == pytest.approx(more, rel=1e-9)


def test_a_sharded_fine_tuning_by_hand():
    """On 8 GPUs a sequence each: 16 bytes a parameter divided; two blocks gathered in bfloat16 and one's gradients, those once more
    in float32; what is around the blocks gathered, and its gradient; the teacher, in bfloat16."""
    tuning = FinetuneConfig(steps=10, batch_size=8, micro_batch_size=1)
    report = predict(8, stages=("finetune",), tuning=tuning, teacher="itself")
    memory = stage(report, "finetune")["predicted_memory_gb"]
    sparse = BLOCKS + ROUTERS
    expected = 16 * (sparse + AROUND) / 8 + (3 * 2 + 4) * sparse / L + 8 * AROUND
    expected += 2 * (BLOCKS / 8 + 2 * BLOCKS / L + AROUND) + (memory["activations"] + memory["loss"]) * GB
    found = rows(report, "sharded")[8]
    assert found["predicted_memory_gb"] * GB == pytest.approx(expected, abs=3e6)
    assert found["bound_by"] == "products"
    assert found["predicted_memory_gb"] < 141 < rows(report)[8]["predicted_memory_gb"]
    adam = 10 * 84 * (sparse + AROUND) / 4.3e12
    alone = rows(report)[1]["predicted_seconds"] - adam
    assert found["predicted_seconds"] == pytest.approx(alone / 8 + adam / 8, rel=1e-4)


def test_sharded_adapters_by_hand():
    tuning = FinetuneConfig(steps=10, batch_size=8, micro_batch_size=1, lora_rank=8)
    report = predict(8, stages=("finetune",), tuning=tuning, teacher="itself")
    memory = stage(report, "finetune")["predicted_memory_gb"]
    sparse, adapters = BLOCKS + ROUTERS, 8 * L * (2 * (H + Q) + 2 * (H + W))
    expected = (2 * (sparse + AROUND) + 16 * adapters) / 8 + 2 * 2 * sparse / L + 2 * AROUND
    expected += (memory["activations"] + memory["loss"]) * GB
    assert rows(report, "sharded")[8]["predicted_memory_gb"] * GB == pytest.approx(expected, abs=3e6)


def test_the_messages_of_a_sharded_fine_tuning_bind_slow_links():
    """A gathering of all weights for a pass of one sequence, over the network of 64 GPUs."""
    tuning = FinetuneConfig(steps=10, batch_size=64, micro_batch_size=1)
    report = predict(64, stages=("finetune",), tuning=tuning)
    found, sparse = rows(report, "sharded")[64], BLOCKS + ROUTERS
    assert found["bound_by"] == "gathering of weights"
    a_pass = 2 * 2 * sparse + 4 * sparse + 12 * AROUND
    assert found["predicted_seconds"] == pytest.approx(10 * a_pass * 63 / 64 / NETWORK, rel=1e-3)


def test_a_sharded_reconstruction_weighs_less():
    report = predict(8, stages=("reconstruct",))
    whole, sharded = rows(report)[8], rows(report, "sharded")[8]
    less = 2 * (BLOCKS * (1 - 1 / 8 - 2 / L) - 3 * F * H)
    assert (whole["predicted_memory_gb"] - sharded["predicted_memory_gb"]) * GB == pytest.approx(less, abs=2e6)
    assert list(rows(predict(8, stages=("reconstruct", "align", "finetune"), tuning=FinetuneConfig(batch_size=8)), "sharded"))


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
