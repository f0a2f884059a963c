"""Triton's interpreter, watched: a launch's programs run in an order of our own, and every address that they touch is checked.

A GPU runs the programs of a launch in any order and at the same time; the interpreter runs them one after another, first to last,
so that a kernel which needs that order passes all its tests here. Inside ``watched(order)`` a launch fails where

- an access lies outside the tensor whose pointer it was made from, by a single element and in the gaps of a strided tensor too;
- one program reads or writes what another one of the same launch writes, or writes or reads what another adds to atomically;
- one store writes different values to the same address, or values of another size than its pointer's;
- the grid is larger than a GPU takes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton.runtime import interpreter

ORDERS = ("forward", "reversed", "random")
_LARGEST_GRID = (2**31 - 1, 65535, 65535)
_TAG = np.uint64(48)  # the bits of a pointer above these, which no address uses, say which argument it was made from
_ADDRESS = np.uint64(2**48 - 1)
_SEVERAL = -1  # programs


class Fault(AssertionError):
    """What a kernel must not do."""


class _Memory:
    """Which program touched a storage's elements last: 0 none, else its number from 1. Zeros cost nothing until touched."""

    def __init__(self, size: int) -> None:
        self.written, self.added_to, self.read = (np.zeros(size, np.int32) for _ in range(3))

    def note(self, kind: str, places: np.ndarray, program: int) -> tuple[str, int, int] | None:
        """What another program did to one of the places before, which of them, and where."""
        others = {"load": ("written", "added_to"), "store": ("written", "added_to", "read"), "atomic": ("written", "read")}[kind]
        for name in others:
            there = getattr(self, name)[places]
            wrong = (there != 0) & (there != program)
            if wrong.any():
                first = int(wrong.argmax())
                return name.replace("_", " "), int(there[first]), int(places[first])
        if kind == "store":
            self.written[places] = program
        else:
            last = self.read if kind == "load" else self.added_to
            there = last[places]
            last[places] = np.where((there == 0) | (there == program), program, _SEVERAL)
        return None


