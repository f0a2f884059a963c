"""The watched interpreter sees what it is for: kernels with a planted fault, and each fault's message."""

import numpy as np
import pytest
import torch

from dotmoe_kernels._backend import HAS_TRITON  # not the module: these tests watch for themselves

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from interpreter import ORDERS, Fault, watched

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are not interpreted here: there is a GPU")
EVERY = pytest.mark.parametrize("order", ORDERS)
N, BLOCK = 24, 4


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, step, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(out_ptr + i * step, tl.load(x_ptr + i * step, mask=i < n), mask=i < n)
    else:
        tl.store(out_ptr + i * step, tl.load(x_ptr + i * step))


@triton.jit
def _chain_kernel(x_ptr, out_ptr, ATOMIC: tl.constexpr):
    """A program takes over what the one before it has left."""
    i = tl.program_id(0)
    before = tl.load(out_ptr + i)
    if ATOMIC:
        tl.atomic_add(out_ptr + i + 1, before + tl.load(x_ptr + i))
    else:
        tl.store(out_ptr + i + 1, before + tl.load(x_ptr + i))


@triton.jit
def _same_place_kernel(out_ptr, FIRST_ADDS: tl.constexpr):
    i = tl.program_id(0)
    if FIRST_ADDS:
        if i == 0:
            tl.atomic_add(out_ptr, 1.0)
        else:
            tl.store(out_ptr, 1.0)
    else:
        tl.store(out_ptr, i.to(tl.float32))


