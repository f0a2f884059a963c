"""Work in child processes: each has a limit, a dead or hung one is reported, and the others go on.

A child gets a list of items and says what it does in a file of its own, a line of JSON an event: {"begin": item}, then
{"end": item, ...} with what it found. Who begins and does not end within the limit is killed with all it started; who ends without
a word has died. The item at fault is named, and a new process goes on with those behind it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import IO, Any

from dotmoe_kernels._files import write_file

ANEW = 75  # exit status of a child that asks for a new process for its other items: after an error that stays with a process
_PAUSE = 0.1
_TAIL = 1500  # characters of a dead child's output


@dataclass(frozen=True)
class Lane:
    """Items that one process does one after the other: at most ``limit`` seconds each, and ``start`` before the first."""

    kind: str
    items: tuple[str, ...]
    limit: float
    start: float = 90.0


OnEnd = Callable[[str, str, dict[str, Any]], None]  # kind, item, what was found, its "status" among it
Command = Callable[[Lane, Path, Path], Sequence[str]]  # lane, file with the items, file for the events


class _Child:
    def __init__(self, lane: Lane, number: int, command: Command, folder: Path, environment: Mapping[str, str], now: float) -> None:
        self.lane, self.since = lane, now
        self.left, self.current = list(lane.items), ""
        items, self._events, self._log = (folder / f"{lane.kind}-{number}.{end}" for end in ("items", "events", "log"))
        items.write_text(json.dumps(lane.items))
        self._events.touch()
        self._reader: IO[str] = self._events.open()
        self._unread = ""
        with self._log.open("wb") as log:  # a group of its own, so that what it starts is ended with it
            self.process = subprocess.Popen(
                list(command(lane, items, self._events)), cwd=folder, env=dict(environment), stdout=log, stderr=log, process_group=0
            )

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that the kernel holds is left to it
            self.process.wait(10)

    def close(self) -> None:
        self.kill()
        self._reader.close()

    def tail(self) -> str:
        return self._log.read_bytes()[-_TAIL:].decode(errors="replace").strip()

    def read(self, on_end: OnEnd, now: float) -> None:
        """The events since the last call; half a line waits for its end."""
        self._unread += self._reader.read()
        *lines, self._unread = self._unread.split("\n")
        for line in lines:
            event = json.loads(line)
            self.since = now
            if "begin" in event:
                self.current = event["begin"]
                continue
            item = event.pop("end")
            self.current = ""
            if item in self.left:
                self.left.remove(item)
            on_end(self.lane.kind, item, {"status": "done", **event})

    def blame(self, on_end: OnEnd, status: str) -> None:
        """The item in work gets the status, or all of them if none was begun."""
        for item in [self.current] if self.current else list(self.left):
            if item in self.left:
                self.left.remove(item)
            on_end(self.lane.kind, item, {"status": status, "output": self.tail()})
        self.current = ""

    def look(self, on_end: OnEnd, now: float) -> bool:
        """Whether it is over."""
        code = self.process.poll()  # before reading: what it wrote until then is read below
        self.read(on_end, now)
        if code is not None:
            none = len(self.left) == len(self.lane.items)  # who asks for a new process before any item would ask again
            if self.left and (code != ANEW or none):
                self.blame(on_end, f"died: exit status {code}" if code >= 0 else f"died: signal {-code}")
            return True
        limit = self.lane.limit if self.current else self.lane.start
        if now - self.since > limit:
            self.kill()
            self.read(on_end, now)
            if self.current or self.left:
                self.blame(on_end, f"hung: ended after {limit:.0f} s")
            return True
        return False


def run_lanes(
    lanes: Sequence[Lane],
    on_end: OnEnd,
    *,
    command: Command,
    folder: Path,
    environment: Mapping[str, str],
    workers: int,
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Every item of every lane ends once, also with "died", "hung", or "not reached" when the seconds are over."""
    deadline, numbers = clock() + seconds, count()
    waiting, running = [lane for lane in lanes if lane.items], list[_Child]()
    try:
        while (waiting or running) and clock() < deadline:
            while waiting and len(running) < workers:
                running.append(_Child(waiting.pop(0), next(numbers), command, folder, environment, clock()))
            for child in list(running):
                if child.look(on_end, clock()):
                    running.remove(child)
                    child.close()
                    if child.left:
                        waiting.insert(0, replace(child.lane, items=tuple(child.left)))
            time.sleep(_PAUSE)
    finally:
        for child in running:
            child.kill()
    for child in running:
        child.read(on_end, clock())
        if child.current:
            child.blame(on_end, "not reached: the stage's time was over while it ran")
        child.close()
    for lane in [*(replace(child.lane, items=tuple(child.left)) for child in running), *waiting]:
        for item in lane.items:
            on_end(lane.kind, item, {"status": "not reached"})


def spread(items: Sequence[str], count: int, least: int = 1) -> list[tuple[str, ...]]:
    """Round robin: neighbours, which cost about the same, go to different processes. A process is worth its start from about
    ``least`` items on."""
    count = min(count, -(-len(items) // least))
    return [tuple(items[i::count]) for i in range(count)]


def write_json(path: Path, data: Any) -> None:
    """Whole at every moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, lambda file: file.write((json.dumps(data, indent=1) + "\n").encode()))
