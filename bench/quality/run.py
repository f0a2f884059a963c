"""Arms of a preset, one JSON each: `python -m bench.quality run`.

    <out>/<setting>/<method>.<seed>.json        the result
    <data>/models/<setting>-<hash>/             a dense model trained here
    <data>/runs/<fingerprint>/                  checkpoints of an arm under way
    <data>/aligned/<mark>/                      dot's model, for the arms that train its weights (see tuning.py)

A result says what it depends on: the dense model, the tokens, the documents, the method's options, the seed. One that is there and
depends on the same is not made again; one that cannot be read, or was made with something else, is.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from dotmoe_kernels._checks import require
from dotmoe_kernels._files import write_file
from dotmoe_kernels.alignment.config import AlignmentConfig
from dotmoe_kernels.alignment.loop import align
from dotmoe_kernels.alignment.module import AlignmentFFN
from dotmoe_kernels.conversion.pipeline import find_start
from dotmoe_kernels.models.modeling import DotMoeForCausalLM
from dotmoe_kernels.models.surgery import find_ffns

from ..machine import RESULTS, commit, describe
from .fetch import TASKS
from .measuring import measure
from .methods import Job, Made, Method
from .presets import PRESETS, Part
from .settings import Setting, make_setting
from .tuning import aligned_model, mark_of, options_of, tune

OUT = RESULTS / "quality"
FORMAT = 1  # of a result; counts in the fingerprint
_POINTS = 40  # of a curve
_OURS = ("dot", "tuned", "ablation")  # kinds

Points = list[tuple[int, float]]  # (tokens, KL)


class Task(NamedTuple):
    """One result to be made."""

    arm: Method
    seed: int
    options: AlignmentConfig
    path: Path
    depends: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.depends, sort_keys=True).encode()).hexdigest()[:16]


def depends_on(setting: Setting, arm: Method, options: AlignmentConfig, seed: int) -> dict[str, Any]:
    """All that a result follows from, the code apart, as JSON gives it back."""
    taken = dataclasses.asdict(options) if arm.trained else {}
    taken.pop("checkpoint_every", None)
    found = {"format": FORMAT, **setting.marks(), "arm": arm.name, "seed": seed, "options": taken}
    if arm.tuning is not None:
        tuning, taught = options_of(arm, setting.plan.topology, seed)
        found["tuning"] = {**dataclasses.asdict(tuning), "taught": taught}
        del found["tuning"]["checkpoint_every"]
    return json.loads(json.dumps(found))


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The names of what is not alike. An option that is newer than a result is alike where it has its default."""
    names = [name for name in ours if name != "options" and theirs.get(name) != ours[name]]
    old, new = theirs.get("options", {}), ours["options"]
    defaults = dataclasses.asdict(AlignmentConfig())
    names += [name for name in new if old.get(name, defaults[name]) != new[name]]
    return names + [name for name in old if name not in new]


def read_result(path: Path) -> dict[str, Any]:
    """Raises:
    ValueError: it is no result; names the file.
    """
    try:
        found = json.loads(path.read_text())
        lacking = {"depends", "arm", "kind", "setting", "seed", "nll", "tokens", "perplexity"} - set(found)
    except (ValueError, TypeError) as error:  # a UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} cannot be read as a result: {error}") from None
    if lacking:
        raise ValueError(f"{path} cannot be read as a result: without {', '.join(sorted(lacking))}")
    return found


def is_done(task: Task, say: Callable[[str], None], documents: int = 0) -> bool:
    if not task.path.exists():
        return False
    try:
        found = read_result(task.path)
    except ValueError as error:
        say(f"{error}; it is made again")
        return False
    names = differing(found["depends"], task.depends)
    if names:
        say(f"{task.path} was made with another {', '.join(names)}; it is made again")
        return False
    if documents and found.get("tasks", {}).get("documents") != documents:
        say(f"{task.path} is without {documents} documents of each task; it is made again")
        return False
    return True


def dot_start(setting: Setting, options: AlignmentConfig) -> str:
    """What dot starts from in a setting."""
    return find_start(options, "dot", setting.dense, find_ffns(setting.dense), setting.train).init


