"""The benches' machinery: turns, checks, skips, and the report, on synthetic groups and a synthetic result."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed with the package

from bench import __main__ as record
from bench import curves, experts, machine, memory, paired, report, shapes, training
from tests.shapes import expert_weights, normal, routed_indices, uniform

pytest_plugins = ["pytester"]


def group(impls, case, **options):
    return paired.Group("a-question", impls, lambda: case, {"shape": "N 3", "dtype": "float32", "bytes": 8, "flops": 4}, **options)


@pytest.fixture
def clock(monkeypatch):
    """Time that only passes when a call says so."""
    now = [0.0]
    monkeypatch.setattr(paired.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(paired.time, "sleep", lambda seconds: None)

    def spend(seconds, output=0.0, calls=None, name=None):
        def call():
            now[0] += seconds
            if calls is not None:
                calls.append(name)
            return output

        return call

    return spend


def exact(_, output):
    return abs(output)


def test_settling_calls_are_not_timed(clock):
    """Of a call that takes a second after somebody else's, and a tenth after its own."""
    last, calls = [None], []

    def run(name):
        def call():
            clock(0.1 if last[0] == name else 1.0, calls=calls, name=name)()
            last[0] = name
            return 0.0

        return call

    for settling, expected in ((0, 1.0), (2, 0.1)):
        case = paired.Case({name: run(name) for name in ("ours", "peer")}, lambda name, _: 0.0, 1.0, settling=settling)
        result = paired.measure(group(("ours", "peer"), case, rounds=20))
        assert all(sorted(one.seconds)[10] == pytest.approx(expected) for one in result.series.values())


def test_every_implementation_has_its_turn_in_every_round(clock):
    calls = []
    run = {name: clock(t, calls=calls, name=name) for name, t in (("ours", 0.01), ("a", 0.03), ("b", 0.02))}
    result = paired.measure(group(("ours", "a", "b"), paired.Case(run, exact, 0.0), rounds=6, budget=100.0))
    timed = calls[2 * 3 :]  # after the check and the calibration of each
    assert [sorted(timed[i : i + 3]) for i in range(0, 18, 3)] == [["a", "b", "ours"]] * 6
    before_ours = {a for a, b in itertools.pairwise(timed) if b == "ours"}
    assert {"a", "b"} <= before_ours  # nobody follows the same one every time
    assert result.series["a"].ratios == pytest.approx([3.0] * 6)
    assert result.series["ours"].ratios == [1.0] * 6


def test_ratio_is_taken_within_the_round_so_that_a_slow_machine_cancels(clock, monkeypatch):
    result = paired.measure(group(("ours", "a"), paired.Case({"ours": clock(0.01), "a": clock(0.02)}, exact, 0.0), rounds=5))
    pace = [1, 10, 1, 100, 3]
    slowed = {name: [t * p for t, p in zip(s.seconds, pace, strict=True)] for name, s in result.series.items()}
    assert [a / b for a, b in zip(slowed["a"], slowed["ours"], strict=True)] == pytest.approx(result.series["a"].ratios)


def test_slow_peer_skips_rounds_and_short_calls_are_repeated(clock):
    run = {"ours": clock(1e-4), "slow": clock(5.0)}
    result = paired.measure(group(("ours", "slow"), paired.Case(run, exact, 0.0), rounds=9, budget=10.0))
    assert result.series["slow"].rounds == [0, 4, 8]
    assert result.series["ours"].rounds == list(range(9))
    assert result.series["ours"].calls == 40
    assert result.series["ours"].seconds == pytest.approx([1e-4] * 9)
    assert result.series["slow"].ratios == pytest.approx([5e4] * 3)


def test_cpu_time_does_not_see_another_process(clock):
    run = {"ours": clock(0.01), "peer": clock(0.02)}
    case = paired.Case(run, exact, 0.0, elsewhere=frozenset({"peer"}))
    assert set(paired.measure(group(("ours", "peer"), case, rounds=3)).series) == {"ours", "peer"}
    found = paired.measure(group(("ours", "peer"), case, rounds=3), paired.time.perf_counter)
    assert set(found.series) == {"ours"}
    assert "a process of its own" in found.skipped["peer"]


