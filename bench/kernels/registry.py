"""What an entry of the registry of kernels says (``bench.kernels``), and what it is predicted to take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dotmoe_kernels import _tiles
from dotmoe_kernels._tiles.hardware import GPU, H200, PROGRAM_BANDWIDTH, ROUND_TRIP, Span
from dotmoe_kernels._tiles.launches import Launch

BANDWIDTH, BF16, FP32 = _tiles.H200_BANDWIDTH, _tiles.H200_BF16, H200.fp32


@dataclass(frozen=True)
class Cost:
    """What one launch does at one shape. ``programs``: how many run at a time, where they do not fill the GPU;
    ``round_trips``: dependent accesses to global memory, one after the other, within a program."""

    bytes: float
    flops: float = 0.0
    rate: float = FP32
    programs: int | None = None
    round_trips: float = 0.0

    def seconds(self, gpu: GPU = H200) -> Span:
        """PREDICTED time, from a low to a high end; nobody measured it."""
        low, high = Launch(self.bytes, self.flops, product=self.rate == BF16).seconds(gpu)
        if self.programs:
            low = max(low, gpu.launch.low + self.bytes / (PROGRAM_BANDWIDTH.high * self.programs))
            high = max(high, gpu.launch.high + self.bytes / (PROGRAM_BANDWIDTH.low * self.programs))
        return Span(low + self.round_trips * ROUND_TRIP.low, high + self.round_trips * ROUND_TRIP.high)


@dataclass(frozen=True)
class Variant:
    """One form of a kernel: its tile, its dtype. ``targets``: those where it is launched so; none named: all."""

    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """One entry of the registry."""

    name: str
    function: str
    variants: Callable[[str], list[Variant]]
    costs: Mapping[str, Cost | Launch] = field(default_factory=dict)
    needs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def load(self) -> Any:
        """The JITFunction."""
        module, attribute = self.function.split(":")
        return getattr(importlib.import_module(module), attribute)
