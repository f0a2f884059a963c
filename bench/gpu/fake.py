"""An H200 that is not there: the ops run through their GPU side and Triton's real JIT up to the compiler; nothing is launched.

Tensors are on torch's "meta" device, without data, and say that they are on "cuda". (torch's FakeTensor says so too, but a build
without CUDA cannot differentiate it.) An operator of this library runs its own body on them, not its fake, so that every launch
comes to the JIT with the arguments it would have on the device. ``binaries`` notes what the JIT would compile,
``compile_binary`` compiles one of them, for sm_90, into Triton's cache, where the real driver finds it. Both are for processes of
their own: the driver, and what torch.cuda says of the device, are replaced in them.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.fx.experimental._config as meta_config
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

from bench.rehearsal import ARCH, PROCESSORS, Driver
from dotmoe_kernels._files import write_file

_CUDA_0 = torch.device("cuda", 0)


class _Driver(Driver):
    def get_active_torch_device(self) -> torch.device:
        return _CUDA_0


def use_driver() -> None:
    from triton.runtime import driver

    driver.set_active(_Driver())


def _list(tensor: Any) -> Any:
    """Of zeros: offsets, most of the time, and then every expert is empty."""
    made: Any = 0
    for size in reversed(tensor.shape):
        made = [made] * size
    return made


def _answer(tensor: Any) -> Any:
    """A value that lets a comparison pass: no error, true, one."""
    return 0.0 if tensor.dtype.is_floating_point else tensor.dtype == torch.bool or 1


_TENSOR = torch.Tensor
_ANSWERS: dict[Any, Callable[..., Any]] = {
    _TENSOR.device.__get__: lambda t: _CUDA_0,
    _TENSOR.is_cuda.__get__: lambda t: True,  # type: ignore[attr-defined]
    _TENSOR.get_device: lambda t: 0,
    _TENSOR.cuda: lambda t, *a, **k: t,
    _TENSOR.cpu: lambda t, *a, **k: t,
    _TENSOR.pin_memory: lambda t, *a, **k: t,
    _TENSOR.item: _answer,
    _TENSOR.__bool__: lambda t: bool(_answer(t)),
    _TENSOR.__int__: lambda t: int(_answer(t)),
    _TENSOR.__index__: lambda t: int(_answer(t)),
    _TENSOR.__float__: lambda t: float(_answer(t)),
    _TENSOR.tolist: _list,
    torch.bincount: lambda t, weights=None, minlength=0: t.new_zeros(max(minlength, 1)),
    torch.equal: lambda a, b: True,
    _TENSOR.equal: lambda a, b: True,
}


def _gradients(outputs: Any, inputs: Any, grad_outputs: Any = None, **options: Any) -> Any:
    """As torch.autograd.grad, from behind the point where that asks for overrides."""
    outputs, inputs, given = (one if isinstance(one, (tuple, list)) else (one,) for one in (outputs, inputs, grad_outputs))
    starts = tuple(torch.ones_like(out) if start is None else start for out, start in zip(outputs, given, strict=True))
    create, keep = bool(options.get("create_graph")), options.get("retain_graph")
    flags = create if keep is None else keep, create
    return _engine_run_backward(
        tuple(outputs), starts, *flags, tuple(inputs), bool(options.get("allow_unused")), accumulate_grad=False
    )


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu"))


class _Everywhere(TorchFunctionMode):
    """Every tensor is made on "meta" and says "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _ANSWERS:
            return _ANSWERS[func](*args, **kwargs)
        if func in (torch.autograd.grad, _TENSOR.backward):
            with self:  # what runs in the backward pass asks too
                return (_gradients if func is torch.autograd.grad else torch.autograd.backward)(*args, **kwargs)
        if func is torch.from_numpy:
            return func(*args).to("meta")
        if kwargs.get("device") is not None or func in _device_constructors():
            kwargs["device"] = "meta"
        if kwargs.get("generator") is not None:
            del kwargs["generator"]
        if func in (_TENSOR.to, torch.empty_strided):
            args = tuple("meta" if _is_device(one) else one for one in args)
        return func(*args, **kwargs)


class _Bodies(TorchDispatchMode):
    """Runs the bodies of this library's operators, and answers where a value is asked for."""

    def __init__(self, functions: _Everywhere) -> None:
        super().__init__()
        self._functions = functions

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dotmoe_kernels":
            with self._functions, self:  # both rest while one of them is asked
                return OPDEFS[func._name]._init_fn(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            return _answer(args[0])
        return func(*args, **(kwargs or {}))


_CUDA = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda _: 0,
    "_maybe_exchange_device": lambda _: 0,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "no device",
    "get_device_capability": lambda *_: divmod(ARCH, 10),
    "get_device_properties": lambda *_: SimpleNamespace(
        multi_processor_count=PROCESSORS, L2_cache_size=60 << 20, total_memory=139 << 30, major=9, minor=0, warp_size=32
    ),
    "synchronize": lambda *_: None,
    "reset_peak_memory_stats": lambda *_: None,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 0,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda _: None,
    "is_current_stream_capturing": lambda: False,
}
_MOCKED = ("CUDAGraph", "graph", "Stream", "stream", "current_stream", "Event")


class _Generator(torch.Generator):
    """For every device one of the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


@contextmanager
def device() -> Iterator[None]:
    """Inside, "cuda" is there and holds no data."""
    with ExitStack() as stack:
        for name, value in _CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, value, create=True))
        for name in _MOCKED:
            stack.enter_context(patch.object(torch.cuda, name, MagicMock()))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        if hasattr(meta_config, "meta_nonzero_assume_all_nonzero"):
            stack.enter_context(meta_config.patch(meta_nonzero_assume_all_nonzero=True))  # type: ignore[attr-defined]
        stack.enter_context(functions := _Everywhere())
        stack.enter_context(_Bodies(functions))
        yield


class Found:
    """What the JIT was asked for: the launches, and each binary once, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.launches, self._known = folder, 0, dict[str, str]()
        self.names = set[str]()

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Triton's hook before it compiles; True: it need not."""
        self.launches += 1
        key = f"{fn.module}:{fn.name}:{compile['key']}"
        if key not in self._known:
            data = compile["specialization_data"]
            digest = hashlib.sha256(f"{fn.module}:{fn.name}:{data}".encode()).hexdigest()[:24]
            self._known[key] = digest
            content = json.dumps({"function": f"{fn.module}:{fn.name}", "data": data}).encode()
            if not (self.folder / digest).exists():  # another process may have been here
                write_file(self.folder / digest, lambda file: file.write(content))
        self.names.add(self._known[key])
        return True


@contextmanager
def binaries(folder: Path) -> Iterator[Found]:
    """Inside, nothing is compiled; the binaries wanted are noted in ``folder``."""
    from triton import knobs

    found, before = Found(folder), knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = found
    try:
        yield found
    finally:
        knobs.runtime.jit_cache_hook = before


def compile_binary(path: Path) -> dict[str, Any]:
    """One that ``binaries`` noted, into Triton's cache."""
    wanted = json.loads(path.read_text())
    module, name = wanted["function"].split(":")
    getattr(importlib.import_module(module), name).preload(wanted["data"])
    return {"kernel": name}
