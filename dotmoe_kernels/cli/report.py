"""`dotmoe report`: one self-contained HTML page of a converted model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from .._checks import require
from .._files import write_file
from .inputs import DATA, converted_config, find_device, find_tokenizer, named, reading, require_model_folder, require_vocabulary


def _target(args: argparse.Namespace) -> Path:
    """The page: beside DIR under its name, unless told otherwise."""
    folder = Path(args.model).expanduser().resolve()
    path = folder.with_name(folder.name + ".html") if args.output is None else Path(args.output).expanduser()
    require(not path.is_dir(), "--output", f"{path}, a folder", "a file that can be written")
    require(args.overwrite or not path.exists(), "--output", f"{path}, which exists", "a new file, or --overwrite")
    writable = path.parent.is_dir() and os.access(path.parent, os.W_OK | os.X_OK)
    require(writable, "--output", f"{path}, and {path.parent} cannot be written to", "a file that can be written")
    return path


def _run_folder(args: argparse.Namespace) -> Path | None:
    """The one that is named, or else the one that convert left beside DIR."""
    if args.run_folder is not None:
        folder = Path(args.run_folder).expanduser()
        require(folder.is_dir(), "--run-folder", f"{folder}, which is no folder", "the folder of a run, such as DIR.run")
        there = any((folder / part).exists() for part in ("log.jsonl", "checkpoints", "finetune"))
        require(there, "--run-folder", f"{folder}, without log.jsonl or checkpoints", "the folder of a run, such as DIR.run")
        return folder
    model = Path(args.model).expanduser().resolve()
    beside = model.with_name(model.name + ".run")
    return beside if beside.is_dir() else None


def run_report(args: argparse.Namespace) -> int:
    require(args.batch_size >= 1, "--batch-size", args.batch_size, "at least 1")
    require(args.sequence_length >= 2, "--sequence-length", args.sequence_length, "at least 2")
    require_model_folder(args.model)
    path, run = _target(args), _run_folder(args)
    device = find_device(args.device)
    import torch

    from ..conversion import load_tokens
    from ..conversion.figures import require_matplotlib
    from ..conversion.report import write_report
    from ..models.layerwise import converted_layers

    require_matplotlib()
    config, folder = converted_config(args.model), Path(args.model).expanduser()
    with reading(args.model):
        layers = converted_layers(folder, config, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device)
    tokens = None
    if args.data:
        tokenizer = find_tokenizer(args)
        with named(**DATA):
            tokens = load_tokens(
                args.data,
                tokenizer,
                sequence_length=args.sequence_length,
                max_tokens=args.max_tokens,
                text_field=args.text_field,
            )
        require_vocabulary(tokens, config.get_text_config().vocab_size, args)
    page = write_report(folder, layers, tokens=tokens, run_folder=run, batch_size=args.batch_size)
    write_file(path, lambda file: file.write(page.encode()))
    print(f"report: {path}")
    return 0