def tasks_of(part: Part, setting: Setting, out: Path, seeds: Sequence[int], only: Iterable[str] = ()) -> list[Task]:
    """The methods of the first seed, then of the next; then the ablations. An arm without randomness comes once, and so does one
    that is dot under another name."""
    found, arms = [], [arm for arm in part.arms() if not only or arm.name in set(only)]
    start = dot_start(setting, AlignmentConfig(**(part.plan.options | part.options)))
    for ablation, (number, seed) in product((False, True), enumerate(seeds)):
        for arm in arms:
            if (arm.kind == "ablation") != ablation or (number and not arm.seeded):
                continue
            if arm.kind == "dot" and arm.options == {"init": start}:
                continue
            ours = {"init": start} if arm.kind in _OURS or arm.name == "dot-frozen" else {}
            options = AlignmentConfig(**(part.plan.options | part.options | ours | arm.options | {"seed": seed}))
            path = out / part.plan.name / f"{arm.name}.{seed}.json"
            found.append(Task(arm, seed, options, path, depends_on(setting, arm, options, seed)))
    return found


def curve(log: list[dict[str, float]], tokens: int) -> Points:
    """(tokens, KL) of a log whose steps have ``tokens`` each: means over equal parts of it."""
    size = max(1, -(-len(log) // _POINTS))
    parts = [log[n : n + size] for n in range(0, len(log), size)]
    return [(int(part[-1]["step"]) * tokens, round(sum(e["kl"] for e in part) / len(part), 5)) for part in parts]


def _train(setting: Setting, job: Job, made: Made, task: Task, folder: Path, progress: bool) -> Points:
    """Aligns the layers; the curve. With ``checkpoint_every`` it goes on where an interrupted run of the arm stopped."""
    resumable = task.options.checkpoint_every > 0 and "checkpoint_every" in setting.plan.options
    log: list[dict[str, float]] = []
    result = align(
        job.model,
        made.layers,
        job.train,
        task.options,
        folder=folder if resumable else None,
        resume=resumable,
        progress=progress,
        label=task.arm.name,
        fingerprint={"arm": task.fingerprint},
        transport=task.arm.transport,
    )
    log = result.log
    if resumable:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return curve(log, task.options.batch_size * job.train.shape[1])


def _tune(setting: Setting, task: Task, data: Path, folder: Path, progress: bool) -> tuple[DotMoeForCausalLM, Points, int]:
    """dot's model, its weights trained where the arm says so; the curve, and the tokens of all trainings."""
    size = task.options.batch_size * setting.train.shape[1]
    model, log = aligned_model(setting, task.options, mark_of(task.depends), data, progress)
    if task.arm.tuning is None:
        return model, curve(log, size), task.options.steps * size
    log, step = tune(model, setting, task.arm, task.seed, folder, progress)
    aligned = task.options.steps * size
    points = [(aligned + seen, kl) for seen, kl in curve(log, step)] if "kl" in log[0] else []
    return model, points, aligned + len(log) * step


def run_arm(setting: Setting, task: Task, data: Path, *, documents: int = 0, progress: bool = False) -> dict[str, Any]:
    """The result of an arm, written."""
    begin, arm, folder = time.monotonic(), task.arm, data / "runs" / task.fingerprint
    total = sum(p.numel() for p in setting.dense.parameters())
    tokens = task.options.steps * task.options.batch_size * setting.train.shape[1] if arm.trained else 0
    model: PreTrainedModel
    layers: dict[str, AlignmentFFN] = {}
    zeroed: list[torch.Tensor] = []
    built, points = 0.0, Points()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* leave experts without a token")
        if arm.tuning is not None or (arm.name == "dot" and setting.plan.tuning):
            model, points, tokens = _tune(setting, task, data, folder, progress)
        else:
            model = copy.deepcopy(setting.dense)
            job = Job(model, setting.plan.topology, setting.train, task.options)
            layers, zeroed = made = arm.make(job)
            built = time.monotonic() - begin
            points = _train(setting, job, made, task, folder, progress) if arm.trained else []
    trained = time.monotonic() - begin
    found = {
        "setting": setting.plan.name,
        "arm": arm.name,
        "kind": arm.kind,
        "source": arm.source,
        "about": arm.about,
        "seed": task.seed,
        "depends": task.depends,
        **measure(model, layers, zeroed, setting.held),
        "total_parameters": total,
        "trained_tokens": tokens,
        "curve": points,
        "seconds": {"start": built, "in all": trained},
        "commit": commit(),
        "machine": describe(),
    }
    if documents:
        found["tasks"] = score_tasks(model, setting, data, documents)
    task.path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=None if len(found["nll"]) > 4096 else 1) + "\n"
    write_file(task.path, lambda file: file.write(text.encode()))
    shutil.rmtree(folder, ignore_errors=True)
    return found


def score_tasks(model: torch.nn.Module, setting: Setting, data: Path, documents: int) -> Any:
    """The six tasks of ``fetch``, so many documents of each.

    Raises:
        ImportError: this version cannot score tasks.
    """
    from .tasks import score, summary

    return {"documents": documents, **summary(score(model, setting.tokenizer, data / TASKS, documents=documents))}


def run(
    preset: str,
    out: Path,
    data: Path,
    *,
    settings: Sequence[str] = (),
    **options: Any,
) -> None:
    """Makes the results of a preset that are not there yet.

    Args:
        preset: "ci", "cpu", "real" or "gpu".
        out: where the results go.
        data: where models are kept, and what ``fetch`` made.
        settings: names of settings; all of the preset if empty.
        options: of ``run_parts``.

    Raises:
        ValueError: an unknown preset, arm or setting; the data of ``fetch`` are needed and not there.
    """
    require(preset in PRESETS, "--preset", repr(preset), " | ".join(PRESETS))
    parts = PRESETS[preset]
    require(set(settings) <= {p.plan.name for p in parts}, "--setting", " ".join(settings), " | ".join(p.plan.name for p in parts))
    run_parts([p for p in parts if not settings or p.plan.name in settings], out, data, **options)


def run_parts(
    parts: Sequence[Part],
    out: Path,
    data: Path,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    documents: int = 0,
    jobs: int = 1,
    progress: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """``run`` of these parts.

    Args:
        only: names of arms; all if empty.
        seeds: instead of the parts'.
        documents: of each of the six tasks; 0: the tasks are not scored.
        jobs: processes, which share the cores: a small model gains nothing from a second thread.
        progress: show bars.
        say: where the lines go.
    """
    known = list(dict.fromkeys(arm.name for part in parts for arm in part.arms()))
    unknown = [name for name in only if name not in known]
    require(not unknown, "--only", " ".join(unknown), " ".join(known))
    require(jobs >= 1, "--jobs", jobs, "an integer of at least 1")
    if documents:
        importlib.import_module(".tasks", __package__)  # before hours are spent
    for part in parts:
        name = part.plan.name
        setting = make_setting(part.plan, data, tokens=part.tokens(), progress=progress)
        tasks = tasks_of(part, setting, out, tuple(seeds) or part.seeds, only)
        left = [task for task in tasks if not is_done(task, say, documents)]
        say(
            f"{name}: {setting.train.numel():,} tokens to train on, {len(setting.held.names)} held-out documents with "
            f"{int(setting.held.valid.sum()):,} tokens; {len(tasks) - len(left)} of {len(tasks)} results are there"
        )
        done: Iterator[dict[str, Any]]
        if jobs == 1:
            done = (run_arm(setting, task, data, documents=documents, progress=progress) for task in left)
        else:
            del setting
            done = _side_by_side(part, out, data, left, documents, jobs)
        for number, found in enumerate(done, 1):
            value, spent = found["perplexity"], found["seconds"]["in all"]
            shown = f"{value:.2f}" if math.isfinite(value) else "infinite"
            say(f"{name} {number}/{len(left)} {found['arm']}, seed {found['seed']}: perplexity {shown}, {spent:.0f} s")


# --- several processes: each makes the setting for itself, out of what the first has left in the data folder ------------------

_at_hand: list[Setting] = []  # of a worker


def _begin(part: Part, data: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    _at_hand[:] = [make_setting(part.plan, data, tokens=part.tokens())]


def _work(part: Part, out: Path, data: Path, arm: str, seed: int, documents: int) -> dict[str, Any]:
    (task,) = tasks_of(part, _at_hand[0], out, (seed,), (arm,))  # built here: an arm's functions cannot be sent
    return run_arm(_at_hand[0], task, data, documents=documents)


def _side_by_side(part: Part, out: Path, data: Path, tasks: Sequence[Task], documents: int, jobs: int) -> Iterator[dict[str, Any]]:
    """The results in the order in which they come. After an error no further arm is begun."""
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (part, data, threads)) as pool:
        futures = [pool.submit(_work, part, out, data, task.arm.name, task.seed, documents) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
