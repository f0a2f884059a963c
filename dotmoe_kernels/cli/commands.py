"""What the commands of `dotmoe` do. Each returns the exit status; torch and transformers are imported once a command needs them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .._checks import require, require_range
from ..alignment.config import AlignmentConfig
from ..conversion.recipes import Recipe, load_recipe
from .parser import SEQUENCE_LENGTH

_HELD_OUT = 64  # most sequences that convert keeps back to measure on


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    known = name == "cpu" or (kind == "cuda" and (name == kind or number.isdecimal()))
    require(known, "--device", repr(name), "auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    allowed = f"cpu, or cuda:N with N below {count}" if count else "cpu: this machine has no usable GPU"
    require(name == "cpu" or int(number or 0) < count, "--device", repr(name), allowed)
    return name


def _tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read ({str(error).splitlines()[0]})") from None


def _require_model_folder(name: str, *, weights: bool = True) -> None:
    """A local folder must hold a config, and weights unless told otherwise; another name is left to transformers."""
    path = Path(name).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), "MODEL", f"{name}, without config.json", "a Hugging Face model folder")
        files = [f for pattern in ("*.safetensors", "*.bin", "*.index.json") for f in path.glob(pattern)]
        require(bool(files) or not weights, "MODEL", f"{name}, without weights", "a folder with safetensors files")
    else:
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, "MODEL", f"{name}, which is no folder", "a Hugging Face model folder, or a name")


def _demo(args: argparse.Namespace) -> int:
    folder = Path(args.output)
    require(args.overwrite or not folder.exists(), "--output", f"{folder}, which exists", "a new folder, or --overwrite")
    ours = (folder / "demo.json").is_file() or (folder / "dense").is_dir()
    known = not folder.exists() or ours or (folder.is_dir() and not any(folder.iterdir()))
    require(known, "--output", f"{folder}, which holds something else than a demo", "a new folder")
    from ..conversion.demo import run_demo

    run_demo(
        folder,
        data=args.data,
        router=args.router,
        quick=args.quick,
        seed=args.seed,
        overwrite=args.overwrite,
        progress=sys.stderr.isatty(),
    )
    return 0


def _fill_in(args: argparse.Namespace) -> tuple[Recipe, AlignmentConfig, dict[str, Any]]:
    """The recipe, the training options and the topology of convert: a flag goes before the recipe, and that before the default."""
    recipe = Recipe("") if args.recipe is None else load_recipe(args.recipe)
    flags = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(AlignmentConfig)}
    options = AlignmentConfig(**(recipe.alignment | {name: value for name, value in flags.items() if value is not None}))
    topology = recipe.topology
    for names in (("expert_size", "num_experts"), ("active_fraction", "top_k"), ("router",)):  # one of a pair replaces the other
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if given:
            topology = {name: value for name, value in topology.items() if name not in names} | given
    args.dtype, args.seed = args.dtype or recipe.dtype, options.seed
    if args.sequence_length is None:
        args.sequence_length = recipe.sequence_length or SEQUENCE_LENGTH
    return recipe, options, topology


def _dry_run(args: argparse.Namespace, recipe: Recipe, options: AlignmentConfig, topology: dict[str, Any]) -> int:
    require(args.sequence_length >= 2, "--sequence-length", args.sequence_length, "at least 2")
    if args.model is not None:
        _require_model_folder(args.model, weights=False)
    import torch

    from ..conversion import DotMoeConfig
    from ..conversion.dryrun import dense_config, predict_run, run_lines

    dense = dense_config(args.model, recipe)
    report = predict_run(
        dense,
        DotMoeConfig.for_dense(dense.get_text_config(), **topology),
        options,
        sequence_length=args.sequence_length,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        learned=args.method == "dot",
    )
    if args.json:
        print(json.dumps({"model": args.model or recipe.model, "recipe": args.recipe, **report}, indent=2))
        return 0
    if recipe.description:
        print(f"{args.recipe}: {recipe.description}")
    for line in run_lines(report):
        print(line)
    return 0


def _convert(args: argparse.Namespace) -> int:
    recipe, options, topology = _fill_in(args)
    if args.dry_run:
        return _dry_run(args, recipe, options, topology)
    require(not args.json, "--json", "given", "together with --dry-run")
    args.model = args.model or recipe.model
    missing = [name for name, value in (("MODEL", args.model), ("--data", args.data), ("--output", args.output)) if not value]
    if missing:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    output = Path(args.output).expanduser()
    run = output.with_name(output.name + ".run")
    require(args.overwrite or not output.exists(), "--output", f"{output}, which exists", "a new folder, or --overwrite")
    source = Path(args.model).expanduser().resolve()
    inside = source.is_dir() and output.resolve() in (source, *source.parents)
    require(not inside, "--output", f"{output}, which would replace MODEL", "another folder")
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    require(writable, "--output", f"{output}, and {parent} cannot be written to", "a folder that can be made")
    replaceable = not output.exists() or (output.is_dir() and ((output / "config.json").is_file() or not any(output.iterdir())))
    require(
        replaceable, "--output", f"{output}, which holds something else than a model", "a new folder, or one with a config.json"
    )
    started = any((run / "checkpoints").glob("step-*.pt"))
    require(
        args.resume or args.overwrite or not started,
        "--output",
        f"{output}, with an interrupted run in {run}",
        "--resume to continue it, or --overwrite to start anew",
    )
    _require_model_folder(args.model)
    device = _device(args.device)
    import torch
    from transformers import AutoModelForCausalLM

    from ..conversion import DotMoeConfig, check_lines, convert, count_parameters, find_ffns, load_tokens, save, self_check
    from ..evaluation import collect_load, perplexity, retention

    dtype = getattr(torch, args.dtype) if args.dtype else "auto"
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"the weights of {args.model} cannot be read ({error})") from None
    dense, found = loaded
    lacking = sorted(found["missing_keys"])
    require(not lacking, "MODEL", f"{args.model}, without the tensor {', '.join(lacking[:4])}", "a complete causal LM")
    dense = dense.to(device)
    find_ffns(dense)  # a model that cannot be converted ends here, before the data is read
    config = DotMoeConfig.for_dense(dense.config.get_text_config(), **topology)
    tokenizer = _tokenizer(args.model)
    tokens = load_tokens(
        args.data,
        tokenizer,
        sequence_length=args.sequence_length,
        max_tokens=args.max_tokens,
        text_field=args.text_field,
        seed=args.seed,
    )
    require(
        len(tokens) >= 2,
        "--data",
        f"{tokens.numel()} tokens",
        f"at least two sequences of {args.sequence_length}, one to train and one to measure on",
    )
    require_range(tokens, "--data", 0, dense.config.get_text_config().vocab_size - 1)
    keep = min(max(len(tokens) // 20, 1), _HELD_OUT)
    train, held = tokens[:-keep], tokens[-keep:]
    print(f"data: {train.numel():,} tokens to train on, {held.numel():,} held out (the end of the data)")
    dense_perplexity = perplexity(dense, held, batch_size=1)
    with torch.no_grad():
        dense_logits = dense(input_ids=held[:1].to(device), use_cache=False).logits
    if args.overwrite and not args.resume and run.exists():
        shutil.rmtree(run)
    model = convert(
        dense,
        config,
        method=args.method,
        data=train,
        alignment=options,
        folder=run,
        resume=args.resume,
        progress=not args.no_progress,
    )
    with collect_load(model) as counts:
        value = perplexity(model, held, batch_size=1)
    means = counts.mean_active()
    mean = sum(means.values()) / len(means)
    figures = {
        "base_model": args.model,
        "data": " ".join(args.data),
        "held-out tokens": held.numel(),
        "dense perplexity": dense_perplexity,
        "sparse perplexity": value,
        "active experts a token": round(mean, 4),
    }
    save(model, output, tokenizer=tokenizer, overwrite=args.overwrite, card=figures)
    checks = self_check(model, dense_logits, held[:1], folder=output)
    total, active = count_parameters(model, means)
    for line in check_lines(checks):
        print(line)
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%}) at {mean:.2f} experts a token")
    print(
        f"held-out perplexity: dense {dense_perplexity:.3f}, sparse {value:.3f} ({retention(dense_perplexity, value):.1%} retained)"
    )
    if not checks["passed"]:
        print(f"dotmoe convert: error: a self-check failed: {checks}", file=sys.stderr)
        return 1
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    log = run / "log.jsonl"
    print(f"saved: {output}" + (f"; log of the training: {log}" if log.is_file() else "; nothing was trained (--steps 0)"))
    return 0


def _load(args: argparse.Namespace) -> Any:
    import torch

    from ..conversion import load

    device = _device(args.device)
    return load(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device).eval()


def _bars(counts: list[int]) -> str:
    """A histogram in one line: eight heights, a space for nothing; at most 32 columns, neighbours added up."""
    width = -(-len(counts) // 32)
    sums = [sum(counts[n : n + width]) for n in range(0, len(counts), width)]
    return "".join("▁▂▃▄▅▆▇█"[min(8 * v // max(sums), 7)] if v else " " for v in sums)


def _eval(args: argparse.Namespace) -> int:
    from ..conversion import all_experts, count_parameters, load_tokens, moe_blocks
    from ..evaluation import active_summary, collect_load, load_summary, perplexity, retention

    model = _load(args)
    for block in moe_blocks(model).values():
        block.path = args.path
    tokens = load_tokens(
        args.data,
        _tokenizer(args.model),
        sequence_length=args.sequence_length,
        max_tokens=args.max_tokens,
        text_field=args.text_field,
    )
    require_range(tokens, "--data", 0, model.config.get_text_config().vocab_size - 1)
    with all_experts(model):
        dense = perplexity(model, tokens, batch_size=args.batch_size)
    with collect_load(model) as counts:
        sparse = perplexity(model, tokens, batch_size=args.batch_size)
    loads, means = counts(), counts.mean_active()
    mean = sum(means.values()) / len(means)
    total, active = count_parameters(model, means)
    report = {
        "model": args.model,
        "data": args.data,
        "tokens": tokens.numel(),
        "perplexity_dense": dense,
        "perplexity_sparse": sparse,
        "retention": retention(dense, sparse),
        "total_parameters": total,
        "active_parameters": active,
        "path": args.path,
        "router": model.config.router,
        "mean_active_experts": mean,
        "load": {name: {**load_summary(load), "share": load.tolist()} for name, load in loads.items()},
        "active_experts": {name: {**active_summary(n), "tokens": n.tolist()} for name, n in counts.active.items()},
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{args.model} on {tokens.numel():,} tokens")
    print(f"perplexity: dense {dense:.3f}, sparse {sparse:.3f} ({report['retention']:.1%} retained)")
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%}) at {mean:.2f} experts a token")
    print("load of the experts, in multiples of the even share:")
    print(f"  {'layer':<28}{'min':>8}{'median':>8}{'max':>8}{'unused':>8}")
    for name, load in loads.items():
        s = load_summary(load)
        print(f"  {name:<28}{s['min']:>8.2f}{s['median']:>8.2f}{s['max']:>8.2f}{s['unused']:>8d}")
    print("active experts a token:")
    print(f"  {'layer':<28}{'mean':>8}{'min':>8}{'median':>8}{'max':>8}  tokens from min to max")
    for name, tokens_by_count in counts.active.items():
        s = active_summary(tokens_by_count)
        bars = _bars(tokens_by_count.tolist()[int(s["min"]) : int(s["max"]) + 1])
        print(f"  {name:<28}{s['mean']:>8.2f}{s['min']:>8d}{s['median']:>8d}{s['max']:>8d}  {bars}")
    return 0


def _generate(args: argparse.Namespace) -> int:
    require(args.max_new_tokens >= 1, "--max-new-tokens", args.max_new_tokens, "at least 1")
    require(0 <= args.temperature < math.inf, "--temperature", args.temperature, "at least 0")
    import torch

    model = _load(args)
    tokenizer = _tokenizer(args.model)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    require(inputs["input_ids"].numel() > 0, "--prompt", repr(args.prompt), "text of at least one token")
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from ..conversion.inspect import describe, describe_paths

    require(args.paths or not args.dtype, "--dtype", args.dtype, "together with --paths")
    _require_model_folder(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    report = describe_paths(args.model, dtype=dtype) if args.paths else describe(args.model)
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for key, value in report.items():
        if isinstance(value, list):
            print(f"{key}:")
            for row in value:
                print("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
        else:
            print(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items()) if isinstance(value, dict) else value}")
    return 0


COMMANDS = {"demo": _demo, "convert": _convert, "eval": _eval, "generate": _generate, "info": _info}
