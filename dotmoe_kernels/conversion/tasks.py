"""Tasks of lm-evaluation-harness on a model at hand, the paper's six among them. lm-eval is imported once a function is called."""

from __future__ import annotations

import io
import logging
import math
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import is_integer, refuse, require

PAPER = "paper"
# zero-shot; over the answer's length where answers differ in it, as bench.quality scores the same tasks without network
PAPER_TASKS = {
    "boolq": "acc",
    "sciq": "acc",
    "piqa": "acc_norm",
    "winogrande": "acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
}


class Tasks(NamedTuple):
    """Found and loaded, with their data."""

    names: tuple[str, ...]
    loaded: tuple[Any, ...]  # tasks and groups of lm-eval
    manager: Any
    paper: bool  # whether the mean of the six is asked for


@contextmanager
def _quiet() -> Iterator[None]:
    """Bars only where somebody sees them; what is printed goes where they go, so that the output stays that of the caller."""
    sink = sys.stderr if sys.stderr.isatty() else io.StringIO()
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sink))
        stack.enter_context(redirect_stderr(sink))
        yield


def _import() -> Any:
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-evaluation-harness ({error}): pip install 'dotmoe_kernels[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _manager(harness: Any, wanted: Collection[str], include_path: str | Path | None) -> Any:
    """lm-eval's index of tasks. Its own 10,000 files take ten seconds, which single tasks of ``include_path`` need not wait for."""
    make = harness.tasks.TaskManager
    if include_path is None:
        return make()
    try:
        alone = make(include_path=str(include_path), include_defaults=False)
        return alone if set(wanted) <= set(alone.all_subtasks) else make(include_path=str(include_path))
    except Exception as error:  # of a YAML file, by whoever reads it
        refuse("include_path", f"{include_path}, which lm-eval cannot read ({_reason(error)})", "tasks as YAML files")


def find_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Tasks:
    """Looks names up and loads what belongs to them.

    Args:
        names: "paper" for the six, or names, groups, tags and patterns with * that lm-eval knows.
        include_path: a folder with further tasks, as YAML files.

    Raises:
        ValueError: no such name, no such folder, a task that cannot be loaded.
        OSError: its data cannot be fetched.
        ImportError: lm-eval is not installed.
    """
    require(bool(names) and all(names), "tasks", repr(",".join(names)), f"{PAPER}, or names of lm-eval's tasks")
    if include_path is not None:
        require(
            Path(include_path).is_dir(), "include_path", f"{include_path}, which is no folder", "a folder with tasks as YAML files"
        )
    harness = _import()
    wanted = dict.fromkeys(part for name in names for part in (PAPER_TASKS if name == PAPER else (name,)))
    with _quiet():
        manager = _manager(harness, wanted, include_path)
        found: dict[str, Any] = {}
        for name in wanted:
            matches = manager.match_tasks([name])
            near = get_close_matches(name, manager.all_tasks, n=3)
            hint = f" (near: {', '.join(near)})" if near else ""
            require(bool(matches), "tasks", name, f"{PAPER}, or a task of lm-eval or of --include-path{hint}")
            found |= {match: _load(manager, match) for match in matches}
    return Tasks(tuple(found), tuple(part for parts in found.values() for part in parts), manager, PAPER in names)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _load(manager: Any, name: str) -> list[Any]:
    """The group of that name, or the task, or the tasks of a tag."""
    try:
        loaded = manager.load([name])
    except OSError:  # no network: says of what
        raise
    except Exception as error:  # a template, a field, a file of data: every kind, out of other packages
        refuse("tasks", f"{name}, which lm-eval cannot load ({_reason(error)})", "a task that is whole")
    group = loaded["groups"].get(name)
    return list(loaded["tasks"].values()) if group is None else [group]


def _number(value: Any) -> float | None:
    """lm-eval says "N/A" where there is no deviation."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _metrics(values: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's "acc,none" and "acc_stderr,none" as {"acc": {"value", "stderr"}}; another filter than none stays in the name."""
    found = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr"):
            shown = name if kind == "none" else key
            found[shown] = {"value": _number(value), "stderr": _number(values.get(f"{name}_stderr,{kind}"))}
    return found


def _paper_mean(tasks: dict[str, Any]) -> dict[str, Any]:
    """Over the six, each by its own metric; the deviation of a mean of independent ones."""
    parts = [tasks[name]["metrics"][metric] for name, metric in PAPER_TASKS.items()]
    values, errors = [part["value"] for part in parts], [part["stderr"] for part in parts]
    whole = None not in errors
    return {
        "value": sum(values) / len(parts),
        "stderr": math.sqrt(sum(error**2 for error in errors)) / len(parts) if whole else None,
        "metrics": PAPER_TASKS,
    }


class _UnknownId(ValueError):
    pass


@contextmanager
def _ids_of_the_model(model: Any) -> Iterator[None]:
    """Inside, an id that the model does not know is an error that says so; a tokenizer may list such ids without using them."""
    vocabulary = model.config.get_text_config().vocab_size

    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        most = int((args[0] if args else kwargs["input_ids"]).max())
        if most >= vocabulary:
            raise _UnknownId(f"tokenizer is one whose tokens have ids up to {most}; allowed: ids below the model's {vocabulary}")

    handle = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run_tasks(tasks: Tasks, model: Any, tokenizer: Any, *, batch_size: int = 4, limit: int | None = None) -> dict[str, Any]:
    """What the model makes of them, in plain numbers.

    Args:
        tasks: of ``find_tasks``.
        model: a causal LM of transformers in eval mode, dense or converted.
        tokenizer: the model's own.
        batch_size: requests a pass.
        limit: documents a task; None: all.

    Returns:
        {"tasks": {name: {"n", "few_shot", "metrics": {metric: {"value", "stderr"}}}}, "lm_eval": version, "limit"}, and with
        "paper" among the names "paper": {"value", "stderr", "metrics"}, the mean of the six.

    Raises:
        ValueError: a limit below 1, a tokenizer that gives ids the model does not know.
    """
    require(limit is None or (is_integer(limit) and limit >= 1), "limit", limit, "an integer of at least 1")
    harness = _import()
    from importlib.metadata import version

    from jinja2 import TemplateError  # of lm-eval's templates

    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    with _quiet(), _ids_of_the_model(model):
        wrapped = harness.models.huggingface.HFLM(
            pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=positions
        )
        options = {"task_manager": tasks.manager, "limit": limit, "log_samples": False}
        try:
            found = harness.simple_evaluate(wrapped, tasks=list(tasks.loaded), **options)
        except _UnknownId:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, TemplateError) as error:  # a document of another form
            refuse("tasks", f"{','.join(tasks.names)}, which lm-eval cannot run ({_reason(error)})", "tasks that are whole")
    report = {}
    for name, values in {**found["results"], **(found.get("groups") or {})}.items():
        metrics = _metrics(values)
        if metrics:  # a group without a mean of its own has none
            n = found["n-samples"].get(name, {}).get("effective")
            report[name] = {"n": n, "few_shot": found["n-shot"].get(name), "metrics": metrics}
    paper = {PAPER: _paper_mean(report)} if tasks.paper else {}
    return {"tasks": report, **paper, "lm_eval": version("lm_eval"), "limit": limit}
