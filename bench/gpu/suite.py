"""One call on a GPU machine: the GPU tests of a part, then its benches with every peer, one JSON, a short table last.

    PYTHONPATH=. python3 -m bench.gpu --part transport [--out DIR] [--minutes 9] [--resume FILE] [--only TEXT] [--dry-run]

A part joins by one entry in PARTS: its test files, and a function that gives its benches as ``paired.Group``. Every
implementation is compared with a float64 reference before it is timed; a peer that fails, or that runs out of memory, is named
with its reason, and a wrong answer of ours fails its group. Implementations take turns round by round; a time is the median of
``triton.testing.do_bench`` (device time, cold L2) in that turn. The ceilings of the machine, a device copy and a bf16 matrix
product, are measured first: ``times_limit`` is a time over max(bytes / copy rate, flops / matrix rate) of the group.

The JSON has the layout of pytest-benchmark's (``bench.report`` renders it). It is written after the tests, after the ceilings and
after every group, so a run that is cut short loses one group; the same command, or ``--resume`` with its JSON, goes on from there.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import machine
from bench.gpu.alignment import alignment_groups
from bench.gpu.dispatch import dispatch_groups
from bench.gpu.experts import TELLING, TOKENS, expert_groups
from bench.gpu.routing import routing_groups
from bench.gpu.training import training_groups
from bench.gpu.transport import transport_groups
from bench.kernels.compile_report import table
from bench.paired import OURS, Case, Group, Series, extra_info
from bench.report import factor, seconds, size

_RESERVE = 30.0  # seconds that must be left to begin a group
_TEST_SHARE = 0.5  # of the time, at most, for the tests
_SLOW = 0.25  # seconds; a slower call is timed once a turn
_ROUNDS = 3


@dataclass(frozen=True)
class Part:
    """Test files (their gpu-marked cases run) and benches."""

    tests: tuple[str, ...]
    groups: Callable[[], list[Group]]


PARTS: dict[str, Part] = {
    "transport": Part(
        ("tests/test_transport.py", "tests/test_transport_triton.py", "tests/test_rounding.py", "tests/test_rounding_triton.py"),
        transport_groups,
    ),
    "experts": Part(
        (
            "tests/test_experts.py",
            "tests/test_experts_triton.py",
            "tests/test_decode_triton.py",
            "tests/test_decode_step.py",
            "tests/test_experts_training.py",
            "tests/test_backward_triton.py",
        ),
        lambda: expert_groups(tokens=(TELLING, ())) + training_groups() + expert_groups(tokens=((), TOKENS)),
    ),
    "alignment": Part(
        ("tests/test_masked.py", "tests/test_masked_triton.py", "tests/test_alignment_loss.py", "tests/test_alignment_step.py"),
        alignment_groups,
    ),
    "routing": Part(
        (
            "tests/test_routing.py",
            "tests/test_routing_triton.py",
            "tests/test_soft_topk.py",
            "tests/test_soft_topk_triton.py",
            "tests/test_dispatch.py",
            "tests/test_dispatch_triton.py",
        ),
        lambda: routing_groups() + dispatch_groups(),
    ),
}


# --- measuring ---------------------------------------------------------------------------------------------------------


def device_time(call: Callable[[], Any]) -> float:
    """Seconds of device time of one call, median; of the whole call, once, where it is slow (a loop on the host)."""
    from triton.testing import do_bench

    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    passed = time.perf_counter() - start
    return passed if passed > _SLOW else 1e-3 * float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def peak_bytes(call: Callable[[], Any]) -> int:
    """Device memory beyond what was allocated before the call, at its peak."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Meter:
    """How to measure; the tests put their own in."""

    timer: Callable[[Callable[[], Any]], float] = device_time
    peak: Callable[[Callable[[], Any]], int] = peak_bytes
    clock: Callable[[], float] = time.monotonic


def _copy(n: int, device: str) -> Callable[[], Any]:
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(n: int, device: str) -> Callable[[], Any]:
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b


def measure_ceilings(timer: Callable[[Callable[[], Any]], float] = device_time, device: str = "cuda") -> dict[str, float]:
    """Bytes per second of a device copy (read plus written), flops per second of a bf16 matrix product on random numbers."""
    n, m = (2**30, 8192) if device == "cuda" else (2**20, 64)
    copy = timer(_copy(n, device))
    product = timer(_product(m, device))
    free_memory()
    return {"copy_bytes_per_second": 8 * n / copy, "bf16_flops_per_second": 2 * m**3 / product}


