"""Alignment over several processes: the same curves, gradients and assignments as in one; checkpoints that any number continues."""

import math
import shutil

import pytest
import torch
from processes import run_ranks
from test_alignment import config, toy
from test_alignment import run as align
from test_alignment import state as state_of

from dotmoe_kernels.alignment.checkpoints import checkpoints_in, read_log, resume_from
from dotmoe_kernels.alignment.ranks import Ranks

TERMS = ("loss", "kl", "ce", "z", "balance", "grad_norm", "experts_in_use", "largest_load")
CLOSE = 1e-5  # relative, of a curve

CASES = {
    "micro-batches": {"micro_batch_size": 1},
    "one more pass than ranks": {"batch_size": 3, "micro_batch_size": 1},
    "one pass over the ranks": {"batch_size": 3},  # two rows on one rank, one on the other
    "rounding now and then": {"refresh_every": 2},
    "another centre": {"centre": True},
}


class Stopped(Exception):
    pass


def train(case, folder=None, *, until=math.inf, resume=False, **options):
    """(log of this call, state); ``until``: the run is interrupted after so many steps."""
    model, layers = toy()

    def on_step(done):
        if done >= until:
            raise Stopped

    given = config(**({"steps": 6, "affinity_lr": 0.05, "checkpoint_every": 2} | CASES.get(case, {}) | options))
    try:
        log = align(model, layers, given, folder=folder, resume=resume, on_step=on_step).log
    except Stopped:
        log = None
    return log, state_of(layers)


def train_all(folder):
    """Every case in the same processes: to start them takes longer. And a run that one process began, and one will end."""
    train("micro-batches", folder, until=4, resume=True)
    return {case: train(case) for case in CASES}


def assert_same(found, expected, terms=TERMS):
    (log, state), (expected_log, expected_state) = found, expected
    assert [entry["step"] for entry in log] == [entry["step"] for entry in expected_log]
    for entry, other in zip(log, expected_log, strict=True):
        for term in terms:
            assert math.isclose(entry[term], other[term], rel_tol=CLOSE, abs_tol=1e-9), (entry["step"], term)
    for name, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, expected_state[name], rtol=1e-3, atol=1e-4)
        else:
            assert torch.equal(value, expected_state[name]), name


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run of one process to its second step, then of two to the fourth."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def by_two(begun, tmp_path_factory):
    train("micro-batches", begun, until=2)
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), train_all, begun)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(by_two, case):
    first, second = by_two
    assert_same(first[case], train(case))
    for name, value in first[case][1].items():  # the ranks agree to the bit
        assert torch.equal(value, second[case][1][name]), name
    assert 0 <= first[case][0][-1]["communication"] <= 1
    assert first[case][0][-1]["tokens_per_second"] > 0


def test_one_then_two_then_one(by_two, begun):
    assert [path.name for path in checkpoints_in(begun / "checkpoints")] == ["step-0000002.pt", "step-0000004"]
    _, state = train("micro-batches", begun, resume=True)
    assert [path.name for path in checkpoints_in(begun / "checkpoints")] == ["step-0000004", "step-0000006.pt"]
    assert_same((read_log(begun / "log.jsonl"), state), train("micro-batches"))


def test_a_folder_of_another_run_or_torn_is_refused(by_two, begun, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    shutil.copytree(begun / "checkpoints" / "step-0000004", folder / "step-0000004")
    assert resume_from(folder, {"seed": 0})[1]["step"] == 4
    with pytest.raises(ValueError, match=r"step-0000004 was written with seed = 0; this run has 1"):
        resume_from(folder, {"seed": 1})
    part = next((folder / "step-0000004").glob("*.distcp"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match=r"step-0000004 cannot be read: its part __\d_0.distcp is not what was written"):
        resume_from(folder, {})


def test_a_folder_that_was_not_finished_is_no_checkpoint(tmp_path):
    torn = tmp_path / "step-0000004"
    torn.mkdir()
    (torn / "state.pt").write_bytes(b"")
    assert resume_from(tmp_path, {}) is None


@pytest.mark.parametrize(
    ("batch_size", "micro_batch_size", "message"),
    [
        (3, None, "batch_size is 3; allowed: at least 4, a sequence for each rank"),
        (8, 3, "micro_batch_size is 3; allowed: at most 2: a pass for each of the 4 ranks"),
        (3, 1, "batch_size is 3; allowed: at least 4, a sequence for each rank"),
    ],
)
def test_a_rank_without_a_pass(batch_size, micro_batch_size, message):
    with pytest.raises(ValueError) as raised:
        Ranks(0, 4).require_passes(batch_size, micro_batch_size)
    assert str(raised.value) == message


@pytest.mark.parametrize(("batch_size", "micro"), [(8, 2), (8, 1), (7, 1), (9, 2), (4, 1), (8, None), (7, None), (4, None)])
def test_every_row_counts_once(batch_size, micro):
    batch = torch.arange(batch_size)
    dealt = [Ranks(rank, 4).passes(batch, micro) for rank in range(4)]
    assert len({len(passes) for passes in dealt}) == 1
    counted = [row for passes in dealt for rows, share in passes if share for row in rows.tolist()]
    assert sorted(counted) == batch.tolist()
    assert math.isclose(sum(share for passes in dealt for _, share in passes), 1)
    alone = Ranks().passes(batch, micro)
    assert [rows.tolist() for rows, _ in alone] == [rows.tolist() for rows in batch.split(micro or batch_size)]


def test_own_parts_are_all():
    for count in (1, 2, 3, 4, 7):
        for total in (1, 2, 5, 6):
            assert [n for rank in range(count) for n in Ranks(rank, count).own(list(range(total)))] == list(range(total))
