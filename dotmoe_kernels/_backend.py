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


def use_kernels(tensor: Tensor) -> bool:
    """Whether the experts' products on ``tensor`` run in Triton: not in float64, which the matrix units of few GPUs take."""
    return use_triton(tensor) and tensor.dtype != torch.float64


def product_options(x: Tensor) -> dict[str, object]:
    """How ``tl.dot`` multiplies tensors like ``x``: float32 as such unless PyTorch may use TF32."""
    # read so, since ``allow_tf32`` raises once somebody has set the precision by its new name
    tf32 = x.dtype == torch.float32 and x.device.type == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"UPCAST": x.device.type == "cpu" and x.dtype == torch.bfloat16, "PRECISION": "tf32" if tf32 else "ieee"}


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