def _check(case: Case, name: str, meter: Meter) -> Series | str:
    """A series without times yet, or the reason why there will be none."""
    try:
        error = float(case.error(name, case.run[name]()))
        same = error <= case.tolerance
        if not same and name not in case.may_differ:
            return f"wrong: error {error:.3g}, allowed {case.tolerance:.3g}"
        extra = {**case.remarks(name), "peak_bytes": meter.peak(case.run[name])}
        return Series([], [], 1, error, "same" if same else "differs", extra=extra)
    except torch.OutOfMemoryError:
        return "out of memory"
    except Exception as problem:
        return f"failed: {type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:200]}"
    finally:
        free_memory()


def measure_group(group: Group, meter: Meter, deadline: float) -> tuple[dict[str, Series], dict[str, str]]:
    """(times, reasons of those without). Raises if ours cannot be timed."""
    case = group.prepare()
    skipped = dict(case.skipped)
    series: dict[str, Series] = {}
    for name in group.impls:
        if name in skipped:
            continue
        found = _check(case, name, meter)
        if isinstance(found, Series):
            series[name] = found
        elif name == OURS:
            raise RuntimeError(found)
        else:
            skipped[name] = found
    names = list(series)
    for r in range(_ROUNDS):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            series[name].seconds.append(meter.timer(case.run[name]))
            series[name].rounds.append(r)
        if meter.clock() > deadline:
            break
    for one in series.values():
        one.ratios = [t / o for t, o in zip(one.seconds, series[OURS].seconds, strict=True)]
    return series, skipped


# --- the record --------------------------------------------------------------------------------------------------------


def limit_seconds(info: dict[str, Any], ceilings: dict[str, float]) -> float:
    copy, product = ceilings["copy_bytes_per_second"], ceilings["bf16_flops_per_second"]
    return max(info.get("bytes", 0) / copy, info.get("flops", 0) / info.get("flops_rate", product))


def entry(group: Group, name: str, series: Series, ceilings: dict[str, float]) -> dict[str, Any]:
    """One line of ``benchmarks``, as pytest-benchmark writes it."""
    times, limit = series.seconds, limit_seconds(group.info, ceilings)
    return {
        "group": group.name,
        "name": f"{group.name}-{name}",
        "params": {"group": group.name, "impl": name},
        "extra_info": {
            "impl": name,
            **extra_info(group, series),
            "limit_seconds": limit,
            "times_limit": median(times) / limit if limit else None,
        },
        "stats": {"median": median(times), "min": min(times), "max": max(times), "rounds": len(times), "data": times},
    }


class Record:
    """The JSON of a run, written to a temporary name and renamed."""

    def __init__(self, path: Path, part: str, earlier: Path | None, commit: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "part": part,
            "machine_info": machine.describe(),
            "commit_info": {"id": commit, "project": "dotmoe_kernels"},
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "version": "gpu_suite",
            "tests": None,
            "ceilings": None,
            "benchmarks": [],
            "skipped": {},
            "failed": {},
            "complete": False,
        }
        if earlier is not None and earlier.exists():
            found = json.loads(earlier.read_text())
            same = all(found[key] == self.data[key] for key in ("part", "commit_info")) and (
                found["machine_info"]["name"] == self.data["machine_info"]["name"]
            )
            if same:
                kept = ("tests", "ceilings", "benchmarks", "skipped", "datetime")
                self.data.update({key: found[key] for key in kept})  # failed groups are tried again
            else:
                print(f"{earlier} is of another part, commit or machine: begun anew")

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".part")
        with draft.open("w") as file:
            json.dump(self.data, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.path)

    def has(self, group: Group) -> bool:
        return any(one["group"] == group.name for one in self.data["benchmarks"])


def run_tests(files: tuple[str, ...], limit: float) -> dict[str, Any]:
    """pytest -m gpu on the files that exist, in a process of its own."""
    there = [name for name in files if (machine.ROOT / name).exists()]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--no-header", "--continue-on-collection-errors", *there]
    environment = {**os.environ, "PYTHONPATH": str(machine.ROOT)}
    start = time.monotonic()
    try:
        done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        code, output = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        held = late.stdout or b""  # bytes even where text was asked for
        code, output = 124, (held.decode(errors="replace") if isinstance(held, bytes) else held) + f"\nstopped after {limit:.0f} s"
    lines = [line for line in output.splitlines() if line.strip()]
    if code:
        print("\n".join(lines[-60:]))
    result = {"files": there, "returncode": code, "seconds": time.monotonic() - start, "summary": lines[-1] if lines else ""}
    return result | ({"failures": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50]} if code else {})