@triton.jit
def _add_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def _many_to_one_kernel(out_ptr, SAME: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if SAME:
        tl.store(out_ptr + i // 2, i // 2)
    else:
        tl.store(out_ptr + i // 2, i)


@triton.jit
def _range_kernel(out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, i)


@triton.jit
def _visits_kernel(place_ptr, count_ptr):
    i = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(place_ptr + i, tl.atomic_add(count_ptr, 1))


def copy(x, out, n=N, step=1, masked=True, programs=N // BLOCK):
    _copy_kernel[(programs,)](x, out, n, step, MASKED=masked, BLOCK=BLOCK)


@EVERY
def test_a_sound_kernel_runs(order):
    x, out = torch.randn(N), torch.empty(N)
    with watched(order) as faults:
        copy(x, out)
        copy(x[:-3], out[:-3], n=N - 3)
        copy(x, out, programs=N)  # those behind the end do nothing
        total = torch.zeros(1)
        _add_kernel[(7,)](total)
    assert torch.equal(x, out)
    assert total == 7
    assert faults == []


def visits(order, seed=0):
    place, count = torch.empty(24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with watched(order, seed):
        _visits_kernel[2, 4, 3](place, count)
    return place.tolist()


def test_the_order_is_the_one_asked_for():
    assert visits("forward") == list(range(24))
    assert visits("reversed") == list(range(24))[::-1]
    shuffled = visits("random", 1)
    assert sorted(shuffled) == list(range(24))
    assert shuffled not in (visits("forward"), visits("reversed"), visits("random", 2))
    assert shuffled == visits("random", 1)
    with pytest.raises(ValueError, match=r"order is 'any'; allowed: forward, reversed, random"), watched("any"):
        pass


def refused(order, message, kernel, *args, grid=(6,), **constants):
    with watched(order) as faults:
        with pytest.raises(Fault, match=message):
            kernel[grid](*args, **constants)
        assert len(faults) == 1


@EVERY
@pytest.mark.parametrize("atomic", [False, True])
def test_a_race(order, atomic):
    message = (
        r"_chain_kernel, program \(\d, 0, 0\) of \(6, 1, 1\), \w+ order: a \w+ of element \d of out_ptr \[7\], \w+( to)? by program"
    )
    refused(order, message, _chain_kernel, torch.randn(6), torch.zeros(7), ATOMIC=atomic)


def test_without_the_watch_a_race_looks_right():
    x, out = torch.randn(6), torch.zeros(7)
    _chain_kernel[(6,)](x, out, ATOMIC=False)
    torch.testing.assert_close(out[1:], x.cumsum(0))


@EVERY
def test_two_writers(order):
    refused(
        order, r"a store of element 0 of out_ptr \[3\], written by program", _same_place_kernel, torch.zeros(3), FIRST_ADDS=False
    )


@EVERY
def test_an_atomic_and_a_store(order):
    message = r"a (store|atomic) of element 0 of out_ptr \[3\], (added to|written) by program"
    refused(order, message, _same_place_kernel, torch.zeros(3), grid=(2,), FIRST_ADDS=True)


@EVERY
@pytest.mark.parametrize(
    ("view", "step", "what"),
    [
        (slice(0, N - 1), 1, "a load of 1 elements outside x_ptr"),  # one element too short
        (slice(1, N), 1, "a load of 1 elements outside x_ptr"),
        (slice(0, 0), 1, "a load of 4 elements outside x_ptr"),
        (slice(0, 2 * N, 2), 1, "a load of 2 elements outside x_ptr"),  # the gaps belong to others
    ],
)
def test_an_overrun(order, view, step, what):
    x, out = torch.randn(2 * N)[view], torch.empty(N)
    refused(order, what, _copy_kernel, x, out, N, step, MASKED=False, BLOCK=BLOCK)
    refused(
        order,
        what.replace("load", "store").replace("x_ptr", "out_ptr"),
        _copy_kernel,
        torch.randn(N),
        x,
        N,
        1,
        MASKED=True,
        BLOCK=BLOCK,
    )


def test_an_overrun_into_another_tensor_of_the_launch():
    both = torch.randn(2 * N)
    refused("forward", "outside x_ptr", _copy_kernel, both[: N - 1], both[N:], N, 1, MASKED=True, BLOCK=BLOCK)


def test_strided_tensors_are_whole():
    x, out = torch.randn(3 * N), torch.empty(2 * N)
    with watched("reversed"):
        copy(x[::3], out[::2], step=3, n=0)  # nothing is touched
        _copy_kernel[(N // BLOCK,)](x[::2][:N], out[::2], N, 2, MASKED=True, BLOCK=BLOCK)
        _copy_kernel[(1,)](torch.ones(1).expand(9), out, 1, 1, MASKED=True, BLOCK=BLOCK)
    assert torch.equal(out[2::2], x[2 : 2 * N : 2])


@EVERY
@pytest.mark.usefixtures("nan_filled")
def test_an_unwritten_element(order):
    x, out = torch.randn(N), torch.empty(N)
    with watched(order):
        copy(x, out, n=N - 1)
    assert torch.equal(out[:-1], x[:-1])
    assert out[-1].isnan()
    whole = torch.empty(3, dtype=torch.int64)
    assert (whole == torch.iinfo(torch.int64).max).all()


def test_one_store_of_two_values_to_one_place():
    out = torch.zeros(4, dtype=torch.int32)
    with watched("forward"):
        _many_to_one_kernel[(1,)](out, SAME=True, BLOCK=8)
    assert out.tolist() == [0, 1, 2, 3]
    refused("forward", "a store of different values to one address", _many_to_one_kernel, out, grid=(1,), SAME=False, BLOCK=8)


def test_a_store_of_another_size(monkeypatch):
    """As Triton 3.5's histogram gave 64 bits where 32 were due, and overwrote what lay behind."""
    from triton.runtime import interpreter

    make_range = interpreter.InterpreterBuilder.create_make_range

    def wide(*args):
        handle = make_range(*args)
        handle.data = handle.data.astype(np.int64)
        return handle

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_make_range", wide)
    out = torch.zeros(4, dtype=torch.int32)
    refused("forward", "a store of 8 bytes an element where its pointer has 4", _range_kernel, out, grid=(1,), BLOCK=2)


def test_a_grid_that_no_gpu_takes():
    message = r"_add_kernel, grid \(1, 65536, 1\): a GPU takes a grid of at most"
    refused("forward", message, _add_kernel, torch.zeros(1), grid=(1, 65536))


def test_what_it_changes_is_undone():
    from triton.runtime import interpreter

    def state():
        return interpreter.GridExecutor.__call__, interpreter._implicit_cvt, type(interpreter.interpreter_builder)

    def inside():
        with watched("reversed"):
            assert state() != before
            with pytest.raises(RuntimeError, match="watched already"), watched("forward"):
                pass
            raise KeyError

    before = state()
    with pytest.raises(KeyError):
        inside()
    assert state() == before
