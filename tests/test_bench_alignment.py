"""The bench of alignment: its step is ``align``'s, its parts sum to the step, and its peers compute the same."""

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed with the package

from bench import alignment, splits
from bench.alignment import PARTS, REST, TINY, Clock, Step
from bench.kernels import predictions_alignment
from dotmoe_kernels.alignment import AlignmentConfig
from dotmoe_kernels.alignment.loop import align


def test_our_step_is_that_of_align():
    step, other = Step("ours", TINY), Step("ours", TINY)
    data = other.tokens[:1].repeat(TINY.batch, 1)  # all alike: the order of the data does not matter
    step.tokens = data
    rates = [group["lr"] for group in step.optimizer.param_groups]
    for share in (1.0, 0.5):  # a cosine of two steps
        for group, rate in zip(step.optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        step()
    config = AlignmentConfig(steps=2, batch_size=TINY.batch, warmup=0, tau_start=alignment.TAU, tau_end=alignment.TAU)
    align(other.model, other.layers, data, config, progress=False)
    for a, b in zip(step.trained, other.trained, strict=True):
        assert torch.equal(a, b)
    start = Step("ours", TINY)
    assert not any(torch.equal(a, b) for a, b in zip(start.trained, step.trained, strict=True))


@pytest.mark.parametrize("impl", alignment.IMPLS)
def test_the_parts_sum_to_the_step(impl):
    """By the processor's time, which a busy machine does not stretch."""
    step = Step(impl, TINY._replace(batch=8, length=128))  # enough tokens to outweigh the interpreter
    step.split.clock = Clock(time.process_time, lambda a, b: b - a)
    step()
    spent = []

    def timed():
        begin = time.process_time()
        step()
        spent.append(time.process_time() - begin)

    split = [step.split.of(timed) for _ in range(3)]
    assert all(one[part] > 0 for one in split for part in PARTS)
    for one, whole in zip(split, spent, strict=True):
        assert sum(one.values()) == pytest.approx(whole, rel=0.02)
    assert min(one[REST] / sum(one.values()) for one in split) < 0.05


def test_a_boundary_lies_where_a_part_ends():
    step = Step("ours", TINY)
    order = step.split
    order.of(step)
    parts = [part for part, _ in order.marks if part != REST]
    forward = ["norms", "attention", "norms", "masked FFN"]
    # attention below the first FFN has no gradient, nor has its norm
    backward = ["masked FFN", "norms", "attention", "norms", "masked FFN"]
    begin = ["transport", "rounding", "transport", "optimizer", "teacher"]
    assert parts == [*begin, "attention", *forward * TINY.layers, "loss", *backward, "transport", "optimizer"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_everybody_computes_the_same(dtype):
    case = alignment.case(TINY._replace(dtype=dtype))
    assert list(case.run) == list(alignment.IMPLS)
    assert all(case.error(name, None) <= case.tolerance for name in case.run)
    assert all(set(case.extra[name]["split"]) == {*PARTS, REST} for name in case.run)


def test_the_table_of_a_split():
    parts = {"teacher": 0.003, "loss": 0.001}
    lines = splits.table({"ours": parts, "eager": {"teacher": 0.003, "loss": 0.009}})
    assert lines[2] == "| teacher | 3.0 ms (75.0 %) | 3.0 ms (25.0 %) |"
    assert lines[-1] == "| sum | 4.0 ms | 12.0 ms |"


def test_predicted_steps_hold_the_products_that_nobody_can_leave_out():
    for row in predictions_alignment.steps():
        b = next(b for b in predictions_alignment.BACKBONES if row["shape"].startswith(b.batch))
        T = int(row["shape"].split()[-1])
        flops = 2 * T * b.layers * 3 * b.ffn.F * b.ffn.H  # of the FFNs, one way
        for impl in ("ours", "eager"):
            parts = row[f"{impl}_predicted_seconds"]
            assert set(parts) == set(PARTS)
            assert parts["teacher"] > flops / predictions_alignment.BF16
            assert parts["masked FFN"] > (1 + b.ffn.K / b.ffn.E) * flops / predictions_alignment.BF16
        assert row["eager_predicted_seconds"]["masked FFN"] > 2 * flops / predictions_alignment.BF16
        assert row["masked_ffn_over_frozen_dense"] < 1.2


def test_predicted_masked_ffn_is_the_faster_form():
    """Where the zeros are left out, it is predicted to pay; nothing is predicted to be faster than its products."""
    for row in predictions_alignment.layers():
        assert row["limit_seconds"] < row["predicted_seconds"] <= row["all_products_predicted_seconds"]
        assert row["limit_seconds"] < row["frozen_dense_predicted_seconds"] < row["eager_predicted_seconds"]
    header, *rows = predictions_alignment.layer_table()
    assert all(len(row) == len(header) for row in rows)
