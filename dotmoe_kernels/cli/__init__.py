"""`dotmoe`: convert, evaluate, generate, time, inspect, plan, report, demonstrate. Wrong arguments end in one line and status 2.

parser.py the arguments, inputs.py what they name, folders.py where they write, signals.py when to stop, jobs.py what convert does
with a whole model or a part, commands.py and the files of single commands what they do
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from safetensors import SafetensorError

from ..alignment.stopping import Stopped
from .commands import COMMANDS
from .inputs import process_rank, require_text
from .parser import build_parser

__all__ = ["build_parser", "main"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, or none left for this user or file
_PATIENCE = 5.0  # seconds
_SMALLER = {
    "convert": "--micro-batch-size or --sequence-length",
    "eval": "--batch-size or --sequence-length",
    "bench": "--batch or --prompt-tokens",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dotmoe`; returns the exit status: 0, also for a training that SIGTERM asked to stop, 1 for a run that failed, 2 for
    wrong arguments, 130 for an interruption."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what its encoding lacks must not end a command whose work is done
        sys.stdout.reconfigure(errors="backslashreplace")
    args = _parse(argv)

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        print(f"dotmoe {args.command}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):  # of other packages, to those who write code
            warnings.filterwarnings("ignore", category=category)
        warnings.showwarning = show
        return _run(args)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Help and errors in the arguments, which are those of all processes, are said by the first of several."""
    parser = build_parser()
    if not process_rank():
        return parser.parse_args(argv)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            return parser.parse_args(argv)
        except SystemExit as end:
            status = end.code
            if status:  # torchrun ends the others once one of them has failed, and the first may not have spoken yet
                signal.signal(signal.SIGTERM, lambda *_: sys.exit(status))
                time.sleep(_PATIENCE)
            raise


def _run(args: argparse.Namespace) -> int:
    try:
        require_text(args)
        from ..conversion.sources import quieten

        quieten()
        status = COMMANDS[args.command](args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader, such as head, has enough; what is still in the buffer must not raise once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except FloatingPointError as error:
        _say(f"dotmoe {args.command}: error: {error}")
        return 1
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which need not be imported here
            less = f" A smaller {_SMALLER[args.command]} takes less." if args.command in _SMALLER else ""
            _say(f"dotmoe {args.command}: error: {' '.join(str(error).split())}{less}")
            return 1
        # the bare class is what tokenizers raises when a file cannot be written
        if type(error) is not Exception and not isinstance(error, ValueError | ImportError | OSError | SafetensorError):
            raise
        line = " ".join(str(error).split())
        full = isinstance(error, OSError) and error.errno in _FULL
        _say(f"dotmoe {args.command}: error: {line}{_hint(args, '; with more room ') if full else ''}")
        return 2
    except Stopped as stop:
        if process_rank() == 0:
            _say(f"dotmoe {args.command}: {stop}{_hint(args)}")
        return 0
    except KeyboardInterrupt:
        _say(f"dotmoe {args.command}: interrupted{_hint(args)}")
        return 130


def _say(line: str) -> None:
    """On stderr. Of several processes the first speaks; torchrun then ends the others, and one that is still here has an error of
    its own."""
    rank = process_rank()
    if rank:
        time.sleep(_PATIENCE)
    print(line if not rank else f"rank {rank}: {line}", file=sys.stderr)


def _hint(args: argparse.Namespace, start: str = "; ") -> str:
    return f"{start}the same command with --resume continues it" if args.command == "convert" else ""
