"""`dotmoe convert` without text: nothing is trained, and the model goes from folder to folder layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import require
from .inputs import find_tokenizer, named, reading, require_model_folder

if TYPE_CHECKING:
    from ..alignment.config import AlignmentConfig


def is_untrained(args: argparse.Namespace, options: AlignmentConfig, stages: list[str]) -> bool:
    """Whether neither text is given nor a step asked for."""
    return not args.data and options.steps == 0 and stages == ["align"] and bool(args.model and args.output)


def run_untrained(args: argparse.Namespace, options: AlignmentConfig, topology: dict[str, Any], output: Path) -> int:
    require_model_folder(args.model)
    folder = Path(args.model).expanduser()
    require(folder.is_dir(), "MODEL", args.model, "a local folder, without --data")
    require(args.device in ("auto", "cpu"), "--device", args.device, "cpu, without --data")
    import torch

    from ..conversion import DotMoeConfig
    from ..conversion.dryrun import dense_config
    from ..conversion.streaming import convert_folder

    has_tokenizer = args.tokenizer is not None or (folder / "tokenizer_config.json").is_file()
    with named(method="--method", output="--output"), reading(args.model):
        dense = dense_config(args.model, None)
        checks = convert_folder(
            folder,
            output,
            DotMoeConfig.for_dense(dense.get_text_config(), **topology),
            method=args.method,
            alignment=options,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            tokenizer=find_tokenizer(args) if has_tokenizer else None,
            overwrite=args.overwrite,
            card={"base_model": args.model},
        )
    print(
        f"every layer with every expert on: {checks['all_experts_error']:.1e} from its dense FFN, at most {checks['tolerance']:.0e}"
    )
    print(f"saved: {output}; nothing was trained (--steps 0), so that it is not usable as it is")
    return 0
