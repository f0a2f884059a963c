"""Which implementation runs: a GPU tensor -> Triton; a CPU tensor -> PyTorch, or interpreted Triton where a test asks for it. And
how a kernel is reached, which for a few tokens costs more than it runs: without torch's dispatcher where that has nothing to do
(``is_plain``), and without binding its arguments anew (``Launch``).

Triton itself is imported by the modules that hold kernels, and those are imported when a kernel is first launched: the package
works, and imports as fast, on a machine without Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._autograd import wants_gradient

HAS_TRITON = find_spec("triton") is not None
MOST_PLANS = 1024  # signatures whose launches an op keeps; the one that was not used for longest goes first

_interpreting = False  # inside ``interpreted()`` or ``rehearsed()``
_rehearsing = False  # inside ``rehearsed()``


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


@contextmanager
def rehearsed() -> Iterator[None]:
    """Inside, CPU tensors stand for a GPU's: they take the compiled kernels, and nobody looks at their values. For a driver of
    Triton's that launches nothing: what a call costs before a kernel runs is then measured, and what it launches counted, on any
    machine."""
    global _interpreting, _rehearsing
    before = _interpreting, _rehearsing
    _interpreting = _rehearsing = True
    try:
        yield
    finally:
        _interpreting, _rehearsing = before


def rehearsing() -> bool:
    return _rehearsing


def device_guard(tensor: Tensor) -> AbstractContextManager[object]:
    """Launches go to the device of ``tensor``, whichever device is current."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


# --- without the dispatcher ---------------------------------------------------------------------------------------------


def _plain_keys() -> int:
    """Those of torch's dispatch keys that mean nothing to an operator without a gradient, as bits: plain memory, autograd,
    autocast."""
    names = ("CPU", "CUDA", "BackendSelect", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


_PLAIN = _plain_keys() if hasattr(torch._C, "_dispatch_keys") else 0


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether torch's dispatcher adds nothing but a gradient to an operator on these, so that its launcher may be called instead:
    no graph is being made, no mode, transform or tracer is at work, and each is plain memory of a CPU or a GPU, of no subclass
    that wants a say, not negated on paper, not a wrapper of another tensor.

    The dispatcher costs tens of microseconds a call. It goes by the keys that are read here; where PyTorch does not show them,
    nothing is plain."""
    if torch.compiler.is_compiling() or torch.overrides.has_torch_function(tensors):
        return False
    try:
        keys = torch._C._dispatch_tls_local_include_set().raw_repr()
        for tensor in tensors:
            if tensor is not None:
                keys |= torch._C._dispatch_keys(tensor).raw_repr()
    except (AttributeError, TypeError):  # no tensor, or a PyTorch without these
        return False
    return not keys & ~_PLAIN


def is_direct(*tensors: Tensor | None) -> bool:
    """``is_plain``, and nobody differentiates."""
    return is_plain(*tensors) and not wants_gradient(*tensors)


def runs_as_written(x: Tensor) -> bool:
    """Whether PyTorch's operators on ``x`` run one after another on a CPU, now and with values that can be looked at, and nobody
    differentiates or casts: no kernel, no graph."""
    if type(x) is not Tensor or not x.is_cpu or _interpreting or torch.is_grad_enabled():
        return False
    return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


# --- launches -----------------------------------------------------------------------------------------------------------


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all of them begin at a multiple of 16 bytes, as fresh ones do: what Triton specialises a kernel on."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return not bits & 15


class Launch:
    """A kernel with its grid and all its arguments but the first ones, the tensors: ``launch(*tensors)``.

    Triton looks at every argument of every call, for a kernel compiled for the like. Where a caller's signature settles what it
    looks at (dtypes, which tensors are None, scalars, alignment: ``keep``), the kernel that the first call returns is kept and
    called as it is, which is how Triton's documentation launches one that was compiled beforehand. Interpreted kernels return
    none; on an AMD GPU Triton looks at the tensors' sizes too, and nothing is kept.

    Args:
        kernel: what ``triton.jit`` made.
        grid: 1 to 3 programs' counts.
        scalars: the arguments behind those of a call, up to the constants.
        constants: the last arguments, by name.
        options: of the compiler.
    """

    __slots__ = ("_grid", "_keep", "_kept", "_kernel", "_options", "_rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[object, ...],
        constants: dict[str, Any],
        options: dict[str, Any] | None = None,
        *,
        keep: bool,
    ) -> None:
        names = kernel.arg_names
        self._kernel, self._grid, self._options = kernel, grid, options or {}
        self._rest = (*scalars, *(constants[name] for name in names[len(names) - len(constants) :]))
        self._keep = keep and torch.version.hip is None
        self._kept: Callable[..., None] | None = None

    def __call__(self, *given: object) -> None:
        """``given``: the kernel's first arguments, tensors and scalars that it is not specialised on."""
        if self._kept is not None:
            self._kept(*given, *self._rest)
            return
        compiled = self._kernel[self._grid](*given, *self._rest, **self._options)
        if self._keep and hasattr(compiled, "__getitem__"):
            self._kept = compiled[(*self._grid, 1, 1)[:3]]
