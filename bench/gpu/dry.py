"""The first call without a GPU: its binaries found, some of them compiled, its minutes predicted.

Everything that the call would launch goes through the ops and Triton's JIT up to the compiler (``fake.py``). One binary of every
kernel is compiled here for sm_90, with its seconds of processor time, and stands for the kernel's others. What a GPU would add is
assumed: the constants below.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import machine
from bench.gpu import first
from bench.gpu.budget import Budget, Share
from bench.gpu.cases import SMOKE
from bench.gpu.children import Lane, spread
from bench.gpu.headline import FIRST
from bench.gpu.session import Session, runner

TEST_SECONDS, LARGE_SECONDS = 1.5, 12.0  # of a gpu-marked test beside its compilation, of one of several GB [estimates]
BENCH_SECONDS, INDUCTOR_SECONDS = 6.0, 5.0  # of a headline, of torch.compile for one [estimates]
SMOKE_SECONDS = 1.0  # of an op at a size [estimate]
CONTEXT_SECONDS = 4.0  # of a process to get at the GPU, with fifteen others doing the same [estimate]
_MINUTES, _PATIENCE = 600.0, 3600.0  # that the dry call itself may take, and seconds of an item: a machine may have other work


def binaries(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Name -> kernel."""
    return {name: json.loads((folder / name).read_text())["function"].split(":")[1] for name in names}


def compile_seconds(kernels: Counter[str], measured: dict[str, float]) -> float:
    """Processor seconds of all of them; a kernel that was not measured counts as the mean."""
    mean = sum(measured.values()) / len(measured) if measured else 0.0
    return sum(number * measured.get(kernel, mean) for kernel, number in kernels.items())


def predict(
    *,
    cores: int,
    start: float,
    smoke: dict[str, float],
    walk: dict[str, float],
    compiled: float,
    tests: Sequence[str],
    benches: Sequence[str],
    shares: dict[str, float],
) -> dict[str, tuple[float, float]]:
    """(predicted seconds, share) by stage. ``smoke``: the compile seconds of each item; ``walk``: the seconds of each."""
    begin = start + CONTEXT_SECONDS
    others, last = first.smoke_lanes(cores)
    busiest = [sum(smoke.get(item, 0.0) + SMOKE_SECONDS for item in lane.items) for lane in (*others, *last) if lane.items]
    stage = {"smoke": 2 * begin + max(busiest[: len(others)], default=0.0) + sum(busiest[len(others) :])}
    found = max([start + max(walk.values(), default=0.0), sum(start + seconds for seconds in walk.values()) / cores])
    stage["compile"] = found + start + compiled / cores + 1.0
    large = [test for test in tests if first._LARGE.search(test)]
    each = TEST_SECONDS * (len(tests) - len(large)) / max(cores - 1, 1)
    stage["tests"] = begin + max(each, LARGE_SECONDS * len(large)) if tests else 0.0
    inductor = sum("dense-merged" in one.impls for one in FIRST if one.name in benches)
    stage["benches"] = begin + BENCH_SECONDS * len(benches) + INDUCTOR_SECONDS * inductor if benches else 0.0
    return {name: (seconds, shares[name]) for name, seconds in stage.items()}


def _measured(session: Session, kernels: dict[str, str]) -> dict[str, float]:
    """Compiles one binary a kernel here."""
    one_each = {kernel: name for name, kernel in kernels.items()}
    lanes = [Lane("compile", lane, _PATIENCE, _PATIENCE) for lane in spread(list(one_each.values()), machine.cores(), 4)]
    session.lanes(lanes, session.budget.left(), machine.cores())
    done = session.section("compile")
    return {kernel: done[name]["cpu_seconds"] for kernel, name in one_each.items() if done[name]["status"] == "done"}


def dry(cache: Path, path: Path | None, *, cores: int, minutes: float, only: str) -> int:
    budget = Budget(_MINUTES, (Share("all", 1),))
    here = machine.cores()
    session = Session(path or cache / "dry.json", "first_dry", "", budget, runner(cache, here), here)
    files, cases = first.files_of(first.STEPS, only), first.cases_of(first.FIRST_OPS, only)
    smoke = [item for item in SMOKE if only in item]
    lanes = first.walk_lanes(files, [*cases, *smoke], 4 * here)
    session.lanes([replace(lane, limit=_PATIENCE, start=_PATIENCE) for lane in lanes], budget.left())
    walk = session.section("walk")
    kernels = binaries(cache / "binaries", first.found_binaries(session))
    measured = _measured(session, kernels)

    def seconds_of(names: Sequence[str]) -> float:
        return compile_seconds(Counter(kernels[name] for name in names), measured)

    beforehand = {name for item in (*files, *cases) for name in walk[item].get("binaries", [])}
    begun = [one["start_seconds"] for one in walk.values() if "start_seconds" in one]
    real = Budget(minutes, first.SHARES, clock=lambda: 0.0)
    tests, benches = first.found_tests(session), [one.name for one in FIRST if only in one.name]
    predicted = predict(
        cores=cores,
        start=max(begun, default=0.0),
        smoke={item: seconds_of(walk[item].get("binaries", [])) for item in smoke},
        walk={item: walk[item].get("cpu_seconds", 0.0) for item in (*files, *cases)},
        compiled=seconds_of(sorted(beforehand)),
        tests=tests,
        benches=benches,
        shares={share.stage: min(60 * minutes * share.weight, share.most) for share in first.SHARES},
    )
    total = sum(seconds for seconds, _ in predicted.values())
    session.data["predicted"] = {"cores": cores, "minutes": minutes, "seconds": predicted, "total_seconds": total}
    session.finish()
    counts = Counter(kernels.values())
    print(_text(session, counts, measured, len(beforehand), len(tests), predicted, real.left(), cores))
    broken = any(one["status"] != "done" for kind in ("walk", "compile") for one in session.section(kind).values())
    return 1 if broken or total > real.left() else 0


def _text(
    session: Session,
    counts: Counter[str],
    measured: dict[str, float],
    beforehand: int,
    tests: int,
    predicted: dict[str, tuple[float, float]],
    allowed: float,
    cores: int,
) -> str:
    from bench.kernels.compile_report import table

    walk: dict[str, dict[str, Any]] = session.section("walk")
    kernels = [[kernel, str(n), f"{measured.get(kernel, float('nan')):.2f}"] for kernel, n in sorted(counts.items())]
    launches = sum(one.get("launches", 0) for one in walk.values())
    stopped = [text for one in walk.values() for text in one.get("stopped", [])]
    wrong = [f"{name}: {one['status']} {one.get('reason', '')}" for name, one in walk.items() if one["status"] != "done"]
    stages = [[name, f"{seconds:.0f} s", f"{share:.0f} s"] for name, (seconds, share) in predicted.items()]
    total = sum(seconds for seconds, _ in predicted.values())
    return "\n".join(
        [
            table(["kernel", "binaries", "compile, s of processor"], kernels),
            f"binaries: {sum(counts.values())}, of them {beforehand} of tests and benches; {launches} launches; {tests} tests",
            f"tests that looked at a value and stopped there: {len(stopped)}",
            *wrong,
            "",
            f"PREDICTED for {cores} cores, not measured:",
            table(["stage", "predicted", "share"], stages),
            f"total {total / 60:.1f} of {allowed / 60:.1f} minutes" + ("" if total <= allowed else ": TOO LONG"),
        ]
    )
