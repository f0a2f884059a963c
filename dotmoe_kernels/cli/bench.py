"""`dotmoe bench`: tokens a second of a converted model beside its dense model, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .._checks import refuse, require
from .._files import probe_folder, write_file
from .inputs import find_device, named, reading, require_model_folder, require_seed

_NAMES = {
    "prompt_tokens": "--prompt-tokens",
    "new_tokens": "--new-tokens",
    "batches": "--batch",
    "rounds": "--rounds",
}


def _batches(text: str) -> list[int]:
    """Of "1,8": each once, in the order given."""
    try:
        found = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = [0]
    if min(found) < 1:
        refuse("--batch", repr(text), "integers of at least 1 with commas between them, such as 1,8")
    return found


def _card(folder: Path) -> str | None:
    """README.md as it is; None where there is none."""
    path = folder / "README.md"
    require(not path.is_dir(), "--card", f"given with {path}, a folder", "a file that can be written")
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except UnicodeDecodeError:
        refuse("--card", f"given with {path}, which is not in UTF-8", "text that a section can be added to")


def _require_card(folder: Path) -> None:
    """Before minutes are spent: there is a folder, and it can be written."""
    require(folder.is_dir(), "--card", f"given with {folder}, which is no folder", "a MODEL in a local folder")
    _card(folder)
    probe_folder(folder, file=True)


def run_bench(args: argparse.Namespace) -> int:
    batches = _batches(args.batch)
    for name in ("prompt_tokens", "new_tokens", "rounds"):
        require(getattr(args, name) >= 1, _NAMES[name], getattr(args, name), "an integer of at least 1")
    require_seed(args.seed)
    require_model_folder(args.model)
    from ..models.inspect import is_converted, model_type

    dense = model_type(args.model) is not None and not is_converted(args.model)
    require(not dense, "MODEL", f"{args.model}, which is not converted", "a converted model; its dense model is restored from it")
    folder = Path(args.model).expanduser()
    if args.card:
        _require_card(folder)
    device = find_device(args.device)
    import torch

    from ..conversion import load
    from ..conversion.timing import SECTION, measure_speed, speed_lines, speed_section
    from ..models.card import model_card, put_section

    with reading(args.model):
        model = load(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device).eval()
    shown = sys.stderr.isatty()
    with named(**_NAMES):
        report = measure_speed(
            model,
            prompt_tokens=args.prompt_tokens,
            new_tokens=args.new_tokens,
            batches=batches,
            rounds=args.rounds,
            seed=args.seed,
            progress=lambda line: print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True) if shown else None,
        )
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(json.dumps({"model": args.model, **report}, indent=2) if args.json else "\n".join([args.model, *speed_lines(report)]))
    if args.card:
        text = _card(folder)
        before = model_card(model, folder.resolve().name, {}) if text is None else text
        after = put_section(before, SECTION, speed_section(report))
        write_file(folder / "README.md", lambda file: file.write(after.encode()))
    return 0
