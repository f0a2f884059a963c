"""A child of ``first`` and ``second``: does the items of one kind one after the other, and says so in a file, a line an event.

    python -m bench.gpu.worker KIND ITEMS EVENTS

KIND is one of KINDS, ITEMS a JSON list. The binaries of "walk" and "compile" lie in the folder ``binaries`` beside ITEMS.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch

from bench.gpu.children import ANEW
from bench.machine import ROOT

_GROUP_SHARE = 0.6  # of an item's limit, after which a bench begins no new round
_PROFILED = 5  # calls
_TOP = 15  # kernels of a profile


class Report:
    def __init__(self, file: TextIO) -> None:
        self._file, self.current = file, ""
        self.compiled: list[str] = []  # kernels that were not in Triton's cache since the last event

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def begin(self, item: str) -> None:
        self.current = item
        self._write({"begin": item})

    def end(self, **found: Any) -> None:
        more = {"compiled": self.compiled} if self.compiled else {}
        self._write({"end": self.current, **more, **found})
        self.compiled = []

    def watch(self) -> None:
        """Notes what Triton compiles from now on."""
        from triton import knobs

        def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
            if not cache_hit:
                self.compiled.append(src.name)

        knobs.compilation.listener = listen


def first_line(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).strip().splitlines() or [''])[0][:300]}"


def unusable() -> bool:
    """Whether an error stays with this process, as an illegal address does."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def processor_seconds() -> float:
    """Of this process and of the ended ones it started, as the assembler is."""
    return sum(os.times()[:4])


def each(items: list[str], report: Report, work: Callable[[str], dict[str, Any]]) -> int:
    """Reports each item's seconds, by the clock and of processor; of the first also those that the process took to begin."""
    before = {"start_seconds": processor_seconds()}
    for item in items:
        report.begin(item)
        begun, processor = time.monotonic(), processor_seconds()
        try:
            found = work(item)
        except Exception as problem:
            found = {"status": "failed", "reason": first_line(problem)}
        taken = {"seconds": time.monotonic() - begun, "cpu_seconds": processor_seconds() - processor}
        report.end(**{**taken, **before, **found})
        before = {}
        if unusable():
            return ANEW
    return 0


def smoke(items: list[str], report: Report, folder: Path) -> int:
    from bench.gpu.cases import check

    return each(items, report, lambda item: check(item, "cuda" if torch.cuda.is_available() else "cpu"))


# --- what will be compiled ---------------------------------------------------------------------------------------------


class _Collected:
    """Says every gpu-marked test of the session."""

    def __init__(self) -> None:
        self.tests: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.tests = [item.nodeid for item in items if item.get_closest_marker("gpu")]


class _Outcomes(_Collected):
    """Counts what came of them."""

    def __init__(self) -> None:
        super().__init__()
        self.ended, self.stopped = 0, list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ended += report.when == "call" and report.passed
        if report.failed and report.when != "teardown":  # there tests look for what they left, and "cpu" is no other place here
            self.stopped.append(f"{report.nodeid}: {_reason(report)}")


def _reason(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr).strip().split("\n")[0][:300]


_PYTEST = ["-q", "--no-header", "-p", "no:cacheprovider", "-m", "gpu"]


def collect(items: list[str], report: Report, folder: Path) -> int:
    def work(item: str) -> dict[str, Any]:
        found = _Collected()
        code = int(pytest.main([*_PYTEST, "--collect-only", item], plugins=[found]))
        if code not in (0, 5):  # 5: none
            raise RuntimeError(f"pytest's status {code}")
        return {"tests": found.tests}

    return each(items, report, work)


def walk(items: list[str], report: Report, folder: Path) -> int:
    """A case of ``cases``, or a file of tests, up to the compiler. A test that looks at values may stop before its end."""
    from bench.gpu import cases, fake

    fake.use_driver()

    def work(item: str) -> dict[str, Any]:
        with fake.binaries(folder / "binaries") as found:
            if item.endswith(".py"):
                outcomes = _Outcomes()
                pytest.main([*_PYTEST, "--tb=line", item], plugins=[outcomes])
                more = {"tests": outcomes.tests, "ended": outcomes.ended, "stopped": outcomes.stopped}
            else:
                call = cases.build(item, "cuda")[0]
                cases.values(call, call.ours)
                more = {}
        return {"binaries": sorted(found.names), "launches": found.launches, **more}

    with fake.device():  # one for all: what is kept between calls must not come from another
        return each(items, report, work)


