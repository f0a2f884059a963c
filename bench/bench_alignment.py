"""Alignment: one layer's masked FFN beside the frozen dense one, and a whole step, ours against the plain reproduction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from bench import alignment, masked, memory, shapes
from bench.alignment import Size, Step
from bench.paired import Case, Group, cases
from bench.shapes import Shape

SHAPES = {one.name: one for one in (shapes.TINY, shapes.CPU, alignment.SMALL.ffn)}


def memory_call(name: str) -> Callable[[], Any]:
    """For ``bench.memory``: "step IMPL SIZE" or "masked IMPL SHAPE DTYPE T"."""
    question, impl, size, *more = name.split()
    if question == "step":
        Step(impl, alignment.TINY)()
        return Step(impl, alignment.SIZES[size])
    dtype, T = more
    masked.calls(shapes.TINY, 64, dtype, "cpu")[impl]()
    return masked.calls(SHAPES[size], int(T), dtype, "cpu")[impl]


def _weighed(case: Case, name: str) -> Case:
    """With the peak of every implementation; ``name`` as ``memory_call`` wants it."""
    for impl in case.run:
        peak = memory.peak_extra_bytes("bench.bench_alignment", name.format(impl))
        case.extra[impl] = {**case.extra.get(impl, {}), "peak_bytes": peak}
    return case


def _masked(shape: Shape, T: int, dtype: str) -> Case:
    return _weighed(masked.case(shape, T, dtype, "cpu"), f"masked {{}} {shape.name} {dtype} {T}")


def _step(size: Size) -> Case:
    return _weighed(alignment.case(size), f"step {{}} {size.name}")


def _groups() -> list[Group]:
    def layer(prefix: str, shape: Shape, T: int, dtype: str, rounds: int, budget: float) -> Group:
        name = f"{prefix}alignment-ffn-{shape.name}-{dtype}-T{T}"
        return Group(name, masked.IMPLS, partial(_masked, shape, T, dtype), masked.info(shape, T, dtype), rounds, budget)

    def step(prefix: str, size: Size, rounds: int, budget: float) -> Group:
        name = f"{prefix}alignment-step-{size.name}"
        return Group(name, alignment.IMPLS, partial(_step, size), alignment.info(size), rounds, budget)

    small = alignment.SMALL.ffn
    return [
        layer("quick-", shapes.TINY, 64, "float32", 3, 1.0),
        step("quick-", alignment.TINY, 3, 1.0),
        *(layer("", small, 1024, dtype, 15, 8.0) for dtype in ("float32", "bfloat16")),
        *(layer("", shapes.CPU, T, "float32", 5, 10.0) for T in (512, 2048)),
        *(step("", size, 15, 30.0) for size in (alignment.SMALL, *alignment.FEWER)),
    ]


@cases(_groups())
def test_alignment(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
