"""`dotmoe eval --tasks`: what lm-evaluation-harness is asked, and its answers as lines."""

from __future__ import annotations

import argparse
from typing import Any

from .._checks import require
from .inputs import find_tokenizer, named

_NAMES = {"tasks": "--tasks", "include_path": "--include-path", "limit": "--limit"}


def require_tasks(args: argparse.Namespace) -> Any:
    """The tasks of --tasks, or None without it. They are looked up, and their data fetched, before the model is read."""
    if args.tasks is None:
        for flag, value in (("--include-path", args.include_path), ("--limit", args.limit)):
            require(value is None, flag, value, "together with --tasks")
        return None
    require(args.limit is None or args.limit >= 1, "--limit", args.limit, "at least 1")
    from ..conversion.tasks import find_tasks

    with named(**_NAMES):
        return find_tasks([name for words in args.tasks for name in words.split(",")], args.include_path)


def measure_tasks(args: argparse.Namespace, tasks: Any, model: Any) -> dict[str, Any]:
    """What joins the report; empty without tasks."""
    if tasks is None:
        return {}
    from ..conversion.tasks import run_tasks

    with named(**_NAMES, tokenizer="MODEL" if args.tokenizer is None else "--tokenizer"):
        return run_tasks(tasks, model, find_tokenizer(args), batch_size=args.batch_size, limit=args.limit)


def _cells(value: float | None, stderr: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>12}{'-' if stderr is None else f'{stderr:.4f}':>10}"


def task_lines(report: dict[str, Any]) -> list[str]:
    """A line a metric, and the mean of the paper's six; none without tasks."""
    if "tasks" not in report:
        return []
    lines = [
        f"tasks (lm-evaluation-harness {report['lm_eval']}):",
        f"  {'task':<28}{'metric':<16}{'value':>12}{'stderr':>10}{'n':>8}",
    ]
    for name, task in report["tasks"].items():
        for metric, values in task["metrics"].items():
            n = "-" if task["n"] is None else task["n"]
            lines.append(f"  {name:<28}{metric:<16}{_cells(values['value'], values['stderr'])}{n:>8}")
    if "paper" in report:
        mean = report["paper"]
        lines.append(f"  {'mean of the six':<28}{'acc, acc_norm':<16}{_cells(mean['value'], mean['stderr'])}")
        normed = ", ".join(name for name, metric in mean["metrics"].items() if metric == "acc_norm")
        lines.append(f"  (acc_norm of {normed}; acc of the others)")
    return lines
