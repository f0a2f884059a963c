"""Generation by whole models: ours with 25 % of the FFN active, dense, and others' sparse ones. A prompt of 512 tokens, and decode.

The dense row says beside its ratio how much the sparse model could gain at most. A stock model's gates are not exactly 1, so that
it differs from ours by what its row says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from bench import generation, shapes
from bench.experts import DTYPES
from bench.generation import IMPLS
from bench.paired import Group, cases
from bench.shapes import Backbone


def _groups() -> list[Group]:
    def group(prefix: str, size: Backbone, dtype: str, phase: str, batch: int, rounds: int, budget: float) -> Group:
        name = f"{prefix}generate-{size.name}-{dtype}-{phase}-{batch}"
        info = generation.info(size, dtype, phase, batch)
        return Group(name, IMPLS, partial(generation.case, size, dtype, phase, batch), info, rounds, budget)

    phases = (("prefill", 1), ("decode", 1), ("decode", 8))
    groups = [group("quick-", shapes.TINY_MODEL, "float32", *phase, 3, 1.0) for phase in phases]
    for size in (shapes.SMOLLM2, shapes.H2048, shapes.L3_PAIR):
        groups += [group("", size, dtype, *phase, 9, 25.0) for dtype in DTYPES for phase in phases]
    return groups


@cases(_groups())
def test_generate(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
