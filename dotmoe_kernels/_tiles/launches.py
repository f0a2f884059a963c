"""PREDICTED seconds of a launch, from a low to a high end: arithmetic from counts and ``hardware.py``, nobody measured them.

A launch is ``programs`` of equal work, ``slots`` of them at a time on a multiprocessor. Each waits ``floor`` seconds beside its
share b of the arithmetic: for barriers, shuffles, and its first and last accesses to memory. At the low end the others hide that,
as far as there are others; at the high end a whole slot waits, and the last wave is a whole one:

    low   launch + max(programs / M max(b, (b + floor) / slots), bytes)
    high  launch + ceil(programs / (M slots)) (slots b + floor), with a share of the shorter of that and the bytes on top

M multiprocessors; bytes: the longer of the device's memory and L2.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from .hardware import ACCESS_CYCLES, BARRIER_CYCLES, GPU, H200, SHUFFLE_CYCLES, START_CYCLES, TRITON_SPAN, UNHIDDEN, Span


class Floor(NamedTuple):
    """What a program waits for one after the other, beside its arithmetic."""

    barriers: float = 0
    shuffles: float = 0
    accesses: float = 0  # dependent ones, to global memory

    def seconds(self, gpu: GPU) -> Span:
        def cycles(at: int) -> float:
            waits = self.barriers * BARRIER_CYCLES[at] + self.shuffles * SHUFFLE_CYCLES[at] + self.accesses * ACCESS_CYCLES[at]
            return START_CYCLES[at] + waits

        return Span(cycles(0) / gpu.clock.high, cycles(1) / gpu.clock.low)


class Launch(NamedTuple):
    """What one launch does. ``product``: its flops are a matrix product's in 16 bits."""

    bytes: float  # of the device's memory, read and written
    flops: float = 0.0
    programs: float = 0.0  # 0: as many as fill the GPU, and nothing but the bytes and flops counts
    slots: int = 1
    floor: Floor = Floor()
    l2: float = 0.0  # bytes that pass between L2 and the multiprocessors
    product: bool = True

    def seconds(self, gpu: GPU = H200) -> Span:
        rates = Span(TRITON_SPAN.low * gpu.bf16.low, TRITON_SPAN.high * gpu.bf16.high) if self.product else Span(gpu.fp32, gpu.fp32)
        low, high = self.flops / rates.high, self.flops / rates.low
        if self.programs:
            floor, M = self.floor.seconds(gpu), gpu.multiprocessors
            one = Span(low * M / self.programs, high * M / self.programs)  # a program alone on its multiprocessor
            low = max(self.programs / M * max(one.low, (one.low + floor.low) / self.slots), one.low + floor.low)
            waves = ceil(self.programs / (M * self.slots))
            sharing = min(self.slots, max(1.0, self.programs / M))
            high = waves * (sharing * one.high + floor.high)
        least = max(self.bytes / gpu.bandwidth.high, self.l2 / gpu.l2.high)
        most = max(self.bytes / gpu.bandwidth.low, self.l2 / gpu.l2.low)
        return Span(gpu.launch.low + max(low, least), gpu.launch.high + max(high, most) + UNHIDDEN * min(high, most))


def together(*parts: Span) -> Span:
    """One after the other."""
    return Span(sum(part.low for part in parts), sum(part.high for part in parts))


def times(count: float, part: Span) -> Span:
    return Span(count * part.low, count * part.high)
