"""The GPU suite's bookkeeping, with a fake timer on a CPU: what is recorded, resumed, skipped, and refused."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed with the package

from bench import alignment, experts, masked, report, shapes, training
from bench.gpu import alignment as gpu_alignment
from bench.gpu import dispatch as gpu_dispatch
from bench.gpu import experts as gpu_experts
from bench.gpu import routing as gpu_routing
from bench.gpu import suite as gpu_suite
from bench.gpu import training as gpu_training
from bench.gpu import transport as gpu_transport
from bench.paired import Case, Group
from dotmoe_kernels._backend import interpreted

CEILINGS = {"copy_bytes_per_second": 1e12, "bf16_flops_per_second": 1e14}
PASSED = {"files": [], "returncode": 0, "seconds": 1.0, "summary": "3 passed"}


class Clock:
    """Time that passes when a call says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def call(self, name, spend, output=0.0):
        def run():
            self.calls.append(name)
            self.now += spend
            if isinstance(output, Exception):
                raise output
            return output

        return run

    def meter(self):
        def timer(call):
            before = self.now
            call()
            return self.now - before

        return gpu_suite.Meter(timer, lambda call: 4096, lambda: self.now)


def group(name, case, info=None, impls=None):
    return Group(name, tuple(impls or case.run), lambda: case, {"shape": "N 3", "dtype": "float32", "bytes": 1e9} | (info or {}))


def case(clock, *, tolerance=1e-3, may_differ=(), skipped=None, **calls):
    run = {name: clock.call(name, *given) for name, given in calls.items()}
    return Case(run, lambda _, output: abs(output), tolerance, frozenset(may_differ), skipped or {})


@pytest.fixture
def suite(tmp_path):
    def start(groups, clock, *, resume=True, commit="abc", tests=lambda files, limit: PASSED, **options):
        path = tmp_path / "gpu.json"
        record = gpu_suite.Record(path, "part", path if resume else None, commit)
        part = gpu_suite.Part(("tests/test_nothing.py",), lambda: groups)
        options = {"minutes": 10, "meter": clock.meter(), "tests": tests, "ceilings": lambda: CEILINGS} | options
        code = gpu_suite.run(part, record, **options)
        return code, json.loads(path.read_text())

    return start


def by_impl(data):
    return {one["extra_info"]["impl"]: one for one in data["benchmarks"]}


def test_times_ratios_and_limits(suite):
    clock = Clock()
    code, data = suite([group("a", case(clock, ours=(0.002,), peer=(0.006,)))], clock)
    assert code == 0
    assert data["complete"]
    assert data["tests"] == PASSED
    ours, peer = by_impl(data)["ours"], by_impl(data)["peer"]
    assert ours["stats"]["median"] == pytest.approx(0.002)
    assert ours["extra_info"]["times_limit"] == pytest.approx(2.0)  # 1 GB at 1 TB/s
    assert peer["extra_info"]["ratio"] == pytest.approx(3.0)
    assert peer["extra_info"]["peak_bytes"] == 4096
    assert data["machine_info"]["versions"]["torch"] == torch.__version__


def test_implementations_alternate(suite):
    clock = Clock()
    suite([group("a", case(clock, ours=(1e-3,), x=(1e-3,), y=(1e-3,)))], clock)
    timed = clock.calls[3:]  # after the check of each
    assert [sorted(timed[i : i + 3]) for i in range(0, 9, 3)] == [["ours", "x", "y"]] * 3
    assert timed[:3] != timed[3:6]


def test_a_flops_limit():
    info = {"bytes": 1e9, "flops": 1e12}
    assert gpu_suite.limit_seconds(info, CEILINGS) == pytest.approx(1e-2)
    assert gpu_suite.limit_seconds(info | {"flops_rate": 1e13}, CEILINGS) == pytest.approx(1e-1)


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (torch.OutOfMemoryError("CUDA"), "out of memory"),
        (TypeError("no such\nthing"), "failed: TypeError: no such"),
        (0.5, "wrong"),
    ],
    ids=["memory", "error", "wrong"],
)
def test_a_peer_that_cannot_be_timed_is_named_with_its_reason(suite, output, reason):
    clock = Clock()
    code, data = suite([group("a", case(clock, ours=(1e-3,), peer=(1e-3, output)))], clock)
    assert code == 0
    assert list(by_impl(data)) == ["ours"]
    assert data["skipped"]["a"]["peer"].startswith(reason)
    assert clock.calls.count("peer") == 1


