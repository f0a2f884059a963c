"""Deferred acceptance in NumPy, one layer: rounds of all free neurons at once.

A full expert's worst held pair is a threshold that only rises; a neuron below it need not propose. About E rounds and 1-4 F
proposals on balanced plans.
"""

from __future__ import annotations

import numpy as np


def deferred_acceptance(scores: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """expert_of [F] of scores [F, E], capacity [E] int64."""
    F, E = scores.shape
    lowest = np.array(-np.inf, dtype=scores.dtype)
    # a full expert's worst held pair; an expert without room refuses everybody
    worst = np.where(capacity > 0, lowest, np.array(np.inf, dtype=scores.dtype))
    worst_row = np.full(E, F, dtype=np.int64)
    count = np.zeros(E, dtype=np.int64)
    expert_of = np.full(F, -1, dtype=np.int64)
    free = np.arange(F)
    rows = scores  # the scores of the free neurons
    while free.size:
        open_to = rows > worst
        tie = rows == worst
        if tie.any():
            open_to |= tie & (free[:, None] < worst_row)
        choice = np.where(open_to, rows, lowest).argmax(1)  # the first of equals: row-major
        expert_of[free] = choice
        count += np.bincount(choice, minlength=E)
        refused = []
        for e in np.flatnonzero(count >= capacity):
            if capacity[e] == 0 or not (count[e] > capacity[e] or worst_row[e] == F):
                continue
            held = np.flatnonzero(expert_of == e)
            value = scores[held, e]
            if count[e] > capacity[e]:
                order = np.argsort(-value, kind="stable")  # equal scores: the lower row first
                refused.append(held[order[capacity[e] :]])
                last = order[capacity[e] - 1]
                count[e] = capacity[e]
            else:
                last = value.size - 1 - value[::-1].argmin()  # the last row of the lowest score
            worst[e], worst_row[e] = value[last], held[last]
        free = np.concatenate(refused) if refused else np.empty(0, dtype=np.int64)
        free.sort()
        rows = scores[free]
    return expert_of
