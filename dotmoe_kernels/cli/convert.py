"""`dotmoe convert`: a recipe and flags into options, the stages one after the other, figures and checks, the folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .._checks import require
from ..alignment.config import SOFT_OPTIONS, AlignmentConfig
from ..conversion.recipes import Recipe, load_recipe
from .ending import failed, save_and_report
from .folders import clear_run, convert_folders, forget_tokens, has_checkpoints, note_tokens, token_folder
from .inputs import (
    DATA,
    find_device,
    find_tokenizer,
    joined_ranks,
    named,
    reading,
    require_model_folder,
    require_seed,
    require_vocabulary,
)
from .jobs import ALONE, Parts, Whole
from .parser import SEQUENCE_LENGTH, STAGES
from .signals import stop_on_sigterm
from .untrained import is_untrained, run_untrained

if TYPE_CHECKING:
    from pathlib import Path

    from ..alignment.ranks import Ranks
    from ..alignment.stopping import Stop
    from ..conversion.finetuning import FinetuneConfig

_HELD_OUT = 64  # most sequences that are kept back to measure on
_PAIRS = (("expert_size", "num_experts"), ("active_fraction", "top_k"))  # one of a pair gives the other
_TOPOLOGY = (*_PAIRS[0], *_PAIRS[1], "router")
_BOTH, _LOSSES = "reconstruct or align", "align or finetune"
_OF_STAGE = {  # flags that no other stage reads
    "reconstruct": ("reconstruct_steps",),
    "align": ("steps", "hidden", "budget_lr"),
    _LOSSES: ("activation_checkpointing",),
    "finetune": ("finetune_steps", "finetune_lr", "finetune_router_lr", "lora_rank", "zero_experts", "teacher", "no_teacher"),
    _BOTH: (
        *("method", "init", "shared", "centre", "affinity_lr", "router_lr", "tau_start", "tau_end", "refresh_every"),
        *("router_temperature_start", "router_temperature_end", "threshold", "cap"),
    ),
}

_OF_DOT = ("init", "affinity_lr", "tau_start", "tau_end", "refresh_every")  # flags that no other method reads


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _option_names(args: argparse.Namespace, recipe: Recipe) -> dict[str, str]:
    """What errors call an argument: its flag, the flag of the pair that gives it, or the recipe where that alone says it."""
    names = {f.name: _flag(f.name) for f in dataclasses.fields(AlignmentConfig) if hasattr(args, f.name)}
    names |= DATA | {"gpus": "--gpus"} | {name: _flag(name) for name in (*_TOPOLOGY, "reconstruct_steps")}
    partner = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}
    said = recipe.alignment.keys() | recipe.topology.keys()
    for name in names.keys() - DATA.keys():
        other = partner.get(name, name)
        if getattr(args, name) is not None:
            continue
        if getattr(args, other) is not None:
            names[name] = f"{name} of {_flag(other)}"
        elif {name, other} & said:
            names[name] = f"{name} in recipe {args.recipe}"
    return names


def _fill_in(args: argparse.Namespace, recipe: Recipe) -> tuple[AlignmentConfig, dict[str, Any]]:
    """The training options and the topology of convert: a flag goes before the recipe, and that before the default."""
    flags = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(AlignmentConfig)}
    options = AlignmentConfig(**(recipe.alignment | {name: value for name, value in flags.items() if value is not None}))
    topology = recipe.topology
    for names in (*_PAIRS, ("router",)):
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if given:
            topology = {name: value for name, value in topology.items() if name not in names} | given
    args.dtype, args.seed = args.dtype or recipe.dtype, options.seed
    if args.sequence_length is None:
        args.sequence_length = recipe.sequence_length or SEQUENCE_LENGTH
    return options, topology


def _dry_run(
    args: argparse.Namespace, recipe: Recipe, options: AlignmentConfig, topology: dict[str, Any], stages: list[str]
) -> int:
    if args.model is not None:
        require_model_folder(args.model, weights=False, gguf=True)
    import torch

    from ..conversion import DotMoeConfig
    from ..conversion.dryrun import dense_config, predict_run, run_lines

    tuning = _finetune_options(args, options) if "finetune" in stages else None
    with reading(args.model or recipe.model or ""):
        if _is_tuning_alone(args, stages):
            _refuse_topology(args)
            sparse = DotMoeConfig.from_pretrained(args.model)
            dense = sparse.dense_config
            itself = bool(args.zero_experts) or not sparse.finetune_runs
        else:
            dense, itself = dense_config(args.model, recipe), True
            require(stages != ["finetune"], "--stage", *ALONE)
            sparse = DotMoeConfig.for_dense(dense.get_text_config(), **topology)
        report = predict_run(
            dense,
            sparse,
            options,
            sequence_length=args.sequence_length,
            dtype=getattr(torch, args.dtype) if args.dtype else None,
            learned=args.method == "dot",
            stages=stages,
            tuning=tuning,
            gpus=args.gpus,
            activation_checkpointing=bool(args.activation_checkpointing),
            teacher="another" if args.teacher else "itself" if itself and not args.no_teacher else None,
            **({} if args.reconstruct_steps is None else {"reconstruct_steps": args.reconstruct_steps}),
        )
    if args.json:
        print(json.dumps({"model": args.model or recipe.model, "recipe": args.recipe, **report}, indent=2))
        return 0
    if recipe.description:
        print(f"{args.recipe}: {recipe.description}")
    for line in run_lines(report):
        print(line)
    return 0


def _stages(args: argparse.Namespace) -> list[str]:
    """The stages in their order; a flag of a stage that is not among them is refused."""
    given = [name for part in args.stage or ["align"] for name in part.split(",")]
    for name in given:
        require(name in STAGES, "--stage", repr(name), ", ".join(STAGES))
    stages = [name for name in STAGES if name in given]
    for stage, flags in _OF_STAGE.items():
        read = not set(stages).isdisjoint(stage.split(" or "))
        for flag in flags:
            value = getattr(args, flag)
            require(value is None or read, _flag(flag), value, f"together with --stage {stage}")
    args.method = args.method or "dot"
    return stages


def _refuse_unread(args: argparse.Namespace, recipe: Recipe, router: str) -> None:
    """Options that this router, or this method, does not read. A recipe's for its soft router may lie idle beside --router top_k,
    and those for dot beside another method, but for what dot starts from: the partitions are methods of the same names."""
    for name in SOFT_OPTIONS:
        said = recipe.alignment.get(name) if recipe.topology.get("router") != "soft" else None
        value = said if getattr(args, name) is None else getattr(args, name)
        require(value is None or router == "soft", name, value, "together with --router soft")
    for name in _OF_DOT:
        value = getattr(args, name)
        if value is None and name == "init":
            value = recipe.alignment.get(name)
        require(value is None or args.method == "dot", name, value, "together with --method dot")
    if args.shared is not None:
        start = args.init or recipe.alignment.get("init", AlignmentConfig.init) if args.method == "dot" else args.method
        require(start in ("auto", "shared"), "shared", args.shared, "together with --init shared or --method shared")


def _finetune_options(args: argparse.Namespace, options: AlignmentConfig) -> FinetuneConfig:
    from ..conversion.finetuning import FinetuneConfig

    shared = ("batch_size", "micro_batch_size", "clip", "z", "balance", "seed", "checkpoint_every")
    fields = {name: getattr(options, name) for name in shared}
    flags = {"steps": args.finetune_steps, "lr": args.finetune_lr, "router_lr": args.finetune_router_lr}
    flags |= {"lora_rank": args.lora_rank, "zero_experts": args.zero_experts}
    names = {"steps": "--finetune-steps", "lr": "--finetune-lr", "router_lr": "--finetune-router-lr"}
    with named(**names, lora_rank="--lora-rank", zero_experts="--zero-experts"):
        return FinetuneConfig(**fields, **{name: value for name, value in flags.items() if value is not None})


def _is_tuning_alone(args: argparse.Namespace, stages: list[str]) -> bool:
    """Whether it is the fine-tuning of a converted MODEL."""
    from ..models.inspect import is_converted

    return stages == ["finetune"] and args.model is not None and is_converted(args.model)


def _refuse_topology(args: argparse.Namespace) -> None:
    for name in _TOPOLOGY:
        value = getattr(args, name)
        require(value is None, _flag(name), value, "none: MODEL is converted already")


def _check_teacher(args: argparse.Namespace, tokenizer: Any) -> None:
    """What would be refused of --teacher once its weights are read, before anything is trained."""
    from ..conversion.sources import read_tokenizer

    if args.teacher is None:
        return
    with named(MODEL="--teacher"):
        require_model_folder(args.teacher, gguf=True)
    try:
        theirs = read_tokenizer(args.teacher)
    except ValueError:  # it has none; the vocabularies' sizes are compared in any case
        return
    same = theirs.get_vocab() == tokenizer.get_vocab()
    require(same, "--teacher", f"{args.teacher}, of another tokenizer", "a model of the same tokens")


def _teacher(args: argparse.Namespace, model: Any) -> Any:
    """Of the fine-tuning: that of --teacher, else ``model`` while the dense model is in it, or before it gets zero experts."""
    runs = [] if args.zero_experts else model.config.finetune_runs
    if args.teacher is None and not args.no_teacher and runs:
        print("teacher: none, since MODEL was fine-tuned before: its weights are no longer the dense model's; --teacher names one")
    return None if args.no_teacher else args.teacher or (None if runs else model)


def _read_data(args: argparse.Namespace, tokenizer: Any, vocabulary: int, run: Path) -> tuple[Any, Any]:
    """Sequences to train on and to measure on."""
    from ..conversion import load_tokens

    note_tokens(args, run)
    tokens = load_tokens(
        args.data,
        tokenizer,
        sequence_length=args.sequence_length,
        max_tokens=args.max_tokens,
        text_field=args.text_field,
        seed=args.seed,
        cache=token_folder(args, run),
        progress=not args.no_progress,
    )
    require(
        len(tokens) >= 2,
        "--data",
        f"{tokens.numel()} tokens",
        f"at least two sequences of {args.sequence_length}, one to train and one to measure on",
    )
    require_vocabulary(tokens, vocabulary, args)
    keep = min(max(len(tokens) // 20, 1), _HELD_OUT)
    print(f"data: {tokens[:-keep].numel():,} tokens to train on, {tokens[-keep:].numel():,} held out (the end of the data)")
    return tokens[:-keep], tokens[-keep:].long()


def run_convert(args: argparse.Namespace) -> int:
    """The stages on a dense MODEL, or the fine-tuning of a converted one."""
    with named(recipe="--recipe"):
        recipe = Recipe("") if args.recipe is None else load_recipe(args.recipe)
    names = _option_names(args, recipe)
    with named(**names), warnings.catch_warnings(), stop_on_sigterm() as stop:
        warnings.filterwarnings("ignore", message=".*leave experts without a token")  # said of the held-out text, at the end
        options, topology = _fill_in(args, recipe)
        require_seed(args.seed, names["seed"])
        for name, least in (("sequence_length", 2), ("reconstruct_steps", 0)):
            value = getattr(args, name)
            require(value is None or value >= least, _flag(name), value, f"at least {least}")
        try:
            return _run(args, recipe, options, topology, stop)
        except (ValueError, ImportError):
            forget_tokens(args)
            raise


def _run(args: argparse.Namespace, recipe: Recipe, options: AlignmentConfig, topology: dict[str, Any], stop: Stop) -> int:
    stages = _stages(args)
    _refuse_unread(args, recipe, topology.get("router", "top_k"))
    if args.dry_run:
        return _dry_run(args, recipe, options, topology, stages)
    require(not args.json, "--json", "given", "together with --dry-run")
    require(args.gpus is None, "--gpus", args.gpus, "together with --dry-run; a run gets its GPUs from torchrun --nproc-per-node")
    args.model = args.model or recipe.model
    untrained = is_untrained(args, options, stages)
    missing = [name for name, value in (("MODEL", args.model), ("--data", args.data), ("--output", args.output)) if not value]
    if missing and not untrained:
        raise ValueError(f"the following arguments are required: {', '.join(missing)}")
    with joined_ranks(args) as ranks:
        require(not args.shard or ranks.grouped, "--shard", "given", "under torchrun, whose processes share the weights")
        if untrained:
            return ranks.once(lambda: run_untrained(args, options, topology, convert_folders(args)[0]))
        return _train(args, options, topology, stages, stop, ranks)


def _train(
    args: argparse.Namespace,
    options: AlignmentConfig,
    topology: dict[str, Any],
    stages: list[str],
    stop: Stop,
    ranks: Ranks,
) -> int:
    output, run = ranks.once(lambda: convert_folders(args))
    ranks.require_passes(options.batch_size, options.micro_batch_size)
    require_model_folder(args.model, gguf=True)
    device = find_device(args.device)
    import torch

    from ..conversion import DotMoeConfig
    from ..conversion.adapters import require_lora
    from ..evaluation import collect_load, perplexity

    tuning = _finetune_options(args, options) if "finetune" in stages else None
    if tuning is not None and tuning.lora_rank:
        with named(lora_rank="--lora-rank"):
            require_lora()
    started_sparse = _is_tuning_alone(args, stages)
    if started_sparse:
        _refuse_topology(args)
    job: Any = Parts(args, stages, run, ranks, started_sparse) if args.shard else Whole(args, stages, device, started_sparse)
    text = job.model.config.get_text_config()
    config = None if started_sparse else DotMoeConfig.for_dense(text, **topology)
    tokenizer = find_tokenizer(args)
    _check_teacher(args, tokenizer)
    train, held = ranks.in_turn(lambda: _read_data(args, tokenizer, text.vocab_size, run))
    figures: dict[str, Any] = {"base_model": args.model, "data": " ".join(args.data), "held-out tokens": held.numel()}
    rerun: dict[str, Any] = {"resume": args.resume, "progress": not args.no_progress, "stop": stop}
    rerun["activation_checkpointing"] = bool(args.activation_checkpointing)
    dense_perplexity, dense_logits = None, None
    if config is not None:
        measured = job.measured()
        dense_perplexity = figures["dense perplexity"] = perplexity(measured, held, batch_size=1)
        with torch.no_grad():
            dense_logits = measured(input_ids=held[:1].to(job.device), use_cache=False).logits.cpu()  # until after the training
        del measured
    if args.overwrite and not args.resume:
        ranks.once(lambda: clear_run(run, logs=True))
    if args.resume and not ranks.once(lambda: has_checkpoints(run, stages)):
        print(f"dotmoe convert: --resume: nothing to resume in {run}, the run starts anew", file=sys.stderr)
    if config is not None:
        job.convert(
            config,
            method=args.method,
            data=train,
            alignment=options,
            stages=[stage for stage in stages if stage != "finetune"],
            **({} if args.reconstruct_steps is None else {"reconstruct_steps": args.reconstruct_steps}),
            folder=run,
            **rerun,
        )
    if tuning is not None:
        if dense_logits is not None:  # afterwards every expert on is another model than the dense one
            checks = job.check(dense_logits, held[:1])
            if not checks["passed"]:
                return failed(checks)
        with named(teacher="--teacher", zero_experts="--zero-experts"):
            rerun |= {"teacher": _teacher(args, job.model), "held_out": held, "folder": run / "finetune"}
            job.finetune(train, tuning, **rerun)
        dense_logits = None
    if not ranks.first and not args.shard:  # what is left to do is for one
        return 0
    measured = job.measured()
    with collect_load(measured) as counts:
        value = perplexity(measured, held, batch_size=1)
    del measured
    dense = (dense_perplexity, dense_logits)
    return save_and_report(args, job, tokenizer, held, figures, dense, (value, counts), output, run, ranks)
