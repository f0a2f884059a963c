"""`dotmoe bench`: tokens a second of a converted model beside its dense model, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .._checks import refuse, require
from .._files import probe_folder, write_file
from .inputs import converted_config, find_device, named, reading, require_seed

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


def run_bench(args: argparse.Namespace) -> int:
    batches, folder = _batches(args.batch), Path(args.model)
    require_seed(args.seed)
    device = find_device(args.device)
    config = converted_config(args.model)
    import torch

    from ..conversion import load
    from ..conversion.timing import SECTION, check_lengths, measure_speed, speed_lines, speed_section
    from ..models.card import model_card, put_section

    with named(**_NAMES):  # before the weights are read
        check_lengths(config, args.prompt_tokens, args.new_tokens, batches, args.rounds)
    if args.card:  # before minutes are spent
        _card(folder)
        probe_folder(folder, file=True)
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