def compile_binaries(items: list[str], report: Report, folder: Path) -> int:
    from bench.gpu import fake

    fake.use_driver()
    return each(items, report, lambda item: fake.compile_binary(folder / "binaries" / item))


# --- tests -------------------------------------------------------------------------------------------------------------


class _Each:
    """An event a test, and an end of the session where its errors would stay."""

    def __init__(self, report: Report) -> None:
        self._report, self.anew = report, False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._report.begin(item.nodeid)
        self._begun, self._found = time.monotonic(), dict[str, Any]()
        result = yield
        self._report.end(seconds=time.monotonic() - self._begun, **self._found)
        if self._found.get("status") == "failed" and unusable():
            self.anew = True
            item.session.shouldstop = "the device's error stays with this process"
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._found = {"status": "failed", "reason": _reason(report)}
        elif report.skipped:
            self._found = {"status": "skipped", "reason": _reason(report)}


def tests(items: list[str], report: Report, folder: Path) -> int:
    watch = _Each(report)
    code = int(pytest.main([*_PYTEST, "--tb=short", *items], plugins=[watch]))
    return ANEW if watch.anew else 0 if code in (0, 1) else code


# --- benches -----------------------------------------------------------------------------------------------------------


def call_seconds(call: Callable[[], Any]) -> float:
    """Of one call among many, by the clock: the slower of host and device."""
    call()
    torch.cuda.synchronize()
    begun, count = time.perf_counter(), 0
    while count < 3 or (count < 200 and time.perf_counter() - begun < 0.1):
        call()
        count += 1
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / count


def bench(items: list[str], report: Report, folder: Path) -> int:
    """Items: "ceilings" first, then names of headlines. The seconds of a group stand behind its name: "NAME|SECONDS"."""
    from bench.gpu import headline, suite

    groups, meter, ceilings = headline.all_groups(), suite.Meter(), suite.measure_ceilings()

    def work(item: str) -> dict[str, Any]:
        if item == "ceilings":
            return {"ceilings": ceilings}
        name, limit = item.split("|")
        group = headline.group_of(headline.HEADLINES[name], groups)
        deadline, case = meter.clock() + _GROUP_SHARE * float(limit), group.prepare()
        series, skipped = suite.measure_group(replace(group, prepare=lambda: case), meter, deadline)
        for impl, one in series.items():
            one.extra["call_seconds"] = call_seconds(case.run[impl])
        entries = [suite.entry(group, impl, one, ceilings) for impl, one in series.items()]
        suite.free_memory()
        return {"benchmarks": entries, "skipped": skipped}

    return each(items, report, work)


def _row(event: Any) -> dict[str, Any]:
    return {
        "name": re.sub(r"\s+", " ", event.key)[:120],
        "calls": event.count / _PROFILED,
        "device_seconds": 1e-6 * event.self_device_time_total / _PROFILED,
        "host_seconds": 1e-6 * event.self_cpu_time_total / _PROFILED,
    }


def profile(items: list[str], report: Report, folder: Path) -> int:
    """Where the time of one call of ours goes, by kernel and by operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from bench.gpu import headline, suite

    groups, gpu = headline.all_groups(), torch.cuda.is_available()

    def work(item: str) -> dict[str, Any]:
        call = groups[item].prepare().run["ours"]
        call()
        with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
            for _ in range(_PROFILED):
                call()
            if gpu:
                torch.cuda.synchronize()
        rows = [_row(event) for event in found.key_averages()]
        suite.free_memory()
        return {
            "call_seconds": call_seconds(call) if gpu else None,
            "device": sorted((r for r in rows if r["device_seconds"]), key=lambda r: -r["device_seconds"])[:_TOP],
            "host": sorted(rows, key=lambda r: -r["host_seconds"])[:_TOP],
        }

    return each(items, report, work)


KINDS: dict[str, Callable[[list[str], Report, Path], int]] = {
    "smoke": smoke,
    "collect": collect,
    "walk": walk,
    "compile": compile_binaries,
    "tests": tests,
    "bench": bench,
    "profile": profile,
}


def main(arguments: list[str]) -> int:
    kind, items, events = arguments
    os.chdir(ROOT)  # what tests are named by
    with open(events, "a") as file:
        report = Report(file)
        report.watch()
        return KINDS[kind](json.loads(Path(items).read_text()), report, Path(items).parent)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
