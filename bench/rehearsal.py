"""A driver for Triton that launches nothing: everything up to a launch happens as on a GPU, on any machine.

Arguments are bound and specialised, kernels compiled for the target, launchers made and called; what they are called with can be
kept. Values stay as they were allocated. In a process of its own, without TRITON_INTERPRET, and before the first kernel runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from dotmoe_kernels import _backend

PROCESSORS, ARCH = 132, 90


class Launched(NamedTuple):
    """One launch: the kernel, its grid and all its arguments, of tensors what they look like."""

    name: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


def _seen(argument: Any) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16


class _Utils:
    """Of an H100 or H200, as far as Triton asks."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": PROCESSORS, "warpSize": 32, "max_num_regs": 65536}


class Driver:
    """``launches``: where to note what is launched; None: nowhere, and a launch costs nothing. ``bound``: the kernels of launches
    whose arguments Triton's JIT looked at."""

    def __init__(self) -> None:
        self.utils = _Utils()
        self.launches: list[Launched] | None = None
        self.bound: list[str] = []
        self._watched: set[int] = set()

    def watch(self) -> None:
        """Of all kernels that are there by now."""
        from triton import JITFunction

        modules = [module for name, module in list(sys.modules.items()) if name.startswith("dotmoe_kernels")]
        for kernel in (value for module in modules for value in list(vars(module).values()) if isinstance(value, JITFunction)):
            if id(kernel) not in self._watched:
                self._watched.add(id(kernel))
                kernel.add_pre_run_hook(lambda *_, name=kernel.__name__, **__: self.bound.append(name))

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        name = src.fn.__name__

        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            if self.launches is not None:  # rest: two kinds of metadata, two hooks, the arguments
                self.launches.append(Launched(name, (x, y, z), tuple(map(_seen, rest[4:]))))

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCH, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_capability(self, *device: int) -> tuple[int, int]:
        return divmod(ARCH, 10)

    def set_current_device(self, device: int) -> None:
        pass

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return "int"


@contextmanager
def rehearsal() -> Iterator[Driver]:
    """Inside, this package's ops on CPU tensors do what they would do on a GPU, and launch nothing. Triton's driver stays what it
    has become.

    Raises:
        RuntimeError: kernels are interpreted here.
    """
    from triton import knobs
    from triton.runtime import driver

    if knobs.runtime.interpret:
        raise RuntimeError("a rehearsal needs a process without TRITON_INTERPRET: there kernels are not compiled")
    stand_in = Driver()
    driver.set_active(stand_in)
    with _backend.rehearsed():
        yield stand_in


def noted(driver: Driver, call: Callable[[], object]) -> tuple[list[Launched], list[str]]:
    """What a call launches, and for which of it the JIT looked at the arguments."""
    driver.watch()
    driver.bound.clear()
    launches: list[Launched] = []
    driver.launches = launches
    try:
        call()
    finally:
        driver.launches = None
    return launches, list(driver.bound)