class _Argument:
    """A tensor of a launch: which addresses are its elements."""

    def __init__(self, tensor: torch.Tensor, tag: int, memory: _Memory) -> None:
        self.tensor, self.memory, self.itemsize = tensor, memory, tensor.element_size()
        self.pointer = tensor.data_ptr() | tag << int(_TAG)
        self.before = tensor.storage_offset()  # of the storage's elements
        steps = sorted(((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1 and step))
        self.steps = steps[::-1]
        self.span = 1 + sum((size - 1) * step for step, size in steps) if tensor.numel() else 0
        self.dense = self.span == int(np.prod([size for _, size in steps], dtype=np.int64))

    def places(self, pointers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The elements of the storage that pointers name, and which pointers are wrong."""
        distance = pointers - np.uint64(self.pointer)  # below the tensor it wraps around to a huge one
        if self.itemsize > 1:
            distance = distance // np.uint64(self.itemsize)
        wrong = distance >= np.uint64(self.span)
        if not self.dense:
            rest = np.where(wrong, 0, distance).astype(np.int64)
            for step, size in self.steps:
                rest = rest - np.minimum(rest // step, size - 1) * step
            wrong = wrong | (rest != 0)
        return distance.astype(np.int64) + self.before, wrong


class _Launch:
    """One launch of a kernel: its tensors, its programs' order, and the program that runs."""

    def __init__(self, kernel: str, order: str, seed: int) -> None:
        self.kernel, self.order, self.random = kernel, order, random.Random(f"{seed} {kernel}")
        self.arguments: list[_Argument] = []
        self.named: dict[str, Any] = {}
        self.memory: dict[int, tuple[int, _Memory]] = {}  # by storage
        self.grid, self.program = (1, 1, 1), 0

    def place(self, program: int) -> tuple[int, int, int]:
        x, y, z = np.unravel_index(program - 1, self.grid)
        return int(x), int(y), int(z)

    def fault(self, what: str) -> None:
        who = f"program {self.place(self.program)} of {self.grid}, {self.order} order" if self.program else f"grid {self.grid}"
        raise Fault(f"{self.kernel}, {who}: {what}")

    def name(self, argument: _Argument) -> str:
        def same(other: Any) -> bool:
            return isinstance(other, torch.Tensor) and (other.data_ptr(), other.shape) == (tensor.data_ptr(), tensor.shape)

        tensor = argument.tensor
        return f"{next((name for name, one in self.named.items() if same(one)), 'a tensor')} {list(tensor.shape)}"

    def enter(self, tensor: torch.Tensor) -> int:
        """The pointer that the kernel gets."""
        storage, itemsize = tensor.untyped_storage(), tensor.element_size()
        key = storage.data_ptr() or -len(self.arguments)  # an empty one has no address
        size, memory = self.memory.setdefault(key, (itemsize, _Memory(storage.nbytes() // itemsize)))
        assert size == itemsize, f"{self.kernel}: one storage as elements of two sizes is not watched"
        self.arguments.append(_Argument(tensor, len(self.arguments) + 1, memory))
        return self.arguments[-1].pointer

    def begin(self, grid: tuple[int, int, int]) -> None:
        self.grid, self.program = grid, 0
        if any(given > most for given, most in zip(grid, _LARGEST_GRID, strict=True)):
            self.fault(f"a GPU takes a grid of at most {_LARGEST_GRID}")
        self.programs = list(range(1, 1 + grid[0] * grid[1] * grid[2])) if self.order != "forward" else []
        if self.order == "reversed":
            self.programs.reverse()
        elif self.order == "random":
            self.random.shuffle(self.programs)

    def turn(self, x: int, y: int, z: int) -> tuple[int, int, int]:
        """The program that runs when the interpreter comes to (x, y, z)."""
        place = (x * self.grid[1] + y) * self.grid[2] + z
        self.program = self.programs[place] if self.programs else place + 1
        return self.place(self.program)

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        addresses, active = pointers.data, mask.data
        if not active.all():
            addresses = addresses[active] if addresses.shape == active.shape else np.broadcast_to(addresses, active.shape)[active]
        addresses = addresses.reshape(-1)
        if not addresses.size:
            return
        tag = int(addresses[0] >> _TAG)
        if not 0 < tag <= len(self.arguments):
            self.fault(f"a {kind} through a pointer that no tensor gave")
        argument = self.arguments[tag - 1]
        places, wrong = argument.places(addresses)
        if wrong.any():
            self.fault(f"a {kind} of {int(wrong.sum())} elements outside {self.name(argument)}")
        found = argument.memory.note(kind, places, self.program)
        if found:
            done, program, place = found
            who = "several programs" if program == _SEVERAL else f"program {self.place(program)}"
            self.fault(f"a {kind} of element {place - argument.before} of {self.name(argument)}, {done} by {who}")


class _Builder(interpreter.InterpreterBuilder):
    """What the interpreter asks of memory, by way of the launch that runs. Not made: the interpreter's own becomes one."""

    launch: _Launch

    def set_grid_dim(self, *grid):
        self.launch.begin(grid)
        super().set_grid_dim(*grid)

    def set_grid_idx(self, *program):
        super().set_grid_idx(*self.launch.turn(*program))

    def create_masked_load(self, ptrs, mask, *rest):
        self.launch.touch("load", ptrs, mask)
        return super().create_masked_load(_untagged(ptrs), mask, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        self.launch.touch("store", ptrs, mask)
        there, itemsize = _untagged(ptrs), interpreter._get_np_dtype(ptrs.get_element_ty()).itemsize
        if value.data.itemsize != itemsize:
            self.launch.fault(f"a store of {value.data.itemsize} bytes an element where its pointer has {itemsize}")
        stored = super().create_masked_store(there, value, mask, *rest)
        if mask.data.size > 1:
            dtype = value.data.dtype
            now = interpreter._interpreter.load(there.data, mask.data, np.zeros(there.data.shape, dtype), dtype)
            if not np.array_equal(_bits(now)[mask.data], _bits(np.broadcast_to(value.data, now.shape))[mask.data]):
                self.launch.fault("a store of different values to one address")
        return stored

    def create_atomic_rmw(self, op, ptr, val, mask, *rest):
        self.launch.touch("atomic", ptr, mask)
        return super().create_atomic_rmw(op, _untagged(ptr), val, mask, *rest)

    def create_atomic_cas(self, ptr, *rest):
        self.launch.touch("atomic", ptr, interpreter.TensorHandle(np.ones(ptr.data.shape, bool), ptr.dtype))
        return super().create_atomic_cas(_untagged(ptr), *rest)


def _untagged(pointers: Any) -> Any:
    return interpreter.TensorHandle(pointers.data & _ADDRESS, pointers.dtype)


def _bits(values: np.ndarray) -> np.ndarray:
    """So that NaN equals NaN."""
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


@contextmanager
def watched(order: str, seed: int = 0) -> Iterator[list[Fault]]:
    """Inside, interpreted launches run their programs "forward", "reversed" or in a "random" order, and raise ``Fault``; gives the
    list of those raised so far, since a test may swallow one."""
    if order not in ORDERS:
        raise ValueError(f"order is {order!r}; allowed: {', '.join(ORDERS)}")
    if type(interpreter.interpreter_builder) is _Builder:
        raise RuntimeError("launches are watched already")
    run, convert, builder = interpreter.GridExecutor.__call__, interpreter._implicit_cvt, interpreter.interpreter_builder
    faults: list[Fault] = []

    def launch(self, *args, **kwargs):
        builder.launch = _Launch(self.fn.__name__, order, seed)
        builder.launch.named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        try:
            return run(self, *args, **kwargs)
        except Exception as problem:
            fault = problem if isinstance(problem, Fault) else problem.__cause__
            if not isinstance(fault, Fault):
                raise
            faults.append(fault)
            raise fault from None
        finally:
            del builder.launch

    def tagged(argument):
        converted = convert(argument)
        if isinstance(argument, torch.Tensor):
            converted.handle.data[...] = builder.launch.enter(argument)
        return converted

    with patch.object(interpreter.GridExecutor, "__call__", launch), patch.object(interpreter, "_implicit_cvt", tagged):
        builder.__class__ = _Builder
        try:
            yield faults
        finally:
            builder.__class__ = interpreter.InterpreterBuilder
