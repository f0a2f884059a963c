"""Routing's benches on a GPU, the cases of ``bench/bench_routing.py``, float32, every size."""

from __future__ import annotations

from bench.bench_routing import groups_of
from bench.paired import Group

TOKENS = (1, 16, 512, 8192, 65536)


def routing_groups(tokens: tuple[int, ...] = TOKENS, device: str = "cuda") -> list[Group]:
    return groups_of(tokens, device, most=max(tokens), most_soft=max(tokens))
