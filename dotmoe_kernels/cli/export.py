"""`dotmoe export`: a converted model as a stock or the dense architecture, and the figures of what that changed."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._checks import require
from .inputs import DATA, converted_config, find_device, find_tokenizer, named, reading, require_vocabulary
from .parser import EXPORT_LENGTH

_TOKENS = 4096  # where --max-tokens does not say it


def _tokens(args: argparse.Namespace, vocabulary: int) -> Any:
    """Tokens of --data, or None."""
    if args.data is None:
        for name, flag in (*((key, DATA[key]) for key in ("sequence_length", "max_tokens")), ("tokenizer", "--tokenizer")):
            require(getattr(args, name) is None, flag, getattr(args, name), "together with --data")
        return None
    from ..conversion import load_tokens

    length = EXPORT_LENGTH if args.sequence_length is None else args.sequence_length
    require(length >= 2, "--sequence-length", length, "at least 2")
    tokenizer = find_tokenizer(args)
    with named(**DATA):
        tokens = load_tokens(
            args.data,
            tokenizer,
            sequence_length=length,
            max_tokens=max(_TOKENS, length) if args.max_tokens is None else args.max_tokens,
            text_field=args.text_field,
        )
    require_vocabulary(tokens, vocabulary, args)
    return tokens


def run_export(args: argparse.Namespace) -> int:
    require(args.architecture != "dense" or args.data is None, "--data", args.data, "none with --architecture dense")
    vocabulary = converted_config(args.model).get_text_config().vocab_size
    device = find_device(args.device)
    data = _tokens(args, vocabulary)
    import torch

    from ..exports import export, report_lines

    names = {"out": "--output", "top_k": "--top-k", "architecture": "--architecture", "data": "--data"}
    with reading(args.model), named(**names):
        report = export(
            args.model,
            args.output,
            args.architecture,
            args.overwrite,
            top_k=args.top_k,
            data=data,
            max_shard_size=args.max_shard_size,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            device=device,
        )
    if args.json:
        print(json.dumps({"model": args.model, "output": args.output, **report}, indent=2))
        return 0
    print(f"{args.model} -> {args.output}")
    if args.architecture == "dense":
        print("architecture: dense, the model before its conversion")
        return 0
    for name, value in report_lines(report):
        print(f"  {name}: {value}")
    return 0
