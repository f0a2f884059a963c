"""Paired bootstrap over documents.

Every arm scored the same documents: a draw of documents, with replacement, is the same for all of them. What the documents have in
common, an easy one or a hard one, then leaves the ratio of two arms alone.

    perplexity = exp(sum of the documents' negative log-likelihoods / sum of their tokens)
    excess     = perplexity / dense perplexity - 1
    reduction  = 1 - excess / excess of the best other
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
_LOW, _HIGH = 2.5, 97.5  # percentiles of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A figure over all documents, and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


def draw_documents(count: int, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """[1 + draws, count]: how often each document is in a draw; the first row has each once."""
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=draws)
    return np.concatenate((np.ones((1, count)), drawn))


def perplexities(nll: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[B] of nll [D], sums over a document's tokens [D], under weights [B, D]."""
    return np.exp((weights @ nll) / (weights @ tokens))


def estimate(values: np.ndarray) -> Estimate:
    """Of values [1 + draws], the first of which is the figure itself."""
    low, high = np.percentile(values[1:], (_LOW, _HIGH))
    return Estimate(float(values[0]), float(low), float(high))


def mean_ratio(ours: Sequence[np.ndarray], base: np.ndarray) -> np.ndarray:
    """[B] mean over the seeds of ours [B] / base [B]."""
    return np.mean([one / base for one in ours], axis=0)


def reduction(ours: np.ndarray, others: Sequence[np.ndarray]) -> np.ndarray:
    """1 - ours [B] / the least of the others [B]; the best of them is found anew in every draw, so that the choice is in the
    interval."""
    return 1 - ours / np.min(np.stack(list(others)), axis=0)
