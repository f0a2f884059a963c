"""The first GPU call without a GPU: its budget, its children, its record, its registry, its dry mode."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench is not installed with the package

import dotmoe_kernels as dk
from bench.gpu import cases, dry, first, headline, second, suite, worker
from bench.gpu.budget import Budget, Share
from bench.gpu.children import ANEW, Lane, run_lanes, spread
from bench.gpu.session import Session
from bench.machine import ROOT
from bench.paired import Case, Group

# --- the budget --------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_what_a_stage_leaves_goes_to_those_after_it():
    clock = Clock()
    budget = Budget(2, (Share("a", 1, most=20), Share("b", 1), Share("c", 2)), reserve=8, clock=clock)
    assert budget.left() == 112
    assert budget.seconds("a") == 20  # of 28
    clock.now += 12
    assert budget.seconds("b") == pytest.approx(100 / 3)
    clock.now += 30
    assert budget.seconds("c") == 70  # all that is left
    clock.now += 80
    assert budget.seconds("c") == budget.left() == 0
    assert budget.passed() == 122


def test_the_shares_of_nine_minutes():
    budget = Budget(9, first.SHARES, clock=lambda: 0.0)
    assert budget.seconds("smoke") <= 90
    assert sum(min(budget.left() * share.weight, share.most) for share in first.SHARES) <= 60 * 9


# --- children ----------------------------------------------------------------------------------------------------------

CHILD = f"""
import json, os, sys, time
items, events = json.load(open(sys.argv[1])), open(sys.argv[2], "a")
def say(**event):
    events.write(json.dumps(event) + chr(10))
    events.flush()
for item in items:
    if item == "stillborn":
        sys.exit(3)
    say(begin=item)
    print("working on", item, flush=True)
    if item == "hang":
        time.sleep(600)
    if item == "die":
        os.abort()
    if item == "slow":
        time.sleep(1.5)
    say(end=item, pid=os.getpid(), cache=os.environ.get("TRITON_CACHE_DIR"))
    if item == "poisoned":
        sys.exit({ANEW})
