"""What ``first`` and ``second`` share: the children's surroundings, the JSON that is whole at every moment, the stages.

Everything that children compile goes into one folder, which they are told in their environment.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench import machine
from bench.gpu.budget import Budget
from bench.gpu.children import Lane, OnEnd, run_lanes, write_json

Runner = Callable[[Sequence[Lane], OnEnd, int, float], None]  # lanes, on_end, workers, seconds
_WRITTEN_EVERY = 1.0  # seconds


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0.5 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 0.5 to 60")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: 1 to 256")
    return int(text)


def parser(name: str, description: str, default_minutes: float) -> Parser:
    made = Parser(prog=f"python -m bench.gpu {name}", description=description)
    made.add_argument("--minutes", type=minutes, default=default_minutes, help="ends within them (default: %(default)s)")
    made.add_argument("--out", type=Path, help="folder for the JSON and the table (default: bench/results/<machine>)")
    made.add_argument(
        "--cache", type=Path, help="folder for what is compiled; one call can use another's (default: a temporary one)"
    )
    made.add_argument("--commit", default="", help="its id, where the machine has no git")
    made.add_argument("--cores", type=count, help="processes at a time; with --dry those to predict for")
    made.add_argument("--only", default="", help="tests, ops and benches with this text in their name")
    return made


def usable(folder: Path, argument: str, error: Callable[[str], NoReturn]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        error(f"{argument} is {folder}, {problem.strerror}; allowed: a folder that can be made and written")


def environment(cache: Path, threads: int) -> dict[str, str]:
    """Of a child: kernels compiled, not interpreted, into ``cache``."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {
        **own,
        "PYTHONPATH": str(machine.ROOT),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(threads),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }


def runner(cache: Path, cores: int) -> Runner:
    """Children of ``worker.py``; the folder ``cache`` is theirs."""

    def command(lane: Lane, items: Path, events: Path) -> list[str]:
        return [sys.executable, "-m", "bench.gpu.worker", lane.kind, str(items), str(events)]

    def run(lanes: Sequence[Lane], on_end: OnEnd, workers: int, seconds: float) -> None:
        around = environment(cache, max(cores // workers, 1))
        folder = Path(tempfile.mkdtemp(prefix="children-", dir=cache))  # the event files of one call of this
        (cache / "binaries").mkdir(exist_ok=True)
        (folder / "binaries").symlink_to(cache / "binaries", target_is_directory=True)
        run_lanes(lanes, on_end, command=command, folder=folder, environment=around, workers=workers, seconds=seconds)

    return run


class Session:
    """The record of a call and its budget. ``sections``: what children find, item by item, by kind."""

    def __init__(self, path: Path, name: str, commit: str, budget: Budget, run: Runner, cores: int) -> None:
        self.path, self.budget, self.run, self.cores = path, budget, run, cores
        self._written = 0.0
        self.data: dict[str, Any] = {
            "version": f"gpu_{name}",
            "machine_info": machine.describe(),
            "commit_info": {"id": commit, "project": "dotmoe_kernels"},
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "stages": {},
            "items": {},
            "ceilings": None,
            "benchmarks": [],
            "skipped": {},
            "complete": False,
        }

    def write(self) -> None:
        write_json(self.path, self.data)
        self._written = time.monotonic()

    def section(self, kind: str) -> dict[str, dict[str, Any]]:
        return self.data["items"].setdefault(kind, {})

    def note(self, kind: str, item: str, found: dict[str, Any]) -> None:
        """A child's event; benches go where ``bench.report`` looks for them."""
        self.data["benchmarks"] += found.pop("benchmarks", [])
        self.data["ceilings"] = found.pop("ceilings", self.data["ceilings"])
        if kind == "bench":
            item = item.split("|")[0]
        if skipped := found.pop("skipped", {}):
            self.data["skipped"][item] = skipped
        self.section(kind)[item] = found
        if kind == "bench" or time.monotonic() - self._written > _WRITTEN_EVERY:
            self.write()

    def stage(self, name: str, *steps: Callable[[float], None]) -> None:
        """Steps that get the seconds left of the stage's share; the record is written after each."""
        share = self.budget.seconds(name)
        begun = self.budget.passed()
        for step in steps:
            step(max(share - (self.budget.passed() - begun), 0.0))
            self.data["stages"][name] = {"share_seconds": share, "seconds": self.budget.passed() - begun}
            self.write()
        print(f"{name}: {self.budget.passed() - begun:.0f} s of {share:.0f} s", flush=True)

    def lanes(self, lanes: Sequence[Lane], seconds: float, workers: int | None = None) -> None:
        self.run(lanes, self.note, workers or self.cores, seconds)

    def finish(self) -> None:
        """Complete is what reached everything, whatever came of it."""
        found = [one for section in self.data["items"].values() for one in section.values()]
        self.data["complete"] = not any(one["status"].startswith("not reached") for one in found)
        self.write()
