"""An H200 that is not there: the ops run through their GPU side and Triton's real JIT up to the compiler; nothing is launched.

Tensors are torch's fake ones, "on cuda", without data. An operator of this library runs its own body on them instead of its fake,
so that every launch comes to the JIT with the arguments it would have on the device. ``binaries`` notes what the JIT would compile,
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
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dotmoe_kernels._files import write_file

_PROCESSORS, _SHARED, _ARCH = 132, 227 * 1024, 90  # of an H200
_ANSWERS: dict[Any, Callable[[Any], Any]] = {  # where a value is asked for, one that lets a comparison pass
    torch.ops.aten._local_scalar_dense.default: lambda t: 0.0 if t.is_floating_point() else t.dtype == torch.bool or 1,
    torch.ops.aten.item.default: lambda t: 0.0 if t.is_floating_point() else t.dtype == torch.bool or 1,
    torch.ops.aten.equal.default: lambda a, b=None: True,
}


class _Driver:
    """What Triton asks of a driver."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 0, 0, 1024),
        unload_module=lambda *_: None,
        get_device_properties=lambda _: {
            "max_shared_mem": _SHARED,
            "multiprocessor_count": _PROCESSORS,
            "warpSize": 32,
            "max_num_regs": 65536,
        },
    )

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *a, **k: None

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, _: int) -> None:
        pass

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", _ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_capability(self, *_: Any) -> tuple[int, int]:
        return divmod(_ARCH, 10)

    def map_python_to_cpp_type(self, _: str) -> str:
        return "int"


def use_driver() -> None:
    from triton.runtime import driver

    driver.set_active(_Driver())  # type: ignore[arg-type]


class _Tensors(FakeTensorMode):
    @property
    def avoid_device_init(self) -> bool:
        return True  # whatever torch.cuda.is_available says


class _Bodies(TorchDispatchMode):
    """Runs the bodies of this library's operators, and answers where a value is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dotmoe_kernels":
            with self:
                return OPDEFS[func._name]._init_fn(*args, **(kwargs or {}))
        if func in _ANSWERS and isinstance(args[0], FakeTensor):
            return _ANSWERS[func](*args)
        return func(*args, **(kwargs or {}))


_CUDA = {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "_exchange_device": lambda _: 0,
    "_maybe_exchange_device": lambda _: 0,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda *_: "no device",
    "get_device_capability": lambda *_: divmod(_ARCH, 10),
    "get_device_properties": lambda *_: SimpleNamespace(
        multi_processor_count=_PROCESSORS, L2_cache_size=60 << 20, total_memory=139 << 30, major=9, minor=0, warp_size=32
    ),
    "synchronize": lambda *_: None,
    "get_sync_debug_mode": lambda: 0,
    "set_sync_debug_mode": lambda _: None,
    "is_current_stream_capturing": lambda: False,
}
_MOCKED = ("CUDAGraph", "graph", "Stream", "stream", "current_stream", "Event")


@contextmanager
def device() -> Iterator[None]:
    """Inside, "cuda" is there and holds no data."""
    generator = torch.Generator

    def draws(_: Any = "cpu") -> torch.Generator:
        return generator()

    with ExitStack() as stack:
        for name, value in _CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, value, create=True))
        for name in _MOCKED:
            stack.enter_context(patch.object(torch.cuda, name, MagicMock()))
        stack.enter_context(patch.object(torch, "Generator", draws))
        stack.enter_context(patch.object(FakeTensor, "tolist", _list, create=True))
        stack.enter_context(_Tensors(allow_non_fake_inputs=True))
        stack.enter_context(_Bodies())
        yield


def _list(tensor: FakeTensor) -> Any:
    """Of zeros: offsets, most of the time, and then every expert is empty."""
    made: Any = 0
    for size in reversed(tensor.shape):
        made = [made] * size
    return made


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
