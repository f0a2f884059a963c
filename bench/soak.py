"""Kills a conversion again and again: is what it leaves ever wrong?

    python -m bench.soak [--kills N] [--seed N] [--out FILE]

A tiny model goes through every stage of `dotmoe convert` and is killed (SIGKILL), up to three times before it may end; the same
command with --resume goes on. The moments are random: by turns right before one of the run's operations on files, and at a time.
After every kill the output folder must be one that ``load`` refuses, or the very one of a run that nobody disturbed, and no
checkpoint may be broken; in the end model and log are those of that run, bit for bit.

The processes are forks of one that has imported everything: starting takes no time, and so any moment may be hit.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import dotmoe_kernels as dk
from bench import machine
from dotmoe_kernels import cli
from dotmoe_kernels._files import TEMPORARY
from dotmoe_kernels.alignment.checkpoints import newest_checkpoint, read_log
from dotmoe_kernels.conversion import token_cache
from dotmoe_kernels.conversion.demo import train_tokenizer

_A_ROUND = 3  # kills before a run may end
_OPTIONS = (
    *("--expert-size", "8", "--sequence-length", "16", "--batch-size", "2", "--no-progress", "--checkpoint-every", "2"),
    *("--stage", "reconstruct,align,finetune", "--reconstruct-steps", "3", "--steps", "7", "--finetune-steps", "5"),
)


def _prepare(place: Path) -> int:
    draw = random.Random(0)
    rows = [" ".join(draw.choices(["the", "router", "sends", "every", "token", "to", "four", "experts"], k=24)) for _ in range(40)]
    (place / "text.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = train_tokenizer(rows, vocab_size=300)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.2, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(place / "dense")
    tokenizer.save_pretrained(place / "dense")
    return 0


def _count_files(place: Path, kill_at: int | None) -> list[int]:
    """The number of operations on files inside ``place`` from now on; this process dies before the one of that number."""
    count, inside = [0], str(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(("open", "os.", "shutil.", "tempfile.")) and any(inside in str(one) for one in arguments):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _convert(place: Path, run: Path, resume: bool, kill_at: int | None = None) -> int:
    token_cache._PART = 100  # several parts of so little text
    count = _count_files(run, kill_at)
    more = ("--resume", "--overwrite") if resume else ()  # it may have been killed with the model in its place
    where = (str(place / "dense"), "--data", str(place / "text.jsonl"), "--output", str(run / "moe"))
    status = cli.main(["convert", *where, *_OPTIONS, *more])
    (place / "operations").write_text(str(count[0]))
    return status


def _fork(call: Callable[[], int], output: Path) -> int:
    """The process that makes the call; what it prints goes into the file."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with output.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = call()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, seconds: float | None = None) -> int | None:
    """Its exit status, a signal's number negative; None if it still runs after ``seconds``."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            return None
        time.sleep(0.001)


def _finish(call: Callable[[], int], output: Path) -> int:
    status = _wait(_fork(call, output))
    assert status is not None
    return status


def _hashes(folder: Path) -> dict[str, str]:
    """Of a model; what a killed write had prepared beside it stays there, and no program reads it."""
    files = (path for path in folder.rglob("*") if path.is_file() and TEMPORARY not in str(path))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _log(run: Path) -> list[dict[str, float]]:
    paths = (run / "moe.run" / "log.jsonl", run / "moe.run" / "finetune" / "log.jsonl")
    return [{k: v for k, v in row.items() if k != "seconds"} for path in paths if path.is_file() for row in read_log(path)]


def _loads(folder: Path) -> bool:
    try:
        dk.load(folder)
    except (ValueError, OSError):
        return False
    return True


def _whole(run: Path, wanted: dict[str, str]) -> int:
    """After a kill: 0, or 1 if there is something that is accepted and wrong."""
    output = run / "moe"
    if output.exists() and _loads(output):
        found = _hashes(output)
        if found != wanted:
            print(f"{output} loads and is another model: {sorted(set(found.items()) ^ set(wanted.items()))}")
            return 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that one is broken, and the one before it used
        for folder in {path.parent for path in run.rglob("step-*.pt")}:
            newest_checkpoint(folder)
    return 0


def _reached(run: Path) -> str:
    """Where the kill came."""
    folder = run / "moe.run"
    if (run / "moe").exists():
        return "saved"
    for name, words in (("finetune/log.jsonl", "finetune"), ("log.jsonl", "align")):
        if (folder / name).exists():
            return f"{words}, {len((folder / name).read_text().splitlines())} steps in the log"
    layers = sorted((folder / "reconstruct").glob("layer-*"))
    if layers:
        return f"reconstruct, {len(layers)} layers done"
    index = next(iter((folder / "tokens").glob("*/index.json")), None)
    if index is None:
        return "before the token ids"
    return "token ids" if json.loads(index.read_text())["complete"] is False else "token ids done"


def soak(place: Path, kills: int, seed: int) -> dict[str, Any]:
    """The result; ``wrong`` says what was."""
    draw, output = random.Random(seed), place / "output.txt"
    if _finish(lambda: _prepare(place), output):
        raise RuntimeError(output.read_text())
    undisturbed = place / "undisturbed"
    undisturbed.mkdir()
    begin = time.monotonic()
    if _finish(lambda: _convert(place, undisturbed, False), output):
        raise RuntimeError(output.read_text())
    seconds, operations = time.monotonic() - begin, int((place / "operations").read_text())
    model, log = _hashes(undisturbed / "moe"), _log(undisturbed)
    moments: list[dict[str, Any]] = []
    wrong: list[str] = []
    rounds = 0
    while len(moments) < kills:
        rounds += 1
        run, inside, status = place / f"round-{rounds:03d}", 0, None
        run.mkdir()
        while status is None:
            moment: dict[str, Any] = {}
            if inside < _A_ROUND and len(moments) < kills:
                by_time = len(moments) % 2 == 1
                moment = {"seconds": draw.uniform(0, seconds)} if by_time else {"operation": draw.randint(1, operations)}
            pid = _fork(lambda: _convert(place, run, inside > 0, moment.get("operation")), output)  # noqa: B023
            status = _wait(pid, moment.get("seconds"))
            if status is None:
                os.kill(pid, signal.SIGKILL)
                status = _wait(pid)
            if status == -signal.SIGKILL:
                status, inside = None, inside + 1
                moments.append({"round": rounds, **moment, "reached": _reached(run)})
                if _finish(lambda: _whole(run, model), output):  # noqa: B023
                    wrong.append(f"round {rounds}, kill {inside}: what is left is accepted and wrong")
        if status:
            wrong.append(f"round {rounds}: the run that was resumed ended with {status}")
        elif other := sorted({name for name, _ in set(_hashes(run / "moe").items()) ^ set(model.items())}):
            wrong.append(f"round {rounds}: another model in {', '.join(other)}")
        elif _log(run) != log:
            wrong.append(f"round {rounds}: another log")
    said = {"seconds": seconds, "operations": operations}  # of the undisturbed run
    result = {
        "kills": len(moments),
        "rounds": rounds,
        "seed": seed,
        "undisturbed": said,
        "options": list(_OPTIONS),
        "wrong": wrong,
        "moments": moments,
    }
    return {**result, "output": output.read_text().splitlines()[-30:]} if wrong else result


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=30, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="(default: bench/results/soak/<date>-<commit>.json)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a fork has no threads but the one that forked
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        result = soak(Path(place), args.kills, args.seed)
    name = f"{datetime.date.today().isoformat()}-{machine.commit()}.json"
    path = args.out or machine.RESULTS / "soak" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine.machine_name(), "commit": machine.commit(), **result}, indent=1) + "\n")
    print(f"{result['kills']} kills in {result['rounds']} rounds, {len(result['wrong'])} wrong: {path}")
    for line in result["wrong"]:
        print(line, file=sys.stderr)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
