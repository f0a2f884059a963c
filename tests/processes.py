"""Several processes on this machine's CPU, connected by gloo, that make the same calls."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _enter(rank: int, count: int, meeting: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=count)
    torch.save(function(*arguments), f"{meeting}.{rank}")
    dist.destroy_process_group()


def run_ranks(count: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function``, of a module that can be imported, returns on each of ``count`` ranks."""
    meeting = folder / f"meeting-{secrets.token_hex(4)}"
    torch.multiprocessing.start_processes(_enter, (count, str(meeting), function, arguments), count, start_method="spawn")
    return [torch.load(f"{meeting}.{rank}", weights_only=False) for rank in range(count)]
