"""The first call on a GPU, in one command: does it run, is it right, how fast is it.

    python -m bench.gpu first --minutes 9 --out OUT --commit ID [--only TEXT] [--dry]

    smoke     every public op at one small and one real 16-bit shape against torch; the rounding last and alone
    compile   what tests and benches will launch is found without launching it (``fake.py``), then compiled by all cores
    tests     the gpu-marked tests of STEPS over the cores, each with a limit
    benches   the headlines, each with what it has to reach

Every stage runs in child processes and has its share of the minutes; a child that dies or hangs is named, and the rest goes on.
What was not reached is listed. The JSON in OUT is whole at every moment, so that a call that is ended leaves what it had; the table
comes last. ``--dry`` needs no GPU: it finds the binaries, compiles a few of them, and predicts the minutes.
"""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu.budget import Budget, Share
from bench.gpu.children import Lane, spread
from bench.gpu.session import Session, parser, runner, usable
from bench.paired import OURS
from dotmoe_kernels._files import write_file

STEPS = ("routing", "dispatch", "decode", "grouped", "transport", "rounding")
TESTS: dict[str, tuple[str, ...]] = {
    "routing": ("test_routing", "test_routing_triton", "test_soft_topk", "test_soft_topk_triton"),
    "dispatch": ("test_dispatch", "test_dispatch_triton"),
    "decode": ("test_decode_triton", "test_decode_step"),
    "grouped": ("test_experts", "test_experts_edges", "test_experts_triton"),
    "transport": ("test_transport", "test_transport_triton"),
    "rounding": ("test_rounding", "test_rounding_triton"),
    "alignment": ("test_masked", "test_masked_triton", "test_alignment_loss", "test_alignment_step"),
    "training": ("test_backward_triton",),
}
SHARES = (Share("smoke", 0.15, 90), Share("compile", 0.25), Share("tests", 0.3), Share("benches", 0.3))
TEST_LIMIT, SMOKE_LIMIT, ROUNDING_LIMIT = 75.0, 60.0, 20.0  # seconds an item
_ALONE = 40.0  # seconds of the smoke's share for the rounding's process
_LARGE = re.compile(r"int64|beyond|more_slots|31_bits")  # tests of several GB each: one after the other
_WALK = 0.6  # of the compile stage, at most, for finding the binaries


def files_of(steps: Sequence[str], only: str = "") -> list[str]:
    return [f"tests/{name}.py" for step in steps for name in TESTS[step] if only in f"{step} {name}"]


# --- the lanes of every stage ------------------------------------------------------------------------------------------


def smoke_lanes(cores: int, only: str = "") -> tuple[list[Lane], list[Lane]]:
    """(all other ops, the rounding): the one kernel with a loop that values end comes last, in a process that can be killed."""
    from bench.gpu.cases import ROUNDING, SMOKE

    items = [item for item in SMOKE if only in item]
    last = tuple(item for item in items if item.startswith(ROUNDING))
    others = [item for item in items if item not in last]
    return [Lane("smoke", lane, SMOKE_LIMIT) for lane in spread(others, cores)], [Lane("smoke", last, ROUNDING_LIMIT)] * bool(last)


