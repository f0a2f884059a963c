"""Which implementation runs: a GPU tensor -> Triton; a CPU tensor -> PyTorch, or interpreted Triton where a test asks for it.

Triton itself is imported by the modules that hold kernels, and those are imported when a kernel is first launched: the package
works, and imports as fast, on a machine without Triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None

_interpreting = False  # inside ``interpreted()``


def use_triton(tensor: Tensor) -> bool:
    """Whether an op on ``tensor`` runs its Triton kernels."""
    if tensor.device.type == "cuda":  # CUDA and ROCm alike
        return HAS_TRITON
    return _interpreting and tensor.device.type == "cpu"


@contextmanager
def interpreted(wanted: bool = True) -> Iterator[None]:
    """Inside, CPU tensors run the Triton kernels too, provided that Triton interprets them; with ``wanted`` False, PyTorch again.

    Triton decides where a kernel is decorated: TRITON_INTERPRET=1 must be set before the first kernel of this package runs."""
    global _interpreting
    before = _interpreting
    if not wanted:
        _interpreting = False
    elif HAS_TRITON:
        from triton import knobs

        _interpreting = bool(knobs.runtime.interpret)
    try:
        yield
    finally:
        _interpreting = before


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the device of ``tensor``, whichever device is current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