def test_a_wrong_answer_of_ours_fails_its_group_only(suite):
    clock = Clock()
    groups = [group("bad", case(clock, ours=(1e-3, 0.5), peer=(1e-3,))), group("good", case(clock, ours=(1e-3,)))]
    code, data = suite(groups, clock)
    assert code == 1
    assert "wrong: error 0.5" in data["failed"]["bad"]
    assert [one["group"] for one in data["benchmarks"]] == ["good"]
    assert "FAILED" in gpu_suite.summary(data)


def test_nan_is_wrong(suite):
    clock = Clock()
    assert suite([group("a", case(clock, ours=(1e-3, float("nan"))))], clock)[0] == 1


def test_another_answer_is_timed_and_marked(suite):
    clock = Clock()
    data = suite([group("a", case(clock, may_differ=("peer",), ours=(1e-3,), peer=(1e-3, 0.5)))], clock)[1]
    assert by_impl(data)["peer"]["extra_info"]["status"] == "differs"
    assert "differs" in gpu_suite.summary(data)


def test_it_ends_in_time_and_goes_on_from_there(suite):
    first, second = Clock(), Clock()
    names = ["a", "b", "c"]
    code, data = suite([group(n, case(first, ours=(10.0,))) for n in names], first, minutes=1.2)  # 40 s a group
    assert code == 1
    assert not data["complete"]
    assert [one["group"] for one in data["benchmarks"]] == ["a", "b"]
    assert "NOT COMPLETE" in gpu_suite.summary(data)

    def again(files, limit):
        raise AssertionError("the tests ran already")

    code, data = suite([group(n, case(second, ours=(10.0,))) for n in names], second, tests=again, minutes=1.2)
    assert code == 0
    assert [one["group"] for one in data["benchmarks"]] == names
    assert len(second.calls) == 1 + 3


def test_a_slow_group_stops_after_the_round_in_which_time_runs_out(suite):
    clock = Clock()
    data = suite([group("a", case(clock, ours=(30.0,)))], clock, minutes=1.2)[1]
    assert by_impl(data)["ours"]["stats"]["rounds"] == 2


def test_a_record_of_another_commit_is_not_taken_over(suite, capsys):
    clock = Clock()
    suite([group("a", case(clock, ours=(1e-3,)))], clock)
    suite([group("a", case(clock, ours=(1e-3,)))], clock, commit="def")
    assert clock.calls.count("ours") == 2 * 4
    assert "begun anew" in capsys.readouterr().out


def test_what_was_done_is_on_disk_when_a_later_group_dies(suite, tmp_path):
    clock = Clock()

    def die():
        raise KeyboardInterrupt

    groups = [group("a", case(clock, ours=(1e-3,))), Group("b", ("ours",), die, {})]
    with pytest.raises(KeyboardInterrupt):
        suite(groups, clock)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert [one["group"] for one in data["benchmarks"]] == ["a"]


def test_failing_tests_fail_the_run(suite):
    clock = Clock()
    code, data = suite([], clock, tests=lambda files, limit: PASSED | {"returncode": 1, "summary": "1 failed"})
    assert code == 1
    assert "1 failed" in gpu_suite.summary(data)


def test_the_report_renders_it(suite):
    clock = Clock()
    data = suite([group("a", case(clock, ours=(2e-3,), peer=(6e-3,)))], clock)[1]
    assert "| peer | 6 ms |" in report.table(data)


def test_tests_run_in_a_process_of_their_own():
    result = gpu_suite.run_tests(("tests/test_import.py", "tests/not_there.py"), 120)
    assert result["files"] == ["tests/test_import.py"]
    assert result["returncode"] == 5  # none of its tests needs a GPU


