"""The machine at hand: its processor, threads and versions, and what a pass takes of its memory. No host names."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def cpu_model() -> str:
    """The processor's name as its maker writes it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def matrix_instructions() -> list[str]:
    """Those for 16-bit products that /proc/cpuinfo names; without any a 16-bit product on a CPU is emulated."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [name for name in ("avx512_bf16", "amx_bf16", "bf16", "sme") if name in flags]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a time on ``device`` was measured on; threads as torch has them."""
    found: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "matrix_instructions": matrix_instructions(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}},
    }
    return {"gpu": torch.cuda.get_device_name(device), **found} if device.type == "cuda" else found


def process_memory(field: str) -> int:
    """Bytes that Linux tells of this process: VmRSS, what is resident; VmHWM, the most so far."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def forget_peak() -> bool:
    """Sets VmHWM back to VmRSS; False where the system has no such thing."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], int | None]]:
    """Inside, counts the bytes held beyond those at its beginning; called at the end, what it yields gives the most of them. None
    where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - held
        return
    with suppress(AttributeError, OSError, TypeError):  # of a C library without it
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes have freed would be taken again, and not be seen
    if not forget_peak():
        yield lambda: None
        return
    before = process_memory("VmRSS")
    yield lambda: max(process_memory("VmHWM") - before, 0)
