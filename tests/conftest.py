"""Seeds, the gpu marker, NaN-filled outputs, and the Triton interpreter, watched, on a machine without a GPU."""

import os
import warnings
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from zlib import crc32

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()  # CUDA and ROCm alike
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated: so before dotmoe_kernels is imported

settings.register_profile("dotmoe", deadline=None, max_examples=15, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dotmoe")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also the tests marked slow")
    orders = "of a launch's programs, interpreted: one a test, by its name, or every one (three times as long)"
    parser.addoption("--orders", choices=["one", "all"], default="one", help=orders)
    oldest = (
        "folder of a virtual environment, made where there is none, in which the kernels' tests run with the oldest Triton allowed"
    )
    parser.addoption("--oldest-triton", type=Path, metavar="PATH", help=oldest)


def pytest_configure(config):
    problem = numpy_problem(*map(installed, ("triton", "numpy")))
    if problem and not HAS_GPU:
        raise pytest.UsageError(problem)


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def numpy_problem(triton, numpy):
    """Triton's interpreter made numbers of arrays of one element until 3.7, which NumPy refuses from 2.4 on."""
    if triton and release(triton) < (3, 7) and release(numpy) >= (2, 4):
        return f"numpy is {numpy}; allowed: numpy<2.4 with Triton {triton}, whose interpreter runs the kernels' tests"
    return None


def release(text):
    """Major and minor."""
    return tuple(int(part) for part in text.split(".")[:2])


def launches_kernels(module):
    """Whether tests of this module may run interpreted kernels: then they ask ``_backend`` for them."""
    return not HAS_GPU and any(name in vars(module) for name in ("_backend", "interpreted"))


def pytest_generate_tests(metafunc):
    if metafunc.config.getoption("--orders") == "all" and launches_kernels(metafunc.module):
        from interpreter import ORDERS

        metafunc.parametrize("program_order", ORDERS, indirect=True)


def pytest_collection_modifyitems(config, items):
    slow = config.getoption("--slow")
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))
        if not slow and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow, minutes on two cores: --slow runs it"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _pytorch_again():
    """A test that left the interpreter on would make every later one a slow test of something else."""
    from dotmoe_kernels import _backend

    yield
    assert not _backend.use_triton(torch.empty(0))


@contextmanager
def filled_with_nan():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN: an output that is not written everywhere shows."""
    with filled_with_nan():
        yield


@pytest.fixture
def program_order(request):
    return getattr(request, "param", None)


@pytest.fixture(autouse=True)
def _watched(request, program_order):
    """Interpreted kernels run in an order of the test's own, on NaN-filled outputs, and every access of theirs is checked."""
    from dotmoe_kernels import _backend

    if not launches_kernels(request.module) or not _backend.HAS_TRITON:
        yield
        return
    from interpreter import ORDERS, watched

    seed = crc32(request.node.nodeid.encode())
    with filled_with_nan(), watched(program_order or ORDERS[seed % len(ORDERS)], seed) as faults:
        yield
    assert not faults, f"a fault that the test did not pass on: {faults[0]}"
