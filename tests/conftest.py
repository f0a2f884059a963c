"""Seeds, the gpu marker, NaN-filled outputs, and the Triton interpreter on a machine without a GPU."""

import os
import warnings

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


@pytest.fixture
def nan_filled():
    """torch.empty gives NaN: an output that is not written everywhere shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
