"""The benches that answer first, and what each has to reach: ours eager and as a CUDA graph side by side for a few tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from bench import alignment, shapes
from bench.gpu.alignment import ffn_groups, step_groups
from bench.gpu.dispatch import dispatch_groups
from bench.gpu.experts import FEW, expert_groups, replayed
from bench.gpu.routing import routing_groups
from bench.gpu.training import training_groups
from bench.gpu.transport import transport_groups
from bench.paired import OURS, Case, Group

GRAPH = "ours-graph"


class Target(NamedTuple):
    """``impl`` of ours against ``value``: "times": a peer's time over its, at least; "limit": its time over the physical limit, at
    most; "seconds": its time, at most."""

    kind: str
    value: float
    peer: str = ""
    impl: str = OURS

    def __str__(self) -> str:
        if self.kind == "times":
            return f">= {self.value:.3g}x {self.peer}"
        return f"<= {self.value:.3g}x limit" if self.kind == "limit" else f"<= {1e3 * self.value:.3g} ms"

    def reached(self, entries: list[dict[str, Any]]) -> float | None:
        """The share of it that was reached, from 1 on all; None: somebody has no time."""
        found = {one["extra_info"]["impl"]: one for one in entries}
        if self.impl not in found or self.peer not in (*found, ""):
            return None
        median = found[self.impl]["stats"]["median"]
        if self.kind == "times":
            return float(found[self.peer]["stats"]["median"] / median / self.value)
        limit = found[self.impl]["extra_info"]["times_limit"] if self.kind == "limit" else median
        return float(self.value / limit) if limit else None


class Headline(NamedTuple):
    name: str  # of its group
    impls: tuple[str, ...]
    target: Target | None = None
    graph: bool = False  # ours as a graph is added to a group that has none
    seconds: float = 40.0  # after which it counts as hung


_FEW = (OURS, GRAPH, "dense-merged", "dense-merged-graph")
_MANY = (OURS, "dense-merged", "transformers-grouped_mm")


def _experts(shape: str, T: int, value: float) -> Headline:
    if T <= FEW:
        return Headline(f"experts {shape} T {T}", _FEW, Target("times", value, "dense-merged-graph", GRAPH))
    return Headline(f"experts {shape} T {T}", _MANY, Target("times", value, "dense-merged"))


_ALIGNMENT = (OURS, "eager", "frozen-dense")
FIRST: tuple[Headline, ...] = (
    _experts("L3", 1, 2.8),
    _experts("L3", 8192, 1.9),
    Headline("sinkhorn Q25 x 28", (OURS, "eager-loop"), Target("times", 8, "eager-loop")),
    _experts("L3", 4, 1.3),
    _experts("coarse", 8192, 3),
    Headline("block L3 T 1", (OURS, GRAPH, "dense-merged-graph")),
    Headline("route_top_k-T65536-E112-K28", (OURS, "torch"), Target("limit", 2)),
    Headline("dispatch-T65536-E112-K28", (OURS, "torch-sort-histc"), Target("times", 4, "torch-sort-histc")),
    _experts("mid", 8192, 3),
    Headline("rounding Q25 x 28", (OURS, GRAPH), Target("seconds", 0.01)),
    _experts("Q25", 1, 2.8),
    _experts("L3", 64, 0.97),
    _experts("L3", 256, 0.97),
    _experts("Q25", 8192, 1.9),
    Headline("warm start Q25 x 28", (OURS, "ours-cold-50"), Target("times", 6, "ours-cold-50")),
    Headline("route_top_k-T16-E112-K28", (OURS, GRAPH, "torch"), Target("times", 4, "torch", GRAPH), graph=True),
    Headline("dispatch-T16-E112-K28", (OURS, GRAPH, "torch-sort-histc"), Target("times", 4, "torch-sort-histc", GRAPH), graph=True),
    _experts("L3", 16, 0.97),
    Headline("block L3 T 8192", (OURS, "dense-merged")),
    Headline("sinkhorn backward Q25 x 28", ("ours", "ours-implicit", "ours-forward")),
)
SECOND: tuple[Headline, ...] = (
    Headline("training L3 T 8192", (OURS, "ours-recompute", "dense-merged"), Target("times", 1.8, "dense-merged")),
    Headline("alignment L3 T 8192", _ALIGNMENT, Target("times", 1.3, "eager")),
    Headline("alignment coarse T 8192", _ALIGNMENT, Target("times", 1.5, "eager")),
    Headline("training coarse T 8192", (OURS, "dense-merged"), Target("times", 1.8, "dense-merged")),
    Headline("sinkhorn gradient Q25 x 1", (OURS, "ours-implicit", "eager-loop"), Target("times", 10, "eager-loop")),
    Headline("alignment Q25 T 8192", _ALIGNMENT, Target("times", 1.3, "eager")),
    Headline("alignment step Q25", (OURS, "autograd"), seconds=90),
)
HEADLINES = {one.name: one for one in (*FIRST, *SECOND)}


def _with_graph(prepare: Callable[[], Case]) -> Case:
    case = prepare()
    if torch.cuda.is_available():
        case.run[GRAPH] = replayed(case.run[OURS])
    else:
        case.skipped[GRAPH] = "needs a GPU"
    return case


def all_groups(device: str = "cuda") -> dict[str, Group]:
    """Every group that a headline may name, with all of its implementations."""
    tokens = ((1, 4, 8192), (16, 64, 256))
    sizes = (shapes.L3, shapes.Q25, shapes.COARSE, shapes.MID)
    groups = [
        *expert_groups(device, sizes, tokens),
        *routing_groups((16, 65536), device),
        *dispatch_groups((16, 65536), device=device),
        *transport_groups(device),
        *training_groups(device),
        *ffn_groups(device),
        *step_groups(device, (alignment.Q25,)),
    ]
    return {group.name: group for group in groups}


def group_of(one: Headline, groups: dict[str, Group]) -> Group:
    """The group with the headline's implementations alone."""
    group = groups[one.name]
    if one.graph:
        group = replace(group, prepare=lambda prepare=group.prepare: _with_graph(prepare))  # type: ignore[misc]
    return replace(group, impls=one.impls)


def missed(benchmarks: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """(share reached, name) of the targets that were missed, the worst first."""
    shares = []
    for one in HEADLINES.values():
        share = one.target and one.target.reached([e for e in benchmarks if e["group"] == one.name])
        if share is not None and share < 1:
            shares.append((share, one.name))
    return sorted(shares)
