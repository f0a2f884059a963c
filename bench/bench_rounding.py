"""Rounding: an F x E plan to exactly balanced experts. How fast is the greedy answer, and what does the optimum cost instead?"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dotmoe_kernels as dk
from bench import shapes
from bench.paired import Case, Group, cases, missing
from dotmoe_kernels import reference
from tests.shapes import clustered, normal

IMPLS = ("ours", "numpy-argsort-loop", "torch-sort-loop", "scipy-linear-sum-assignment")
_LARGEST_SQUARE = 2500  # neurons: linear_sum_assignment wants an F x F matrix and cubic time


def argsort_loop(scores: np.ndarray, capacity: int) -> np.ndarray:
    """The greedy as written in NumPy: sort all F E pairs, then visit them in a Python loop over plain integers."""
    F, E = scores.shape
    expert_of, room, left = [-1] * F, [capacity] * E, F
    for pair in np.argsort(-scores, axis=None, kind="stable").tolist():
        i, e = divmod(pair, E)
        if expert_of[i] < 0 and room[e]:
            expert_of[i] = e
            room[e] -= 1
            left -= 1
            if not left:
                break
    return np.array(expert_of)


def optimum(scores: np.ndarray, capacity: int) -> np.ndarray:
    """The best balanced assignment, each expert repeated ``capacity`` times."""
    solver = importlib.import_module("scipy.optimize").linear_sum_assignment
    rows, columns = solver(np.repeat(scores, capacity, axis=1), maximize=True)
    return columns[np.argsort(rows)] // capacity


@lru_cache(maxsize=2)
def log_plan(F: int, E: int, kind: str) -> Tensor:
    """log_u + log_v + A / tau after 50 steps at tau 0.1: of pure noise, and of a training that has nearly ended."""
    draw = clustered if kind == "clustered" else normal
    affinity = draw(F, E, seed=0, dtype=torch.float32)
    info = dk.sinkhorn(affinity, tau=0.1, num_iters=50, return_info=True)[1]
    return info.log_u[:, None] + info.log_v + affinity / 0.1


def _prepare(F: int, E: int, kind: str) -> Case:
    scores = log_plan(F, E, kind)
    matrix, capacity = scores.numpy(), F // E
    run: dict[str, Callable[[], Any]] = {
        "ours": lambda: dk.balanced_assignment(scores),
        "numpy-argsort-loop": lambda: argsort_loop(matrix, capacity),
        "torch-sort-loop": lambda: reference.greedy_assignment(scores, [capacity] * E),
        "scipy-linear-sum-assignment": lambda: optimum(matrix, capacity),
    }
    skipped = {}
    if F > _LARGEST_SQUARE:
        skipped["scipy-linear-sum-assignment"] = f"wants a {F} x {F} matrix and cubic time; see the small group"
    elif reason := missing("scipy"):
        skipped["scipy-linear-sum-assignment"] = reason
    greedy = argsort_loop(matrix, capacity)

    def error(_: str, expert_of: Any) -> float:
        return float((np.asarray(expert_of) != greedy).mean())  # share of neurons placed elsewhere; 0 is the same answer

    extra = {"scipy-linear-sum-assignment": {"note": "the optimum: another answer than the greedy one of the paper"}}
    return Case(run, error, 0.0, frozenset({"scipy-linear-sum-assignment"}), skipped, extra)


def _groups() -> list[Group]:
    groups = []
    for name, F, E, kind, rounds in (
        ("quick-rounding-noise", 1184, 8, "noise", 5),
        ("rounding-noise", shapes.Q25.F, shapes.Q25.E, "noise", 11),
        ("rounding-clustered", shapes.Q25.F, shapes.Q25.E, "clustered", 11),
        ("rounding-small", 2368, shapes.Q25.E, "noise", 11),
    ):
        info = {"shape": f"F {F}, E {E}, {kind}", "dtype": "float32", "bytes": 4 * F * E, "flops": 0}
        groups.append(Group(name, IMPLS, partial(_prepare, F, E, kind), info, rounds, 20.0))
    return groups


@cases(_groups())
def test_rounding(paired: Callable[[Group, str], None], group: Group, impl: str) -> None:
    paired(group, impl)