def test_ceilings():
    found = gpu_suite.measure_ceilings(lambda call: (call(), 1e-3)[1], "cpu")
    assert found == {"copy_bytes_per_second": 8 * 2**20 / 1e-3, "bf16_flops_per_second": 2 * 64**3 / 1e-3}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_suite.main(["--part", "transport"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_dry_run_lists_everything(capsys):
    assert gpu_suite.main(["--part", "transport", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for one in gpu_transport.transport_groups():
        assert one.name in printed
    assert gpu_suite.main(["--part", "transport", "--dry-run", "--only", "rounding"]) == 0
    assert "warm start" not in capsys.readouterr().out


SMALL = shapes.Shape("small", 8, 4, 24, 1)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_transport_benches_are_right(suite, monkeypatch, layers):
    """Every group is set up and every implementation checked, at a small size on the CPU; a call counts as a millisecond."""
    monkeypatch.setattr(gpu_transport, "compiled_step", lambda: gpu_transport.loop_step)
    groups = gpu_transport.transport_groups("cpu", ((f"small x {layers}", layers, SMALL),))
    meter = gpu_suite.Meter(lambda call: (call(), 1e-3)[1], lambda call: 0, lambda: 0.0)
    code, data = suite(groups, Clock(), meter=meter)
    assert data["failed"] == {}
    assert code == 0
    needs = ("is not installed", "needs a GPU", "about a second")
    for reasons in data["skipped"].values():
        assert all(any(text in reason for text in needs) for reason in reasons.values()), reasons
    for one in data["benchmarks"]:
        if not one["extra_info"]["impl"].startswith(("pot", "geomloss")):
            assert one["extra_info"]["error"] < 0.1, one["name"]


# --- experts and alignment ---------------------------------------------------------------------------------------------

THIN = shapes.Shape("thin", 32, 8, 16, 3)
ABSENT = ("is not installed", "needs a GPU", "needs Triton's kernels", "cannot be loaded")


@pytest.fixture
def measured(suite, monkeypatch):
    """Every group set up and every implementation checked, at a small size on the CPU; a call counts as a millisecond."""
    monkeypatch.setattr(gpu_experts, "compiled_silu_and_mul", lambda: gpu_experts.silu_and_mul)
    monkeypatch.setattr(gpu_experts, "MANY", 5)  # tokens, from where the reductions are compared
    monkeypatch.setattr(gpu_suite, "_ROUNDS", 1)
    monkeypatch.setattr(gpu_suite, "free_memory", lambda: None)  # as many times as here it takes most of the time

    def start(groups):
        meter = gpu_suite.Meter(lambda call: (call(), 1e-3)[1], lambda call: 0, lambda: 0.0)
        code, data = suite(groups, Clock(), meter=meter)
        assert data["failed"] == {}
        assert code == 0
        for reasons in data["skipped"].values():
            assert all(any(text in reason for text in ABSENT) for reason in reasons.values()), reasons
        assert all(one["extra_info"]["status"] == "same" for one in data["benchmarks"])
        return data

    return start


def impls_of(data, name):
    return [one["extra_info"]["impl"] for one in data["benchmarks"] if one["group"] == name]


def test_the_experts_benches_are_right(measured):
    data = measured(gpu_experts.expert_groups("cpu", (THIN,), ((1, 65), (2,))))
    ours = ["ours", "ours-decode", "ours-masked", "ours-grouped"]
    dense = ["dense", "dense-merged", "eager-masked-dense"]
    assert [name for name in impls_of(data, "experts thin T 1") if "transformers" not in name] == ours + dense
    assert [name for name in impls_of(data, "experts thin T 65") if "transformers" not in name] == [*ours[:1], *ours[2:], *dense]
    assert "dense-merged" in impls_of(data, "block thin T 65")
    assert "ours-graph" in data["skipped"]["experts thin T 1"]


def test_the_experts_kernels_are_in_the_benches(measured):
    """The interpreter runs Triton's kernels: each way to add up the rows, and the masked up product."""
    with interpreted():
        data = measured([one for one in gpu_experts.expert_groups("cpu", (THIN,), ((5,), ())) if one.name.startswith("experts")])
    found = impls_of(data, "experts thin T 5")
    assert {f"ours-grouped-{how}" for how in ("rows", "chunks", "dense", "atomics")} < set(found)
    assert "ours-masked-triton-up" in found


def test_the_alignment_benches_are_right(measured):
    data = measured(gpu_alignment.ffn_groups("cpu", (THIN,), (5,)))
    assert impls_of(data, "alignment thin T 5") == list(masked.GPU_IMPLS)
    data = measured(gpu_alignment.step_groups("cpu", (alignment.TINY,)))
    assert impls_of(data, "alignment step tiny") == list(alignment.IMPLS)
    assert "Of a step, by part" in report.table(data)


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "interpreted"])
def test_the_training_benches_are_right(measured, kernels):
    with interpreted() if kernels else nullcontext():
        data = measured(gpu_training.training_groups("cpu", (THIN,), (5,)))
    found = impls_of(data, "training thin T 5")
    assert {"ours", "ours-recompute", "dense", "dense-merged"} <= set(found)
    assert set(found) | set(data["skipped"]["training thin T 5"]) == set(training.IMPLS)
    kept = {name: one["extra_info"]["kept_bytes"] for name, one in by_impl(data).items()}
    assert kept["ours-recompute"] < kept["ours"]
    assert "keeps" in gpu_suite.summary(data)


def test_a_dense_answer_is_not_a_sparse_one():
    w = gpu_experts.weights(THIN, "cpu")
    x, indices = gpu_experts.draw(6, THIN.H, seed=3, device="cpu"), gpu_experts.draw_indices(6, THIN, "cpu")
    error = gpu_experts._judge(x, w, indices)
    dense = experts.dense(x, w)
    assert error("dense", dense) < 2e-2
    assert error("ours", dense) > 0.1
    dense[3, 0] = float("nan")  # of a token that is not compared
    assert error("dense", dense) == float("inf")


def test_the_telling_groups_come_first():
    names = [one.name for one in gpu_experts.expert_groups()]
    assert names[:3] == ["experts L3 T 1", "experts L3 T 4", "experts L3 T 8192"]
    assert len(set(names)) == len(names) == 4 * (11 + 3)
    whole = [one.name for one in gpu_suite.PARTS["experts"].groups()]
    assert whole[:24] == names[:24]
    assert whole[24] == "training L3 T 8192"
    assert sorted(whole) == sorted(names + [one.name for one in gpu_training.training_groups()])
    assert gpu_alignment.alignment_groups()[0].name == "alignment L3 T 8192"


def test_one_size_first_and_the_rest_later(suite, monkeypatch):
    """--only, then the same file without it: what is there is not measured again."""
    monkeypatch.setattr(gpu_suite, "free_memory", lambda: None)
    groups = gpu_experts.expert_groups()
    clocks = [Clock(), Clock()]

    def with_calls(clock):
        return [group(one.name, case(clock, ours=(1e-3,)), one.info, ("ours",)) for one in groups]

    code, data = suite(with_calls(clocks[0]), clocks[0], only="L3 T 8192")
    assert code == 0
    assert [one["group"] for one in data["benchmarks"]] == ["experts L3 T 8192", "block L3 T 8192"]
    code, data = suite(with_calls(clocks[1]), clocks[1])
    assert code == 0
    assert len({one["group"] for one in data["benchmarks"]}) == len(groups) == len(data["benchmarks"])
    assert len(clocks[1].calls) == (len(groups) - 2) * 4


# --- routing and dispatch ----------------------------------------------------------------------------------------------


def test_the_routing_benches_are_right(suite, monkeypatch):
    monkeypatch.setattr(gpu_suite, "_ROUNDS", 1)
    monkeypatch.setattr(gpu_suite, "free_memory", lambda: None)
    meter = gpu_suite.Meter(lambda call: (call(), 1e-3)[1], lambda call: 0, lambda: 0.0)
    groups = gpu_routing.routing_groups((1, 5), "cpu") + gpu_dispatch.dispatch_groups((1, 5), 16, "cpu")
    code, data = suite(groups, Clock(), meter=meter)
    assert data["failed"] == {}
    assert code == 0
    for one in data["benchmarks"]:
        if one["extra_info"]["impl"] != "hard-topk":
            assert one["extra_info"]["error"] < 2e-2, one["name"]
