"""The ``paired`` fixture, and what pytest-benchmark writes about machine and commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import machine
from bench.paired import Group, Recorder, play


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--backward", action="store_true", help="only the benches of backward passes: time and memory")
    parser.addoption("--cpu-time", action="store_true", help="CPU time of one thread: where others use the machine as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("backward"):
        config.hook.pytest_deselected(items=[item for item in items if "-backward" not in item.name])
        items[:] = [item for item in items if "-backward" in item.name]


def pytest_configure(config: pytest.Config) -> None:
    torch.manual_seed(0)
    if config.getoption("cpu_time"):
        torch.set_num_threads(1)
    config.stash[_LOAD] = [round(x, 2) for x in os.getloadavg()]


_LOAD = pytest.StashKey[list[float]]()


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config) -> Recorder:
    return Recorder(time.process_time if pytestconfig.getoption("cpu_time") else None)


@pytest.fixture
def paired(recorder: Recorder, benchmark: Any) -> Callable[[Group, str], None]:
    """paired(group, impl): measure the group once, report the times of one implementation."""

    def report(group: Group, impl: str) -> None:
        play(benchmark, recorder.result(group), impl)

    return report


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # pytest-benchmark's own has the host name in it
    machine_info.update(machine.describe(), load_average_before=config.stash[_LOAD], load_average_after=list(os.getloadavg()))
    if config.getoption("cpu_time"):
        machine_info["clock"] = "CPU time"


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info["project"] = "dotmoe_kernels"
    commit_info.pop("branch", None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    for one in output_json["benchmarks"]:
        one["params"] = {"group": one["group"], "impl": one["extra_info"]["impl"]}