def summary(data: dict[str, Any]) -> str:
    """The table that is printed last."""
    rows = []
    for one in data["benchmarks"]:
        info, stats = one["extra_info"], one["stats"]
        limit = f"{info['times_limit']:.2f}" if info["times_limit"] else ""
        ratio = "1" if info["impl"] == OURS else factor(info["ratio"])
        status = f"keeps {size(info['kept_bytes'])}" if "kept_bytes" in info else ""
        status = status if info["status"] == "same" else f"differs {info['error']:.1g}"
        rows.append([one["group"], info["impl"], seconds(stats["median"]), ratio, limit, size(info.get("peak_bytes", 0)), status])
    for group, reasons in data["skipped"].items():
        rows += [[group, name, "-", "", "", "", reason[:60]] for name, reason in reasons.items()]
    rows += [[group, OURS, "FAILED", "", "", "", reason[:80]] for group, reason in data["failed"].items()]
    lines = [table(["group", "impl", "median", "vs ours", "x limit", "peak", "remark"], rows)]
    if data["ceilings"]:
        copy, product = data["ceilings"]["copy_bytes_per_second"], data["ceilings"]["bf16_flops_per_second"]
        lines.append(f"measured ceilings: copy {copy / 1e12:.2f} TB/s, bf16 {product / 1e12:.0f} TFLOP/s")
    if data["tests"]:
        lines.append(f"tests: {data['tests']['summary']}")
    if not data["complete"]:
        lines.append("NOT COMPLETE: run the same command again, or with --resume")
    return "\n".join(lines)


def run(
    part: Part,
    record: Record,
    *,
    minutes: float,
    only: str = "",
    meter: Meter | None = None,
    tests: Callable[[tuple[str, ...], float], dict[str, Any]] | None = run_tests,
    ceilings: Callable[[], dict[str, float]] = measure_ceilings,
) -> int:
    """Tests, ceilings, groups, within the time; 0 if all were done and nothing failed."""
    meter = meter or Meter()
    data, deadline = record.data, meter.clock() + 60 * minutes
    if tests is not None and data["tests"] is None:
        data["tests"] = tests(part.tests, _TEST_SHARE * 60 * minutes)
        record.write()
    if data["ceilings"] is None:
        data["ceilings"] = ceilings()
        record.write()
    chosen = [group for group in part.groups() if only in group.name]
    for group in chosen:
        if record.has(group):
            continue
        if deadline - meter.clock() < _RESERVE:
            break
        try:
            series, skipped = measure_group(group, meter, deadline)
        except Exception as problem:
            data["failed"][group.name] = str(problem)
        else:
            data["benchmarks"] += [entry(group, name, one, data["ceilings"]) for name, one in series.items()]
            if skipped:
                data["skipped"][group.name] = skipped
        free_memory()
        record.write()
    data["complete"] = all(record.has(group) or group.name in data["failed"] for group in chosen)
    record.write()
    failed = bool(data["failed"]) or bool(data["tests"] and data["tests"]["returncode"])
    return 1 if failed or not data["complete"] else 0


def dry_run(part: Part, only: str = "") -> str:
    lines = [f"tests  pytest -m gpu {name}{'' if (machine.ROOT / name).exists() else '  (not there)'}" for name in part.tests]
    lines.append("ceilings  device copy, bf16 matrix product")
    lines += [f"bench  {group.name}: {', '.join(group.impls)}" for group in part.groups() if only in group.name]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="GPU tests and benches of a part.")
    parser.add_argument("--part", required=True, choices=list(PARTS))
    parser.add_argument("--out", type=Path, help="folder for the JSON (default: bench/results/<machine>)")
    parser.add_argument("--minutes", type=float, default=9.0, help="ends within them (default: 9)")
    parser.add_argument("--only", default="", help="benches with this text in their name")
    parser.add_argument("--resume", type=Path, help="the JSON of a run that was cut short (default: the one in --out, if there)")
    parser.add_argument("--fresh", action="store_true", help="take nothing over from an earlier run")
    parser.add_argument("--no-tests", action="store_true", help="benches only")
    parser.add_argument("--commit", default="", help="its id, where the machine has no git")
    parser.add_argument("--dry-run", action="store_true", help="list what would run; needs no GPU")
    chosen = parser.parse_args(arguments)

    part = PARTS[chosen.part]
    if chosen.dry_run:
        print(dry_run(part, chosen.only))
        return 0
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; --dry-run lists what would run", file=sys.stderr)
        return 2
    commit = chosen.commit or machine.commit()
    path = (chosen.out or machine.RESULTS / machine.machine_name()) / f"gpu-{chosen.part}-{commit}.json"
    record = Record(path, chosen.part, None if chosen.fresh else chosen.resume or path, commit)
    tests = None if chosen.no_tests else partial(run_tests)
    code = run(part, record, minutes=chosen.minutes, only=chosen.only, tests=tests)
    print(f"\n{path}\n{summary(record.data)}")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
