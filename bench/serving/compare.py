"""An engine's answers beside those of the exact model: greedy continuations, and the probabilities along them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TOP = 20  # log-probabilities that an engine tells of a position


class Exact:
    """The exact model's greedy continuations of prompts of one length, and the logits [P, new, V] along them."""

    def __init__(self, prompts: Sequence[Sequence[int]], logits: Tensor) -> None:
        self.prompts = [list(one) for one in prompts]
        self.start = len(self.prompts[0])
        self.logits = logits
        self.tokens: list[list[int]] = logits.argmax(-1).tolist()

    @property
    def sequences(self) -> list[list[int]]:
        return [a + b for a, b in zip(self.prompts, self.tokens, strict=True)]


def greedy(model: Any, prompts: Sequence[Sequence[int]], new: int) -> Tensor:
    """The logits [P, new, V] of each next token."""
    logits: list[Tensor] = []
    with torch.inference_mode():
        out = model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        while True:
            logits.append(out.logits[:, -1].float())
            if len(logits) == new:
                return torch.stack(logits, 1)
            out = model(logits[-1].argmax(-1, keepdim=True), past_key_values=out.past_key_values, use_cache=True)


def continuations(exact: Exact, found: Sequence[Sequence[int]], tie: float) -> dict[str, Any]:
    """How many continuations are the exact model's. One that leaves it where the two logits are within ``tie`` is a tie."""
    identical, ties, same, gaps = 0, 0, 0, []
    for p, (expected, given) in enumerate(zip(exact.tokens, found, strict=True)):
        first = next((i for i, (a, b) in enumerate(zip(expected, given, strict=False)) if a != b), None)
        if first is None:
            identical, same = identical + 1, same + len(expected)
            continue
        row = exact.logits[p, first]
        gaps.append(float(row[expected[first]] - row[given[first]]))
        ties, same = ties + (gaps[-1] <= tie), same + first
    return {
        "prompts": len(found),
        "identical": identical,
        "ties": ties,
        "different": len(found) - identical - ties,
        "gaps": [round(gap, 6) for gap in gaps],
        "tie": tie,
        "same_until": round(same / sum(map(len, exact.tokens)), 4),
    }


def divergence(logits: Tensor, found: dict[int, float]) -> float:
    """KL(exact, engine) of one position over the tokens that the engine tells of and all others together: a lower bound."""
    p = torch.softmax(logits.double(), -1)
    tokens = list(found)
    mine, its = p[tokens], torch.tensor(list(found.values()), dtype=torch.float64)
    rest, other = max(1 - float(mine.sum()), 0.0), max(1 - float(its.exp().sum()), 1e-12)
    kl = float((mine * (mine.clamp(min=1e-300).log() - its)).sum())
    return max(kl + (rest * math.log(rest / other) if rest > 0 else 0.0), 0.0)


def positions(exact: Exact, scores: Sequence[Sequence[dict[int, float]]]) -> dict[str, Any]:
    """Along the exact model's continuations: the share of tokens that are the engine's first choice too, and the KL."""
    kl, agree = [], []
    for p, row in enumerate(scores):
        for i, one in enumerate(row):
            kl.append(divergence(exact.logits[p, i], one))
            agree.append(max(one, key=lambda token: one[token]) == exact.tokens[p][i])
    values = torch.tensor(kl, dtype=torch.float64)
    return {
        "positions": len(kl),
        "agree": round(sum(agree) / len(agree), 4),
        "kl_mean": float(values.mean()),
        "kl_median": float(values.median()),
        "kl_largest": float(values.max()),
    }
