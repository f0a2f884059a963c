"""What an entry of the registry of kernels says (``bench.kernels``), and what it is predicted to take."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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


def with_launch_forms(kernel: Kernel) -> Kernel:
    """Beside a kernel's variants what a launch makes of their first: products of float32 by TF32, which PyTorch may allow, and a
    single tile across the columns, which Triton's JIT turns into a constant unless the kernel forbids it."""

    def variants(backend: str) -> list[Variant]:
        found = kernel.variants(backend)
        more = []
        multiplies = [one for one in found if one.name.startswith("fp32") and "PRECISION" in one.constexprs]
        if backend == "cuda":
            more += [
                replace(one, name=f"{one.name} TF32", constexprs={**one.constexprs, "PRECISION": "tf32"}) for one in multiplies
            ]
        more = [one for one in more if one.name == more[0].name]  # for every target
        parameters = getattr(kernel.load(), "params", ())  # the interpreter, which compiles nothing, has none
        plain = {parameter.name for parameter in parameters if parameter.do_not_specialize}
        for one in found:
            if one.name == found[0].name and "columns" in one.signature and "columns" not in plain:
                signature = {n: type_ for n, type_ in one.signature.items() if n != "columns"}
                constexprs = {**one.constexprs, "columns": 1}
                more.append(replace(one, name=f"{one.name} one column", signature=signature, constexprs=constexprs))
        return found + more

    return replace(kernel, variants=variants)
