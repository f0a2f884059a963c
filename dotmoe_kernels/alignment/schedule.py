"""What every training stage shares: the order of the data and the learning rate, each a function of the step alone, so that a
resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shuffled_rows(data: Tensor, step: int, batch_size: int, seed: int) -> Tensor:
    """The [batch_size, ...] rows of a step (0-based) as int64: epochs of the data, each in an order of its own, which takes 8 bytes
    a row while the batch is made."""
    first = step * batch_size
    rows = []
    for epoch in range(first // len(data), (first + batch_size - 1) // len(data) + 1):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        start, stop = first - epoch * len(data), first + batch_size - epoch * len(data)
        rows.append(order[max(start, 0) : min(stop, len(data))])
    return data[torch.cat(rows).to(data.device)].long()


def learning_rate(step: int, steps: int, warmup: float) -> float:
    """Share of the peak at that step (0-based): linear over the share ``warmup`` of the steps, then a cosine to zero."""
    warm = warmup * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def ends(values: list[float]) -> list[float]:
    """[first, last]: means of the first and of the last tenth of a curve, at least one value each."""
    count = max(1, len(values) // 10)
    return [sum(part) / count for part in (values[:count], values[-count:])]