def test_wrong_answer_is_refused_unless_the_group_expects_it(clock):
    run = {"ours": clock(0.01), "peer": clock(0.01, output=0.5)}
    with pytest.raises(AssertionError, match=r"peer: error 0\.5 against the reference"):
        paired.measure(group(("ours", "peer"), paired.Case(run, exact, 0.1)))
    result = paired.measure(group(("ours", "peer"), paired.Case(run, exact, 0.1, frozenset({"peer"}))))
    assert (result.series["peer"].status, result.series["peer"].error) == ("differs", 0.5)
    nan = {"ours": clock(0.01, output=float("nan"))}
    with pytest.raises(AssertionError, match="ours: error nan"):
        paired.measure(group(("ours",), paired.Case(nan, exact, 0.1)))


def test_recorder_measures_a_group_once_and_repeats_its_failure(clock):
    prepared = []

    def prepare():
        prepared.append(1)
        return paired.Case({"ours": clock(0.01, output=1.0 if len(prepared) > 1 else 0.0)}, exact, 0.0)

    recorder = paired.Recorder()
    good, bad = (paired.Group(name, ("ours",), prepare, rounds=3) for name in ("good", "bad"))
    assert recorder.result(good) is recorder.result(good)
    for _ in range(2):
        with pytest.raises(AssertionError, match="wrong answer"):
            recorder.result(bad)
    assert len(prepared) == 2


def test_another_clock():
    now = itertools.count()  # every look at it takes a second
    result = paired.measure(group(("ours",), paired.Case({"ours": lambda: 0.0}, exact, 0.0), rounds=3), lambda: float(next(now)))
    assert result.series["ours"].seconds == [1.0] * 3


def test_missing_package_gives_the_reason():
    assert paired.missing("torch") is None
    assert paired.missing("no_such_package") == "no_such_package is not installed"


def test_recorded_times_reach_pytest_benchmark(pytester, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # pytest-benchmark writes nothing in a worker
    pytester.makeconftest(
        """
        import pytest
        from bench import paired

        @pytest.fixture(scope="session")
        def recorder():
            return paired.Recorder()

        @pytest.fixture(name="paired")
        def report(recorder, benchmark):
            return lambda group, impl: paired.play(benchmark, recorder.result(group), impl)
        """
    )
    pytester.makepyfile(
        """
        import time
        from bench.paired import Case, Group, cases

        def prepare():
            run = {"ours": lambda: time.sleep(0.01), "twice": lambda: time.sleep(0.02)}
            return Case(run, lambda name, output: 0.0, 0.0, skipped={"absent": "not installed here"})

        @cases([Group("sleep", ("ours", "twice", "absent"), prepare, rounds=3)])
        def test_sleep(paired, group, impl):
            paired(group, impl)
        """
    )
    done = pytester.runpytest("--benchmark-json=out.json", "-rs", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=2, skipped=1)
    done.stdout.fnmatch_lines(["*absent: not installed here*"])
    ours, twice = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert ours["group"] == twice["group"] == "sleep"
    assert len(twice["stats"]["data"]) == 3
    assert twice["stats"]["median"] >= 0.02
    assert 1.2 < twice["extra_info"]["ratio"] < 3
    assert ours["extra_info"]["ratio"] == 1


def entry(name, impl, ratio, **extra):
    info = {"impl": impl, "ratio": ratio, "ratio_quartiles": [ratio * 0.9, ratio * 1.1], "error": 1e-7, "status": "same"}
    info |= {"shape": "F 8, E 2", "dtype": "float32", "flops": 10**6, **extra}
    return {"group": name, "extra_info": info, "stats": {"median": ratio * 1e-3, "min": ratio * 9e-4, "rounds": 9}}


@pytest.fixture
def synthetic(tmp_path):
    result = {
        "machine_info": machine.describe() | {"load_average_before": [0.1, 0.2, 0.3]},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [
            entry("plan", "slow", 12.5, status="differs", error=0.3),
            entry("plan", "ours", 1.0),
            entry("gradient", "ours", 1.0, peak_bytes=2e7),
            entry("gradient", "eager", 150.0, peak_bytes=4e8, note="for scale"),
        ],
    }
    path = tmp_path / "2026-01-02-0123456.json"
    path.write_text(json.dumps(result))
    return path


def test_report_writes_a_table_and_a_figure(synthetic, capsys):
    out = synthetic.parent / "rendered"
    report.main([str(synthetic), "--out", str(out)])
    text = (out / "2026-01-02-0123456.md").read_text()
    assert text in capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].endswith("2026-01-02, commit 0123456")
    plan = lines.index("## plan")
    assert lines[plan + 6].startswith("| ours | 1 ms |")  # ours first, whatever the order of the file
    assert "| slow | 12.5 ms | 11.2 ms | **12.5x** [11.2, 13.8] |" in lines[plan + 7]
    assert lines[plan + 7].endswith("differs from the reference by 0.3 |")
    assert any("400 MB (20x)" in line and "for scale" in line for line in lines)
    assert (out / "2026-01-02-0123456.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["2026-01-02-0123456.md", "2026-01-02-0123456.png"]


def test_curves_take_the_faster_dense_form(synthetic):
    result = json.loads(synthetic.read_text())
    for s, T, impl, ratio in [(64, 4, "dense", 3.0), (64, 4, "dense-merged", 2.0), (64, 1, "dense", 1.5), (64, 1, "other", 0.1)]:
        result["benchmarks"].append(entry(f"curve-s{s}-float32-T{T}", impl, ratio, s=s, T=T))
    synthetic.write_text(json.dumps(result))
    assert curves.speedups(result) == {"float32": {64: [(1, 1.5), (4, 2.0)]}}
    written = report.write(synthetic)
    assert [path.name.removeprefix(synthetic.stem) for path in written] == [".md", ".png", "-by-T.png"]
    assert written[2].read_bytes().startswith(b"\x89PNG")


def test_table_has_a_column_for_each_kind_of_memory(synthetic):
    result = json.loads(synthetic.read_text())
    result["benchmarks"] = [
        entry("step", "ours", 1.0, kept_bytes=0, peak_bytes=3e7, gradient_bytes=2e7),
        entry("step", "eager", 2.0, kept_bytes=5e7, peak_bytes=9e7),
        entry("plan", "ours", 1.0),
    ]
    step, plan = report.table(result).split("## ")[1:]
    assert "gradients, part of every peak: 20 MB" in step
    assert "| peak extra memory | kept for backward | rounds |" in step
    assert "| 90 MB (3.00x) | 50 MB | 9 |" in step
    assert "memory" not in plan
    result["machine_info"]["matrix_instructions"] = []
    assert "threads, no instructions for 16-bit products; " in report.table(result)
    result["machine_info"]["matrix_instructions"] = ["amx_bf16"]
    assert "threads, amx_bf16; " in report.table(result)
    assert "not wall time" not in report.table(result)
    result["machine_info"]["clock"] = "CPU time"
    assert "Times are CPU time, not wall time" in report.table(result)


def test_report_refuses_an_empty_result(tmp_path):
    path = tmp_path / "empty.json"
    path.write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match="holds no benchmarks"):
        report.write(path)