"""


@pytest.fixture
def children(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def run(*lanes, seconds=60.0, workers=2, limit=1.0, on_end=None):
        found = {}

        def end(kind, item, outcome):
            assert item not in found, "an item ends once"
            found[item] = outcome
            if on_end:
                on_end(kind, item, outcome)

        run_lanes(
            [Lane("fake", lane, limit, start=10.0) for lane in lanes],
            end,
            command=lambda lane, items, events: [sys.executable, "-S", str(script), str(items), str(events)],
            folder=tmp_path,
            environment={**os.environ, "TRITON_CACHE_DIR": "there"},
            workers=workers,
            seconds=seconds,
        )
        return found

    return run


def statuses(found):
    return {item: one["status"] for item, one in found.items()}


def test_a_hung_and_a_dead_child_are_named_and_the_rest_goes_on(children):
    found = children(("a", "hang", "b", "die", "c"), ("d", "poisoned", "e"), ("stillborn", "f"))
    expected = dict.fromkeys(("a", "b", "c", "d", "poisoned", "e"), "done")
    assert statuses(found) == expected | {
        "hang": "hung: ended after 1 s",
        "die": "died: signal 6",
        "stillborn": "died: exit status 3",
        "f": "died: exit status 3",  # who dies before the first item would die again
    }
    assert found["die"]["output"].endswith("working on die")
    assert found["a"]["pid"] != found["b"]["pid"] != found["c"]["pid"]
    assert found["d"]["pid"] == found["poisoned"]["pid"] != found["e"]["pid"]
    assert found["a"]["cache"] == "there"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_a_stage_stops_itself_and_says_what_it_did_not_reach(children):
    begun = time.monotonic()
    found = children(("a", "hang", "b"), ("c",), seconds=2.0, workers=1, limit=100.0)
    assert time.monotonic() - begun < 15
    assert statuses(found) == {
        "a": "done",
        "hang": "not reached: the stage's time was over while it ran",
        "b": "not reached",
        "c": "not reached",
    }
    assert children(("d",), seconds=0)["d"]["status"] == "not reached"


def test_no_child_outlives_an_exception(children, tmp_path):
    def refuse(kind, item, outcome):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        children(("a", "hang"), limit=100.0, on_end=refuse)
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _command(path)]
    assert alive == []


def _command(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_spread():
    assert spread("abcde", 2) == [("a", "c", "e"), ("b", "d")]
    assert spread("a", 16) == [("a",)]
    assert spread("", 3) == []
    assert spread("abcde", 16, least=4) == [("a", "c", "e"), ("b", "d")]
    assert spread("abcd", 16, least=4) == [("a", "b", "c", "d")]


# --- the record --------------------------------------------------------------------------------------------------------


def entry(group, impl, median, limit=None):
    return {"group": group, "extra_info": {"impl": impl, "times_limit": limit, "ratio": 1}, "stats": {"median": median}}


class Runner:
    """Stands for the children: what each item gives, and what the JSON said when it came."""

    def __init__(self, **given):
        self.given, self.lanes, self.seen = given, [], []

    def __call__(self, lanes, on_end, workers, seconds):
        for lane in lanes:
            self.lanes.append((lane.kind, lane.items))
            for item in lane.items:
                found = self.given.get(lane.kind, lambda item: {})(item)
                if isinstance(found, BaseException):
                    raise found
                on_end(lane.kind, item, {"status": "done", **found})
                if lane.kind == "bench":
                    self.seen.append(json.loads(self.path.read_text()))


@pytest.fixture
def session(tmp_path):
    def start(run, shares=first.SHARES):
        run.path = tmp_path / "out" / "first-abc.json"
        return Session(run.path, "first", "abc", Budget(9, shares), run, 4)

    return start


WALKED = {
    "smoke": lambda item: {"error": 0.0},
    "walk": lambda item: {"binaries": ["one", "two"] if "routing" in item else ["two"], "launches": 3},
    "collect": lambda item: {"tests": [f"{item}::test_a", f"{item}::test_int64_addresses"]},
    "compile": lambda item: {"kernel": item},
    "tests": lambda item: {"seconds": 1.0},
    "bench": lambda item: (
        {"ceilings": {"copy_bytes_per_second": 4e12, "bf16_flops_per_second": 8e14}}
        if item == "ceilings"
        else {
            "benchmarks": [entry(item.split("|")[0], impl, 1e-3) for impl in ("ours", "dense-merged")],
            "skipped": {"x": "absent"},
        }
    ),
}


def test_the_whole_call_in_its_order(session, capsys):
    run = Runner(**WALKED)
    made = session(run)
    assert first.reported(made, lambda: first.run(made)) == 0
    kinds = list(dict.fromkeys(kind for kind, _ in run.lanes))
    assert kinds == ["smoke", "collect", "walk", "compile", "tests", "bench"]
    smoke = [items for kind, items in run.lanes if kind == "smoke"]
    assert smoke[-1] == ("balanced_assignment/small", "balanced_assignment/real")
    assert sorted(sum(smoke, ())) == sorted(cases.SMOKE)
    assert sorted(sum((items for kind, items in run.lanes if kind == "compile"), ())) == ["one", "two"]
    tests = [items for kind, items in run.lanes if kind == "tests"]
    assert all("int64" in test for test in tests[0])  # of several GB each: one after the other
    assert not any("int64" in test for lane in tests[1:] for test in lane)
    data = json.loads(run.path.read_text())
    assert data["complete"]
    assert [one["group"] for one in data["benchmarks"][::2]] == [one.name for one in headline.FIRST]
    assert data["skipped"][headline.FIRST[0].name] == {"x": "absent"}
    printed = capsys.readouterr().out
    assert printed.rstrip().splitlines()[-1].startswith(headline.FIRST[-1].name)  # the table is last
    assert run.path.with_suffix(".txt").read_text() in printed


def test_the_json_is_whole_after_every_group(session):
    run = Runner(**WALKED)
    made = session(run)
    first.run(made)
    assert [len(one["benchmarks"]) for one in run.seen] == [2 * i for i in range(1 + len(headline.FIRST))]
    assert not any(path.name.startswith(".") for path in run.path.parent.iterdir())


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("broken")], ids=["interrupt", "error"])
def test_a_call_that_ends_early_leaves_what_it_had(session, problem, capsys):
    def bench(item):
        return problem if item.startswith("block") else WALKED["bench"](item)

    run = Runner(**{**WALKED, "bench": bench})
    made = session(run)
    with pytest.raises(type(problem)):
        first.reported(made, lambda: first.run(made))
    data = json.loads(run.path.read_text())
    assert len(data["benchmarks"]) == 2 * [one.name for one in headline.FIRST].index("block L3 T 1")
    assert data["items"]["tests"]
    assert "NOT COMPLETE" in capsys.readouterr().out


def test_what_failed_is_named_and_fails_the_call(session, capsys):
    def tests(item):
        return {"status": "hung: ended after 75 s"} if "test_routing.py::test_a" in item else {}

    run = Runner(**{**WALKED, "tests": tests, "bench": lambda item: {"status": "not reached"}})
    made = session(run)
    assert first.reported(made, lambda: first.run(made)) == 1
    printed = capsys.readouterr().out
    assert "tests/test_routing.py::test_a: hung" in printed
    assert "not reached: ceilings, experts L3 T 1," in printed
    assert "NOT COMPLETE" in printed


def test_a_test_that_had_no_memory_gets_the_device_alone(session):
    tried = []

    def tests(item):
        tried.append(item)
        short = item.endswith("test_dispatch.py::test_a") and tried.count(item) == 1
        return {"status": "failed", "reason": "torch.OutOfMemoryError: CUDA out of memory"} if short else {}

    made = session(Runner(**{**WALKED, "tests": tests}))
    assert first.run(made) == 0
    assert tried.count("tests/test_dispatch.py::test_a") == 2


def test_no_memory_left_for_a_benchmark_is_no_target_met():
    target = headline.Target("times", 2.0, "dense", "ours-graph")
    assert target.reached([entry("a", "ours", 1.0), entry("a", "dense", 4.0)]) is None
    assert target.reached([entry("a", "ours-graph", 1.0), entry("a", "dense", 4.0)]) == 2.0
    assert headline.Target("limit", 2.0).reached([entry("a", "ours", 1.0, limit=4.0)]) == 0.5
    assert headline.Target("seconds", 0.01).reached([entry("a", "ours", 0.005)]) == 2.0
    missed = headline.missed([entry("experts L3 T 8192", "ours", 1.0), entry("experts L3 T 8192", "dense-merged", 1.0)])
    assert missed == [(pytest.approx(1 / 1.9), "experts L3 T 8192")]


def test_the_second_call_profiles_the_worst_first(session, capsys):
    names = ("experts L3 T 8192", "experts coarse T 8192", "block L3 T 8192")
    before = [entry(name, impl, 1.0) for name in names for impl in ("ours", "dense-merged")]
    row = {"name": "_up_kernel", "calls": 1.0, "device_seconds": 5e-4, "host_seconds": 0.0}
    run = Runner(**{**WALKED, "bench": lambda item: {}, "profile": lambda item: {"device": [row], "host": []}})
    made = session(run, second.SHARES)
    assert first.reported(made, lambda: second.run(made, before), second.profile_text) == 0
    assert run.lanes[-1] == ("profile", ("experts coarse T 8192", "experts L3 T 8192"))
    assert "500.0    1.0 x  _up_kernel" in capsys.readouterr().out


# --- what a child does --------------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path):
    def run(kind, *items):
        with (tmp_path / "events").open("w") as file:
            assert worker.KINDS[kind](list(items), worker.Report(file), tmp_path) == 0
        lines = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
        assert [line["begin"] for line in lines[::2]] == [line["end"] for line in lines[1::2]] == list(items)
        return lines[1::2]

    return run


ROUNDING = "rounding Q25 x 28"


@pytest.fixture
def groups(monkeypatch):
    calls = {"ours": lambda: 0.0, headline.GRAPH: lambda: 0.0}
    case = Case(calls, lambda name, found: abs(found), 1e-3, skipped={"peer": "absent"})

    def broken():
        raise RuntimeError("no\nweights")

    made = [Group(ROUNDING, tuple(calls), lambda: case, {"bytes": 1e9}), Group("block L3 T 1", ("ours",), broken, {})]
    monkeypatch.setattr(headline, "all_groups", lambda: {group.name: group for group in made})
    monkeypatch.setattr(suite, "measure_ceilings", lambda: {"copy_bytes_per_second": 1e12, "bf16_flops_per_second": 1e14})
    meter = suite.Meter(lambda call: 2e-3, lambda call: 4096, lambda: 0.0)
    monkeypatch.setattr(suite, "Meter", lambda: meter)
    monkeypatch.setattr(worker, "call_seconds", lambda call: 5e-3)


def test_a_child_measures_headlines(groups, child):
    ceilings, found, failed = child("bench", "ceilings", f"{ROUNDING}|40", "block L3 T 1|40")
    assert ceilings["ceilings"]["copy_bytes_per_second"] == 1e12
    ours, graph = found["benchmarks"]
    assert [one["extra_info"]["impl"] for one in (ours, graph)] == ["ours", "ours-graph"]
    assert ours["group"] == ROUNDING
    assert ours["extra_info"]["times_limit"] == pytest.approx(2)
    assert ours["extra_info"]["call_seconds"] == 5e-3
    assert found["skipped"] == {"peer": "absent"}
    assert failed["status"] == "failed"
    assert failed["reason"] == "RuntimeError: no"


def test_a_child_profiles(groups, child):
    (found,) = child("profile", ROUNDING)
    assert "reason" not in found
    assert found["device"] == []  # nothing ran on one


def test_a_child_says_what_became_of_every_test(tmp_path):
    pytest.importorskip("triton")
    tests = ["tests/test_backend.py::test_a_gpu_tensor_runs_triton"]
    (tmp_path / "items").write_text(json.dumps(tests))
    outside("-m", "bench.gpu.worker", "tests", str(tmp_path / "items"), str(tmp_path / "events"))
    begin, end = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert begin == {"begin": tests[0]}
    assert end["end"] == tests[0]
    assert ("status" in end) != torch.cuda.is_available()  # else skipped, with the reason


# --- the registry ------------------------------------------------------------------------------------------------------


def test_every_public_op_is_in_the_smoke():
    others = {"convert", "export", "finetune", "load", "save"}
    ops = {name for name in dk.__all__ if name[0].islower()} - others
    assert {name.split()[0] for name in cases.OPS} == ops
    paths = {name.removeprefix("expert_ffn ") for name in cases.OPS}
    assert {"decode", "masked", "grouped", "training"} <= paths
    assert list(cases.OPS)[-1] == "balanced_assignment"
    for op in cases.OPS.values():
        assert op.real.dtype.itemsize == 2
        assert op.real.shape.F >= 10_000


@pytest.mark.parametrize("op", cases.OPS)
def test_the_smoke_is_right(op):
    assert cases.check(f"{op}/small", "cpu")["error"] < 1e-4


def test_a_wrong_value_fails_the_smoke(monkeypatch):
    right = dk.soft_top_k
    monkeypatch.setattr(dk, "soft_top_k", lambda *a, **k: right(*a, **k) * 1.01)
    with pytest.raises(AssertionError, match=r"error 0\.01 of tensor 1, allowed 0\.0001"):
        cases.check("soft_top_k/small", "cpu")


def test_every_headline_is_a_group_with_its_implementations():
    groups = headline.all_groups()
    for one in headline.HEADLINES.values():
        group = headline.group_of(one, groups)
        assert group.impls == one.impls
        assert set(one.impls) - ({headline.GRAPH} if one.graph else set()) <= set(groups[one.name].impls)
        assert one.target is None or {one.target.impl, one.target.peer or "ours"} <= set(one.impls)
        tokens = re.search(r"\bT ?(\d+)", one.name)
        if tokens and int(tokens[1]) <= 64:
            assert headline.GRAPH in one.impls  # side by side with ours


def test_every_file_of_tests_is_there():
    files = first.files_of(first.TESTS)
    assert len(files) == len(set(files))
    assert all((ROOT / file).exists() for file in files)
    assert set(first.STEPS) | set(second.STEPS) == set(first.TESTS)


# --- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        (first, ["--minutes", "0"], "argument --minutes: '0'; allowed: 0.5 to 60"),
        (first, ["--minutes", "nan"], "argument --minutes: 'nan'; allowed: 0.5 to 60"),
        (first, ["--cores", "0"], "argument --cores: '0'; allowed: 1 to 256"),
        (first, ["--cores", "two"], "argument --cores: 'two'; allowed: 1 to 256"),
        (first, ["--dry", "--out", __file__], "--out is"),
        (first, ["--dry", "--cache", f"{__file__}/cache"], "--cache is"),
        (first, ["--part", "experts"], "unrecognized arguments"),
        (second, ["--first", "/not/there.json"], "--first is /not/there.json, No such file or directory; allowed"),
        (second, ["--first", __file__], "is not such a JSON; allowed: the JSON of a first call"),
    ],
)
def test_wrong_arguments_end_with_one_line(command, arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert words in printed
    assert printed.count("\n") == 1


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for command in (first, second):
        with pytest.raises(SystemExit) as end:
            command.main([])
        assert end.value.code == 2
        printed = capsys.readouterr().err
        assert "no GPU" in printed
        assert printed.count("\n") == 1


# --- dry ---------------------------------------------------------------------------------------------------------------


def test_the_prediction_adds_up():
    shares = dict.fromkeys(("smoke", "compile", "tests", "benches"), 100.0)
    given = {"cores": 16, "start": 5.0, "walk": {"a": 30.0, "b": 2.0}, "compiled": 320.0, "shares": shares}
    tests = [f"test_{i}" for i in range(150)] + ["test_int64"]
    found = dry.predict(**given, smoke={"soft_top_k/small": 4.0, "balanced_assignment/real": 7.0}, tests=tests, benches=[])
    begin, one = 5 + dry.CONTEXT_SECONDS, dry.SMOKE_SECONDS
    lanes = [lane for lane in first.smoke_lanes(16)[0] if "soft_top_k/small" in lane.items]
    assert found["smoke"][0] == 2 * begin + 4 + len(lanes[0].items) * one + 7 + 2 * one
    assert found["compile"][0] == (5 + 30) + 5 + 320 / 16 + 1
    assert found["tests"][0] == begin + max(150 * dry.TEST_SECONDS / 15, dry.LARGE_SECONDS)
    assert found["benches"] == (0.0, 100.0)


def outside(*command, **more):
    """A process that compiles its kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


