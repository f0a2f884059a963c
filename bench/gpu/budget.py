"""The minutes of a call as a budget: a stage has its share, stops itself, and what it leaves goes to those after it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple


class Share(NamedTuple):
    """Of the time, relative to the other stages'; ``most`` seconds, whatever is left."""

    stage: str
    weight: float
    most: float = float("inf")


class Budget:
    """Hands out seconds stage by stage, in the order of ``shares``; ``reserve`` seconds are kept for the table at the end."""

    def __init__(
        self, minutes: float, shares: tuple[Share, ...], *, reserve: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.shares, self._clock = shares, clock
        self.begun = clock()
        self._end = self.begun + max(60 * minutes - reserve, 0.0)

    def left(self) -> float:
        return max(self._end - self._clock(), 0.0)

    def passed(self) -> float:
        return self._clock() - self.begun

    def seconds(self, stage: str) -> float:
        """For a stage that begins now: its part of what is left for it and for all after it."""
        names = [share.stage for share in self.shares]
        rest = self.shares[names.index(stage) :]
        return min(self.left() * rest[0].weight / sum(share.weight for share in rest), rest[0].most)