def test_machine_has_a_neutral_name_and_no_host():
    import platform

    assert all(c.isascii() and (c.isalnum() or c == "-") for c in machine.machine_name())
    assert "node" not in machine.describe()
    assert len(platform.node()) < 4 or platform.node() not in json.dumps(machine.describe())


def test_peak_memory_counts_the_live_bytes_of_the_call(tmp_path, monkeypatch):
    numel = 25_000_000  # 100 MB
    code = f"import torch\n\ndef memory_call(name):\n    return lambda: [torch.ones({numel}) for _ in range(int(name))]\n"
    (tmp_path / "a_bench.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert memory.peak_extra_bytes("a_bench", "2") == pytest.approx(2 * 4 * numel, rel=0.1)


def test_kept_memory_is_what_the_backward_pass_needs_beyond_the_inputs():
    x, w = torch.ones(3, 4), torch.ones(4, 5, requires_grad=True)
    assert memory.kept_bytes(lambda: (x @ w).exp(), [x, w]) == 0  # x and w are held, exp keeps its output
    assert memory.kept_bytes(lambda: (x @ w).sin(), [x, w]) == 3 * 5 * 4
    assert memory.kept_bytes(lambda: (x @ w).sin().sin(), [x, w]) == 2 * 3 * 5 * 4


# --- the command -------------------------------------------------------------------------------------------------------


def test_quick_variants_run_only_where_asked_for():
    everything = str(machine.ROOT / "bench")
    assert record.chosen([]) == [everything, "-k", "not quick"]
    assert record.chosen(["-k", "quick"])[-2:] == ["-k", "quick"]  # pytest takes the last
    assert record.chosen(["bench/bench_experts.py::test_experts", "--backward"])[0] == "-k"
    assert everything in record.chosen(["--backward"])


def test_parts_of_one_commit_join_in_one_file(tmp_path):
    path, draft = tmp_path / "a.json", tmp_path / "a.part"
    for entries in ([entry("plan", "ours", 1.0), entry("step", "ours", 1.0)], [entry("step", "ours", 7.0)]):
        draft.write_text(json.dumps({"benchmarks": entries}))
        record.join(path, draft)
        assert not draft.exists()
    found = [(one["group"], one["extra_info"]["ratio"]) for one in json.loads(path.read_text())["benchmarks"]]
    assert found == [("plan", 1.0), ("step", 7.0)]


@pytest.mark.parametrize("arguments", [[], ["--backward"]])
def test_backward_selects_the_backward_passes(pytestconfig, arguments):
    from bench import bench_experts, conftest

    class Item:
        def __init__(self, name):
            self.name = name

    class Config:
        hook = type("Hook", (), {"pytest_deselected": staticmethod(lambda items: dropped.extend(items))})
        getoption = staticmethod(lambda name: f"--{name}" in arguments)

    dropped = []
    items = [Item(f"test_experts[{group.name}-ours]") for group in bench_experts._groups()]
    everything = list(items)
    conftest.pytest_collection_modifyitems(Config, items)
    assert [item for item in everything if item in items or item in dropped] == everything
    assert bool(dropped) == bool(arguments)
    assert any("backward" in item.name for item in items)
    assert not any("backward" in item.name for item in dropped)


# --- forward and backward of the experts -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def step():
    """(weights, inputs, judge) of a small routed FFN in float32."""
    shape, T = shapes.Shape("small", 12, 6, 4, 2), 9
    w = experts.layouts(shape, *expert_weights(shape.E, shape.s, shape.H, seed=0, dtype=torch.float32))
    x, dy = (normal(T, shape.H, seed=seed, dtype=torch.float32) for seed in (3, 5))
    routing = uniform(T, shape.K, seed=6, dtype=torch.float32)
    inputs = training.Inputs(x, dy, routed_indices(T, shape.K, shape.E, seed=4), routing)
    return shape, w, inputs, training.judge(w, inputs)


@pytest.mark.parametrize(
    "impl", ["ours", "ours-recompute", "transformers-eager", "transformers-grouped_mm", "dense", "dense-merged"]
)
def test_a_wrong_gradient_is_found(step, impl):
    """Each output of a step in turn, wrong in its last row or not finite in one place."""
    shape, w, inputs, error = step
    found, skipped = training.steps(shape, w, inputs)
    assert impl not in skipped
    right = [t.detach() for t in found[impl](inputs.dy)]
    assert error(impl, right) < 1e-5
    for n, tensor in enumerate(right):
        for spoil in (lambda t: t.select(0, -1).mul_(1.1), lambda t: t.flatten()[0].fill_(float("nan"))):
            wrong = [t.clone(memory_format=torch.contiguous_format) for t in right]
            spoil(wrong[n])
            assert error(impl, wrong) > 1e-3, (n, tensor.shape)


def test_the_dense_step_is_not_the_sparse_one(step):
    shape, w, inputs, error = step
    found, _ = training.steps(shape, w, inputs, ("ours", "dense"))
    assert error("dense", [found["ours"](inputs.dy)[0], *found["dense"](inputs.dy)[1:]]) > 0.1


@pytest.mark.parametrize(
    ("flags", "whole"),
    [
        ((), True),
        (("--kernel", "NAME"), False),
        (("--target", "sm_90"), False),
        (("--first",), False),
        (("--no-json",), False),
    ],
    ids=lambda value: " ".join(value) or "everything" if isinstance(value, tuple) else "",
)
def test_a_part_of_the_compile_report_is_not_written_where_a_whole_one_goes(tmp_path, monkeypatch, capsys, flags, whole):
    triton = pytest.importorskip("triton")
    from bench.kernels import KERNELS, compile_report

    flags = [next(iter(KERNELS)) if flag == "NAME" else flag for flag in flags]
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(compile_report, "compile_all", lambda *args: [])
    monkeypatch.setattr(compile_report.machine, "RESULTS", tmp_path / "results")
    assert compile_report.main(flags) == 0
    assert len(list(tmp_path.rglob("*.json"))) == whole
    assert ("a part of a report" in capsys.readouterr().out) == (not whole and "--no-json" not in flags)
    if "--no-json" not in flags:
        assert compile_report.main([*flags, "--output", str(tmp_path / "part.json")]) == 0
        assert (tmp_path / "part.json").is_file()
