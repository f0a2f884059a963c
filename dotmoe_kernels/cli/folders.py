"""Where a command writes: what cannot be written, or would harm what is read, is refused before anything is loaded or trained."""

from __future__ import annotations

import argparse
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .._checks import refuse, require
from .._files import probe_folder

_LOG, _TOKENS = "log.jsonl", "tokens"
_BETWEEN = ("aligned", "tuned")  # the model after a stage, of which no process had the whole
_OF_A_RUN = (_LOG, "checkpoints", "reconstruct", "finetune", _TOKENS, *_BETWEEN)
_CHECKPOINTS = {"reconstruct": "reconstruct/layer-*", "align": "checkpoints", "finetune": "finetune/checkpoints"}  # of a stage
_ELSEWHERE = "another folder"


def _probe(path: Path, argument: str, given: str, *, file: bool = False, allowed: str = "a folder that can be made") -> None:
    try:
        probe_folder(path, file=file)
    except OSError as error:
        refuse(argument, f"{given} cannot be written to ({error})", allowed)


def _read(args: argparse.Namespace) -> dict[str, str]:
    """What the command reads and where it runs, by what errors call it."""
    named = {"MODEL": getattr(args, "model", None)}
    named |= {f"--{name}": getattr(args, name, None) for name in ("tokenizer", "teacher")}
    given = {argument: source for argument, source in named.items() if source}
    return given | {f"{source} of --data": source for source in args.data or ()} | {"the current folder": os.curdir}


def convert_folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Where the model and where its run goes."""
    from ..models.target import check_target, occupants, require_apart

    output = Path(os.path.expanduser(args.output))
    if output.name in ("", ".."):
        output = Path(os.path.abspath(output))
    require(bool(output.name), "--output", args.output, "a folder that can be made")
    target = check_target(output, "--output", args.overwrite, flag="--overwrite")
    if occupants(target):
        require_apart(target, "--output", f"{output}, which", _read(args))

    beside = args.run_folder is None
    run = output.with_name(output.name + ".run") if beside else Path(os.path.expanduser(args.run_folder))
    flag, given = ("--output", f"{output}, and {run}") if beside else ("--run-folder", f"{run}, which")
    if os.path.exists(run):
        require_apart(run, flag, given, _read(args))
        ours = run.is_dir() and all(name in _OF_A_RUN or name.startswith(".") for name in occupants(run))
        allowed = "a folder without one of that name beside it" if beside else "a new folder, or one of a run"
        require(ours, flag, f"{given} holds something else than a run", allowed)
        fresh = args.resume or args.overwrite or not has_checkpoints(run, list(_CHECKPOINTS))
        allowed = "--resume to continue it, or --overwrite to start anew"
        require(fresh, "--output", f"{output}, with an interrupted run in {run}", allowed)
    ends = [os.path.realpath(output), os.path.realpath(run)]
    require(os.path.commonpath(ends) not in ends, flag, f"{run}, which is not apart from {output} of --output", _ELSEWHERE)
    _check_token_cache(args, output)
    _probe(target, "--output", f"{output}, which")
    _probe(run, flag, given, file=True, allowed="a folder that can be made, or another --run-folder")
    return output, run


def _check_token_cache(args: argparse.Namespace, output: Path) -> None:
    if args.token_cache is None:
        return
    require(bool(args.token_cache), "--token-cache", "''", "a folder")
    cache = os.path.realpath(os.path.expanduser(args.token_cache))
    ends = [cache, os.path.realpath(output)]
    given = f"{args.token_cache}, which is not apart from {output} of --output"
    require(os.path.commonpath(ends) not in ends, "--token-cache", given, _ELSEWHERE)
    for source in args.data or ():
        inside = os.path.realpath(os.path.expanduser(source))
        apart = not os.path.isdir(inside) or os.path.commonpath([inside, cache]) != inside
        require(apart, "--token-cache", f"{args.token_cache}, which lies in {source} of --data", _ELSEWHERE)
    _probe(Path(cache), "--token-cache", f"{args.token_cache}, which", file=True)


def token_folder(args: argparse.Namespace, run: Path) -> Path:
    """Where the token ids of the text go."""
    return run / _TOKENS if args.token_cache is None else Path(os.path.expanduser(args.token_cache))


def note_tokens(args: argparse.Namespace, run: Path) -> None:
    """Before the text is read."""
    args.new_tokens = None if (run / _TOKENS).exists() else run


def forget_tokens(args: argparse.Namespace) -> None:
    """Of input that is refused nothing is kept, but for what was there before."""
    run = getattr(args, "new_tokens", None)
    if run is not None and not has_checkpoints(run, list(_CHECKPOINTS)):
        clear_tokens(run)


def demo_folder(args: argparse.Namespace) -> Path:
    """Where the demo goes."""
    from ..models.target import check_target, is_model, occupants, require_apart

    folder = Path(os.path.expanduser(args.output))
    if os.path.exists(folder):
        require(folder.is_dir(), "--output", f"{folder}, a file", "a folder")
        names = occupants(folder)
        require(args.overwrite or not names, "--output", f"{folder}, which exists", "a new folder, or --overwrite")
        known = not names or "demo.json" in names or is_model(folder / "dense")
        require(known, "--output", f"{folder}, which holds something else than a demo", "a new folder")
        for part in ("dense", "dotmoe"):
            check_target(folder / part, "--output", args.overwrite, flag="--overwrite")
            require_apart(folder / part, "--output", f"{folder}, whose {part}", _read(args))
        require_apart(folder / "logs", "--output", f"{folder}, whose logs", _read(args))
    _probe(folder / "dotmoe", "--output", f"{folder}, which")
    return folder


def _checkpoints(run: Path, stages: list[str]) -> Iterator[Path]:
    for stage in stages:
        for folder in run.glob(_CHECKPOINTS[stage]):
            yield from (
                path for path in folder.glob("step-*") if path.suffix == ".pt" or path.is_dir()
            )  # of several ranks a folder


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def has_checkpoints(run: Path, stages: list[str]) -> bool:
    """Whether one of the stages has left something to resume."""
    return any(True for _ in _checkpoints(run, stages))


def clear_run(run: Path, *, logs: bool) -> None:
    """Removes the checkpoints of a run, if ``logs`` its logs too, and the folders that are empty then; nothing else."""
    for path in list(_checkpoints(run, list(_CHECKPOINTS))):
        _remove(path)
    for name in _BETWEEN:
        shutil.rmtree(run / name, ignore_errors=True)
    if logs:
        for path in (run / _LOG, run / "finetune" / _LOG):
            path.unlink(missing_ok=True)
    for folder in [found for pattern in _CHECKPOINTS.values() for found in run.glob(pattern)]:
        for left in folder.glob(".step-*"):  # of a write that was killed
            _remove(left)
        with suppress(OSError):  # not empty
            folder.rmdir()
    for folder in (run / "reconstruct", run / "finetune", run):
        with suppress(OSError):
            folder.rmdir()


def clear_tokens(run: Path) -> None:
    """Removes the token ids that a run keeps for itself, and the folders that are empty then."""
    caches = [path for path in (run / _TOKENS).glob("*") if re.fullmatch("[0-9a-f]{16}", path.name)]
    for cache in caches:
        for name in ("index.json", "tokens.bin", "lock"):  # without the first the others are nothing
            (cache / name).unlink(missing_ok=True)
    for folder in (*caches, run / _TOKENS, run):
        with suppress(OSError):  # not empty
            folder.rmdir()