AGAIN = """
from triton import knobs
from bench.gpu import cases, fake

fake.use_driver()
knobs.compilation.listener = lambda *, src, cache_hit, **_: print(src.name, cache_hit)
with fake.device():
    call = cases.build("soft_top_k/small", "cuda")[0]
    cases.values(call, call.ours)
"""


def test_dry_of_one_group(tmp_path):
    """Through the JIT, its binaries through the compiler, its minutes; and the JIT then finds those binaries."""
    pytest.importorskip("triton")
    folders = ("--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--commit", "abc")
    printed = outside("-m", "bench.gpu", "first", "--dry", "--only", "soft_top_k/small", "--cores", "16", *folders)
    assert "PREDICTED for 16 cores" in printed
    data = json.loads((tmp_path / "out" / "first-dry-abc.json").read_text())
    walked = data["items"]["walk"]
    binaries = {name for one in walked.values() for name in one["binaries"]}
    assert set(walked) == {"soft_top_k/small", "route_soft_top_k/small"}
    assert binaries == set(data["items"]["compile"])
    assert all(one["status"] == "done" and one["cpu_seconds"] > 0 for one in data["items"]["compile"].values())
    assert 0 < data["predicted"]["total_seconds"] < 60 * 9
    found = outside("-c", AGAIN, TRITON_CACHE_DIR=str(tmp_path / "cache" / "triton")).split()
    assert found[1::2] == ["True"] * walked["soft_top_k/small"]["launches"]


def test_marked_tests_go_through_the_jit(tmp_path):
    pytest.importorskip("triton")
    file = "tests/test_soft_topk_triton.py"
    (tmp_path / "items").write_text(json.dumps([file]))
    (tmp_path / "binaries").mkdir()
    outside("-m", "bench.gpu.worker", "walk", str(tmp_path / "items"), str(tmp_path / "events"))
    begin, end = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert begin == {"begin": file}
    assert end["ended"] == len(end["tests"]) >= 4
    assert end["stopped"] == []
    assert end["launches"] > len(end["binaries"]) == len(list((tmp_path / "binaries").iterdir())) >= 4
