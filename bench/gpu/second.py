"""The call after the first: alignment and training, and where the time goes in what missed its target most.

    python -m bench.gpu second --minutes 4 --out OUT --commit ID [--first FILE] [--only TEXT]

Compiles and runs the gpu-marked tests of alignment and training, times their headlines, then profiles with torch's profiler, the
worst first, what missed its target here or in the JSON of the first call.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu import first
from bench.gpu.budget import Budget, Share
from bench.gpu.children import Lane
from bench.gpu.session import Session, parser, runner, usable

STEPS = ("alignment", "training")
OPS = ("expert_ffn training", "masked_ffn", "sinkhorn")
SHARES = (Share("compile", 0.2), Share("tests", 0.2), Share("benches", 0.35), Share("profiles", 0.25))
PROFILE_LIMIT = 40.0
_MOST = 5  # profiles


def earlier(path: Path) -> list[dict[str, Any]]:
    """The benchmarks of a first call."""
    found = json.loads(path.read_text())
    if not isinstance(found, dict) or "benchmarks" not in found:
        raise ValueError("no benchmarks in it")
    return list(found["benchmarks"])


def profiles(session: Session, before: Sequence[dict[str, Any]], seconds: float) -> None:
    from bench.gpu.headline import missed

    worst = missed([*before, *session.data["benchmarks"]])[:_MOST]
    names = tuple(name for _, name in worst)
    session.lanes([Lane("profile", names, PROFILE_LIMIT)], seconds, 1)


def profile_text(data: dict[str, Any]) -> str:
    lines = []
    for name, found in data["items"].get("profile", {}).items():
        if found["status"] == "done":
            lines.append(f"\n{name}: kernels of a call, us")
            lines += [f"  {1e6 * row['device_seconds']:9.1f}  {row['calls']:5.1f} x  {row['name']}" for row in found["device"][:8]]
    return "\n".join(lines)


def run(session: Session, before: Sequence[dict[str, Any]], only: str = "") -> int:
    from bench.gpu.headline import SECOND

    files, cases = first.files_of(STEPS, only), first.cases_of(OPS, only)
    session.stage("compile", partial(first.find, session, files, cases), partial(first.compile_all, session))
    session.stage("tests", partial(first.run_tests, session))
    session.stage("benches", partial(first.run_benches, session, [one.name for one in SECOND if only in one.name]))
    session.stage("profiles", partial(profiles, session, before))
    session.finish()
    return 1 if first.failed(session.data) else 0


def main(arguments: list[str] | None = None) -> int:
    made = parser("second", "The call after the first: alignment, training, profiles of what missed its target.", 4.0)
    made.add_argument("--first", type=Path, help="the JSON of the first call (default: that of the same commit in --out)")
    chosen = made.parse_args(arguments)
    cores = chosen.cores or machine.cores()
    commit = chosen.commit or machine.commit()
    out = chosen.out or machine.RESULTS / machine.machine_name()
    before: list[dict[str, Any]] = []
    given = chosen.first or out / f"first-{commit}.json"
    if chosen.first or given.exists():
        try:
            before = earlier(given)
        except (OSError, ValueError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else "is not such a JSON"
            made.error(f"--first is {given}, {reason}; allowed: the JSON of a first call")
    if not torch.cuda.is_available():
        made.error("no GPU: torch.cuda.is_available() is False")
    for folder, argument in ((chosen.out, "--out"), (chosen.cache, "--cache")):
        if folder is not None:
            usable(folder, argument, made.error)
    cache = (chosen.cache or Path(tempfile.mkdtemp(prefix="dotmoe-gpu-"))).resolve()
    session = Session(out / f"second-{commit}.json", "second", commit, Budget(chosen.minutes, SHARES), runner(cache, cores), cores)
    return first.reported(session, partial(run, session, before, chosen.only), profile_text)


if __name__ == "__main__":
    sys.exit(main())