def walk_lanes(files: Sequence[str], cases: Sequence[str], cores: int) -> list[Lane]:
    """The longest first."""
    return [
        *(Lane("walk", (file,), 240) for file in sorted(files, key=lambda name: "_triton" not in name)),
        *(Lane("walk", lane, 60) for lane in spread(cases, max(cores // 4, 1), 8)),
    ]


def test_lanes(tests: Sequence[str], cores: int) -> list[Lane]:
    large = tuple(test for test in tests if _LARGE.search(test))
    others = [test for test in tests if test not in large]
    return [
        *([Lane("tests", large, TEST_LIMIT)] if large else []),
        *(Lane("tests", lane, TEST_LIMIT) for lane in spread(others, max(cores - 1, 1))),
    ]


def cases_of(ops: Sequence[str], only: str = "") -> list[str]:
    """Those ops at the sizes of their benches."""
    from bench.gpu.cases import BENCHED

    return [item for item, (op, _) in BENCHED.items() if op in ops and only in item]


FIRST_OPS = ("expert_ffn", "route_top_k", "dispatch_tokens", "sinkhorn", "sinkhorn implicit", "balanced_assignment")


# --- the stages --------------------------------------------------------------------------------------------------------


def smoke(session: Session, only: str, seconds: float) -> None:
    others, last = smoke_lanes(session.cores, only)
    before = session.budget.passed()
    session.lanes(others, max(seconds - _ALONE, seconds / 2))
    session.lanes(last, max(seconds - (session.budget.passed() - before), 0.0))


def find(session: Session, files: Sequence[str], cases: Sequence[str], seconds: float) -> None:
    collection = Lane("collect", tuple(files), 120)
    session.lanes([collection, *walk_lanes(files, cases, session.cores)], _WALK * seconds)


def found_binaries(session: Session) -> list[str]:
    return sorted({name for one in session.section("walk").values() for name in one.get("binaries", [])})


def found_tests(session: Session) -> list[str]:
    """By the collection, and where that failed by the walk."""
    found = [test for kind in ("collect", "walk") for one in session.section(kind).values() for test in one.get("tests", [])]
    return list(dict.fromkeys(found))


def compile_all(session: Session, seconds: float) -> None:
    names = found_binaries(session)
    session.lanes([Lane("compile", lane, 90) for lane in spread(names, session.cores, 4)], seconds)


def run_tests(session: Session, seconds: float) -> None:
    begun = session.budget.passed()
    session.lanes(test_lanes(found_tests(session), session.cores), seconds)
    short = [name for name, one in session.section("tests").items() if "out of memory" in one.get("reason", "")]
    if short:  # of what others held at the time
        left = seconds - (session.budget.passed() - begun)
        session.lanes([Lane("tests", tuple(short), TEST_LIMIT)], left, 1)


def run_benches(session: Session, names: Sequence[str], seconds: float) -> None:
    """One process after the other, so that each has the device alone; those of one limit share one."""
    from bench.gpu.headline import HEADLINES

    limits: dict[float, list[str]] = {}
    for name in names:
        limits.setdefault(HEADLINES[name].seconds, []).append(name)
    lanes = [Lane("bench", ("ceilings", *(f"{name}|{limit:.0f}" for name in group)), limit) for limit, group in limits.items()]
    session.lanes(lanes, seconds, 1)


# --- the table ---------------------------------------------------------------------------------------------------------


def rows(data: dict[str, Any]) -> list[list[str]]:
    """A headline a row: ours eager and as a graph, the others, the target."""
    from bench.gpu.headline import GRAPH, HEADLINES
    from bench.report import factor, seconds

    made = []
    for one in HEADLINES.values():
        entries = {entry["extra_info"]["impl"]: entry for entry in data["benchmarks"] if entry["group"] == one.name}
        if OURS not in entries:
            continue
        times = {name: entry["stats"]["median"] for name, entry in entries.items()}
        info = entries[OURS]["extra_info"]
        best = min(times[name] for name in (OURS, GRAPH) if name in times)
        share = one.target.reached(list(entries.values())) if one.target else None
        target = str(one.target or "") + ("" if share is None else " met" if share >= 1 else f" {share:.0%}")
        made.append(
            [
                one.name,
                seconds(times[OURS]),
                seconds(times[GRAPH]) if GRAPH in times else "-",
                seconds(info["call_seconds"]) if "call_seconds" in info else "-",
                factor(info["times_limit"]) if info["times_limit"] else "",
                target,
                ", ".join(f"{name} {seconds(t)} {factor(t / best)}" for name, t in times.items() if name not in (OURS, GRAPH)),
            ]
        )
    return made


_HEADER = ["bench", "ours", "graph", "a call", "x limit", "target", "others, times the better of ours"]


def summary(data: dict[str, Any]) -> str:
    """Counts by stage, what went wrong, the benches."""
    from bench.kernels.compile_report import table

    lines = []
    for kind, section in data["items"].items():
        counts: dict[str, int] = {}
        for found in section.values():
            word = found["status"].split(":")[0]
            counts[word] = counts.get(word, 0) + 1
        lines.append(f"{kind}: " + ", ".join(f"{number} {word}" for word, number in sorted(counts.items())))
        for name, found in section.items():
            if found["status"] not in ("done", "skipped", "not reached"):
                lines.append(f"  {name}: {found['status']} {found.get('reason', '')}".rstrip()[:220])
    anew = sum(len(one.get("compiled", [])) for kind in ("tests", "bench") for one in data["items"].get(kind, {}).values())
    if anew:
        lines.append(f"{anew} binaries were compiled by tests and benches: the walk had not found them, or not in time")
    reached = [item for kind in ("smoke", "bench") for item in data["items"].get(kind, {}).items()]
    missing = [name for name, one in reached if one["status"].startswith("not reached")]
    if missing:
        lines.append(f"not reached: {', '.join(missing)}")
    if data["ceilings"]:
        copy, product = data["ceilings"]["copy_bytes_per_second"], data["ceilings"]["bf16_flops_per_second"]
        lines.append(f"measured ceilings: copy {copy / 1e12:.2f} TB/s, bf16 {product / 1e12:.0f} TFLOP/s")
    if data["benchmarks"]:
        lines += ["", table(_HEADER, rows(data))]
    if not data["complete"]:
        lines.append("NOT COMPLETE: not all was reached")
    return "\n".join(lines)


def failed(data: dict[str, Any]) -> bool:
    """The finding of binaries is a help, not a check."""
    checked = ("smoke", "compile", "tests", "bench", "profile")
    return any(one["status"] not in ("done", "skipped") for kind in checked for one in data["items"].get(kind, {}).values())


# --- the command -------------------------------------------------------------------------------------------------------


def run(session: Session, only: str = "") -> int:
    from bench.gpu.headline import FIRST

    files, cases = files_of(STEPS, only), cases_of(FIRST_OPS, only)
    session.stage("smoke", partial(smoke, session, only))
    session.stage("compile", partial(find, session, files, cases), partial(compile_all, session))
    session.stage("tests", partial(run_tests, session))
    session.stage("benches", partial(run_benches, session, [one.name for one in FIRST if only in one.name]))
    session.finish()
    return 1 if failed(session.data) else 0


def reported(session: Session, work: Callable[[], int], more: Callable[[dict[str, Any]], str] = lambda _: "") -> int:
    """Does the work; the table comes last, also of a call that is told to end."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        return work()
    finally:
        signal.signal(signal.SIGTERM, before)
        text = f"{more(session.data)}\n{summary(session.data)}\n".lstrip()
        session.write()
        write_file(session.path.with_suffix(".txt"), lambda file: file.write(text.encode()))
        print(f"\n{session.path}\n{text}", end="", flush=True)


def main(arguments: list[str] | None = None) -> int:
    made = parser("first", "The first call on a GPU: smoke, compile, tests, headline benches.", 9.0)
    made.add_argument("--dry", action="store_true", help="find the binaries and predict the minutes; needs no GPU")
    chosen = made.parse_args(arguments)
    cores = chosen.cores or machine.cores()
    if not chosen.dry and not torch.cuda.is_available():
        made.error("no GPU: torch.cuda.is_available() is False; --dry says what would run")
    commit = chosen.commit or machine.commit()
    for folder, argument in ((chosen.out, "--out"), (chosen.cache, "--cache")):
        if folder is not None:
            usable(folder, argument, made.error)
    cache = (chosen.cache or Path(tempfile.mkdtemp(prefix="dotmoe-gpu-"))).resolve()
    out = chosen.out or machine.RESULTS / machine.machine_name()
    if chosen.dry:
        from bench.gpu.dry import dry

        path = chosen.out and out / f"first-dry-{commit}.json"
        return dry(cache, path, cores=chosen.cores or 16, minutes=chosen.minutes, only=chosen.only)
    session = Session(out / f"first-{commit}.json", "first", commit, Budget(chosen.minutes, SHARES), runner(cache, cores), cores)
    return reported(session, partial(run, session, chosen.only))


if __name__ == "__main__":
    sys.exit(main())
