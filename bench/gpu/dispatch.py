"""Dispatch's benches on a GPU, the cases of ``bench/bench_dispatch.py`` at real sizes, in bf16."""

from __future__ import annotations

import torch

from bench.bench_dispatch import groups_of
from bench.paired import Group

TOKENS = (1, 16, 512, 8192, 65536)


def dispatch_groups(tokens: tuple[int, ...] = TOKENS, H: int = 4096, device: str = "cuda") -> list[Group]:
    """The largest of the rows are 16 GB."""
    return groups_of(tokens, H, torch.bfloat16, device, most_bytes=4e10)
