"""Paired timing: the implementations of a group take turns, round by round, in one process.

A machine that slows down for a second then slows all of them, and what is compared is the ratio within a round. Every output is
compared with the reference once before anything is timed. pytest-benchmark times one test after the other, so the rounds are
recorded here and played back to it through a timer of our own (its documented ``timer`` option), which keeps its table and JSON.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import pytest

OURS = "ours"
_MIN_SECONDS = 4e-3  # a shorter call is repeated within its turn
_PAUSE = 5e-3  # lets the threads of the previous implementation go to sleep
_MIN_TURNS = 3


@dataclass
class Case:
    """What ``Group.prepare`` returns: the calls to time and how to judge their outputs."""

    run: dict[str, Callable[[], Any]]
    error: Callable[[str, Any], float]  # (impl, output) -> distance from the reference
    tolerance: float
    may_differ: frozenset[str] = frozenset()  # marked, not refused, when beyond the tolerance
    skipped: dict[str, str] = field(default_factory=dict)  # impl -> reason
    extra: dict[str, dict[str, Any]] = field(default_factory=dict)  # impl -> more extra_info
    elsewhere: frozenset[str] = frozenset()  # in processes of their own
    settling: int = 0  # calls of a turn that nobody times: see ``measure``
    kept: dict[str, Callable[[], int]] = field(default_factory=dict)  # impl -> weighs what it keeps for the backward pass, in bytes

    def remarks(self, name: str) -> dict[str, Any]:
        return {**self.extra.get(name, {}), **({"kept_bytes": self.kept[name]()} if name in self.kept else {})}


@dataclass(frozen=True)
class Group:
    """One question: its name, the implementations in it (ours first), and how to set it up."""

    name: str
    impls: tuple[str, ...]
    prepare: Callable[[], Case]
    info: dict[str, Any] = field(default_factory=dict)  # bytes, flops, shape, dtype
    rounds: int = 11
    budget: float = 12.0  # seconds that one implementation may take in all; a slow one skips rounds, down to three


@dataclass
class Series:
    """The times of one implementation."""

    seconds: list[float]  # a call, one entry a turn
    rounds: list[int]  # the round of each turn
    calls: int  # calls a turn
    error: float
    status: str  # "same" | "differs"
    ratios: list[float] = field(default_factory=list)  # to ours of the same round
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """A measured group."""

    group: Group
    series: dict[str, Series]
    skipped: dict[str, str]


def missing(package: str) -> str | None:
    """The reason to skip a peer whose package is not installed, or None."""
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _seconds(call: Callable[[], Any], calls: int, now: Callable[[], float]) -> float:
    """Seconds a call."""
    start = now()
    for _ in range(calls):
        call()
    return (now() - start) / calls


def _verdict(case: Case, name: str, output: Any) -> tuple[float, str]:
    error = float(case.error(name, output))
    if error <= case.tolerance:
        return error, "same"
    if name in case.may_differ:
        return error, "differs"
    raise AssertionError(
        f"{name}: error {error:.3g} against the reference, allowed {case.tolerance:.3g}: a wrong answer is not timed"
    )


def _turns(seconds: float, rounds: int, budget: float) -> set[int]:
    """The rounds, evenly spread, in which an implementation of that speed runs."""
    count = min(rounds, max(_MIN_TURNS, int(budget / max(seconds, 1e-9))))
    return {round(i * (rounds - 1) / max(count - 1, 1)) for i in range(count)}


def measure(group: Group, now: Callable[[], float] | None = None) -> Result:
    """Check every implementation, then time them in turns, in another random order every round: an implementation that always
    followed the same one would always find the caches and the allocator as that one left them. ``now`` is the clock, None: the
    wall's; another one sees this process alone.

    With ``settling`` calls a turn begins as it would in a process of one's own: oneDNN keeps 1,024 compiled products, and those of
    another implementation push one's own out."""
    case = group.prepare()
    hidden = frozenset[str]() if now is None else case.elsewhere
    skipped = {**case.skipped, **dict.fromkeys(hidden, "a process of its own, whose CPU time is not seen")}
    now = now or time.perf_counter
    names = [name for name in group.impls if name not in skipped]
    series: dict[str, Series] = {}
    turns: dict[str, set[int]] = {}
    for name in names:
        error, status = _verdict(case, name, case.run[name]())  # the first call: compilation, caches
        seconds = _seconds(case.run[name], 1, now)
        calls = 1 if seconds >= _MIN_SECONDS else math.ceil(_MIN_SECONDS / max(seconds, 1e-7))
        turns[name] = _turns(seconds * calls, group.rounds, group.budget)
        series[name] = Series([], [], calls, error, status, extra=case.remarks(name))
    turns[OURS] = set().union(*turns.values())  # ours runs in every round that anybody runs in
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(group.rounds):
            for name in random.Random(r).sample(names, len(names)):
                if r in turns[name]:
                    time.sleep(_PAUSE)
                    for _ in range(case.settling):
                        case.run[name]()
                    series[name].seconds.append(_seconds(case.run[name], series[name].calls, now))
                    series[name].rounds.append(r)
    finally:
        if collecting:
            gc.enable()
    base = dict(zip(series[OURS].rounds, series[OURS].seconds, strict=True))
    for one in series.values():
        one.ratios = [t / base[r] for r, t in zip(one.rounds, one.seconds, strict=True)]
    return Result(group, series, skipped)


# --- into pytest-benchmark ----------------------------------------------------------------------------------------------

_now = 0.0


def recorded_time() -> float:
    """The timer given to pytest-benchmark: it moves only when a recorded time is played back."""
    return _now


def extra_info(group: Group, series: Series) -> dict[str, Any]:
    """What a result says beside pytest-benchmark's own statistics."""
    low, _, high = quantiles(series.ratios, n=4, method="inclusive") if len(series.ratios) > 1 else [series.ratios[0]] * 3
    return {
        **group.info,
        "ratio": median(series.ratios),
        "ratio_quartiles": [low, high],
        "rounds": series.rounds,
        "calls": series.calls,
        "error": series.error,
        "status": series.status,
        **series.extra,
    }


def play(benchmark: Any, result: Result, impl: str) -> None:
    """Hand the recorded times of ``impl`` to the ``benchmark`` fixture; skips by name where there are none."""
    if impl in result.skipped:
        pytest.skip(f"{impl}: {result.skipped[impl]}")
    series = result.series[impl]
    times = iter(series.seconds)

    def step() -> None:
        global _now
        _now += next(times)

    benchmark.group = result.group.name
    benchmark.extra_info.update(impl=impl, **extra_info(result.group, series))
    benchmark.pedantic(step, rounds=len(series.seconds), iterations=1, warmup_rounds=0)


class Recorder:
    """Measures a group when its first implementation is asked for, and keeps it while the others follow."""

    def __init__(self, now: Callable[[], float] | None = None) -> None:
        self._now = now
        self._name: str | None = None
        self._kept: Result | Exception | None = None

    def result(self, group: Group) -> Result:
        if group.name != self._name:
            self._name, self._kept = group.name, None
            try:
                self._kept = measure(group, self._now)
            except Exception as problem:
                self._kept = problem
        if isinstance(self._kept, Exception):
            raise self._kept
        assert self._kept is not None
        return self._kept


def cases(groups: Iterable[Group]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a test ``(paired, group, impl)``: one case for every implementation of every group."""
    params = [pytest.param(group, impl, id=f"{group.name}-{impl}") for group in groups for impl in group.impls]

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        return pytest.mark.benchmark(timer=recorded_time)(pytest.mark.parametrize(("group", "impl"), params)(test))

    return decorate
