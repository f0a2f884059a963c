"""What a result was measured on: processor, threads, versions. No host names."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dotmoe_kernels.conversion.machine import cores, cpu_model, matrix_instructions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_PACKAGES = ("torch", "triton", "numpy", "scipy", "POT", "geomloss", "transformers", "pytest-benchmark")


def machine_name() -> str:
    """A short neutral name: the GPU's model, or the processor's and its core count."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cpu_model()} {cores()} cores"
    name = re.sub(r"\((r|tm)\)|\bprocessor\b|@.*?hz", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    """Python and the packages that are compared; a missing one says so."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe() -> dict[str, Any]:
    """The ``machine_info`` of a result."""
    info: dict[str, Any] = {
        "name": machine_name(),
        "cpu": cpu_model(),
        "cores": cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_instructions": matrix_instructions(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "versions": versions(),
    }
    if torch.cuda.is_available():
        info["gpu"] = torch.cuda.get_device_name()
        info["cuda"] = torch.version.cuda or torch.version.hip
    return info


def git(*arguments: str) -> str:
    """The output of a git command in the repository, empty where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def commit() -> str:
    """The short id of the commit."""
    return git("rev-parse", "--short", "HEAD") or "unknown"
