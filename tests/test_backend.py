"""Which implementation runs, and that the package does without Triton."""

import subprocess
import sys
import textwrap

import pytest
import torch

from dotmoe_kernels import _backend

needs_triton = pytest.mark.skipif(not _backend.HAS_TRITON, reason="Triton is not installed")


def test_a_cpu_tensor_runs_pytorch():
    assert not _backend.use_triton(torch.empty(1))


@needs_triton
def test_interpreted_only_inside_its_context():
    from triton import knobs

    with _backend.interpreted():
        assert _backend.use_triton(torch.empty(1)) == bool(knobs.runtime.interpret)
        assert not _backend.use_triton(torch.empty(1, device="meta"))
    assert not _backend.use_triton(torch.empty(1))
    with pytest.raises(KeyError), _backend.interpreted():
        raise KeyError
    assert not _backend.use_triton(torch.empty(1))


@needs_triton
def test_without_the_interpreter_the_context_changes_nothing(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "interpret", False)
    with _backend.interpreted():
        assert not _backend.use_triton(torch.empty(1))


@pytest.mark.gpu
def test_a_gpu_tensor_runs_triton():
    assert _backend.use_triton(torch.empty(1, device="cuda")) == _backend.HAS_TRITON


def test_the_guard_of_a_cpu_tensor_does_nothing():
    with _backend.device_guard(torch.empty(1)):
        pass


def in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_no_triton():
    in_a_fresh_process("""
        import sys
        import torch
        before = "triton" in sys.modules
        import dotmoe_kernels as dk
        dk.balanced_assignment(torch.randn(12, 3))
        assert ("triton" in sys.modules) == before
    """)


def test_the_package_works_without_triton():
    in_a_fresh_process("""
        import sys
        sys.modules["triton"] = None  # as if it were not installed
        import torch
        import dotmoe_kernels as dk
        from dotmoe_kernels import _backend
        assert not _backend.HAS_TRITON
        assert dk.balanced_assignment(torch.eye(3)).tolist() == [0, 1, 2]
        with _backend.interpreted():
            dk.balanced_assignment(torch.eye(3))
    """)
