"""What the commands of `dotmoe` do. Each returns the exit status; torch and transformers are imported once a command needs them."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import Any

from .._checks import require
from .bench import run_bench
from .convert import run_convert
from .export import run_export
from .folders import demo_folder
from .inputs import DATA, find_device, find_tokenizer, named, reading, require_model_folder, require_seed, require_vocabulary
from .parser import EVAL_LENGTH
from .plan import run_plan
from .report import run_report
from .tasks import measure_tasks, require_tasks, task_lines


def _demo(args: argparse.Namespace) -> int:
    folder = demo_folder(args)
    require_seed(args.seed)
    from ..conversion.demo import run_demo

    with named(**DATA):
        run_demo(
            folder,
            data=args.data,
            text_field=args.text_field,
            router=args.router,
            quick=args.quick,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=sys.stderr.isatty(),
        )
    return 0


def _load(args: argparse.Namespace) -> Any:
    import torch

    from ..conversion import load

    device = find_device(args.device)
    with reading(args.model):
        return load(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device).eval()


def _bars(counts: list[int]) -> str:
    """A histogram in one line: eight heights, a space for nothing; at most 32 columns, neighbours added up."""
    heights = "▁▂▃▄▅▆▇█"
    try:
        heights.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        heights = ".:-=+*#@"
    width = -(-len(counts) // 32)
    sums = [sum(counts[n : n + width]) for n in range(0, len(counts), width)]
    return "".join(heights[min(8 * v // max(sums), 7)] if v else " " for v in sums)


def _read_tokens(args: argparse.Namespace, model: Any) -> Any:
    from ..conversion import load_tokens

    tokenizer = find_tokenizer(args)
    with named(**DATA):
        tokens = load_tokens(
            args.data,
            tokenizer,
            sequence_length=EVAL_LENGTH if args.sequence_length is None else args.sequence_length,
            max_tokens=args.max_tokens,
            text_field=args.text_field,
        )
    require_vocabulary(tokens, model.config.get_text_config().vocab_size, args)
    return tokens


def _eval(args: argparse.Namespace) -> int:
    from ..models.inspect import is_converted, model_type

    require(args.batch_size >= 1, "--batch-size", args.batch_size, "at least 1")
    if args.data is None:
        require(args.tasks is not None, "--data", "not given", "text to measure on, or --tasks")
        for name in ("sequence_length", "max_tokens"):
            require(getattr(args, name) is None, DATA[name], getattr(args, name), "together with --data")
    length = EVAL_LENGTH if args.sequence_length is None else args.sequence_length
    require(length >= 2, "--sequence-length", length, "at least 2")
    if args.tasks is not None:
        require_model_folder(args.model)
    tasks = require_tasks(args)
    if model_type(args.model) is not None and not is_converted(args.model):
        return _eval_dense(args, tasks)
    return _eval_converted(args, tasks)


def _eval_tasks_alone(args: argparse.Namespace, kind: str, tasks: Any, model: Any) -> int:
    report = {"model": args.model, "kind": kind, **measure_tasks(args, tasks, model)}
    lines = [f"{args.model}: a {'dense' if kind == 'dense' else 'converted'} model", *task_lines(report)]
    print(json.dumps(report, indent=2) if args.json else "\n".join(lines))
    return 0


def _eval_dense(args: argparse.Namespace, tasks: Any) -> int:
    """Of any dense causal LM, whether it could be converted or not."""
    require(args.path is None, "--path", args.path, "none: MODEL is dense, and has no experts")
    import torch

    from ..conversion.sources import read_dense
    from ..evaluation import perplexity
    from ..models.surgery import refuse_sparse

    require_model_folder(args.model)
    device = find_device(args.device)
    with reading(args.model):
        model: Any = read_dense(args.model, getattr(torch, args.dtype) if args.dtype else "auto")
        refuse_sparse(model)
    model = model.to(device).eval()
    if not args.data:
        return _eval_tasks_alone(args, "dense", tasks, model)
    tokens = _read_tokens(args, model)
    value, total = perplexity(model, tokens, batch_size=args.batch_size), model.num_parameters()
    report = {
        "model": args.model,
        "kind": "dense",
        "data": args.data,
        "tokens": tokens.numel(),
        "perplexity_dense": value,
        "total_parameters": total,
        "active_parameters": total,
        **measure_tasks(args, tasks, model),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{args.model} on {tokens.numel():,} tokens: a dense model")
    print(f"perplexity: {value:.3f}")
    print("\n".join([f"parameters: {total:,}, all of them active", *task_lines(report)]))
    return 0


def _eval_converted(args: argparse.Namespace, tasks: Any) -> int:
    from ..conversion import all_experts, count_parameters, moe_blocks
    from ..evaluation import active_summary, collect_load, load_summary, perplexity, retention

    model = _load(args)
    path = args.path or "auto"
    for block in moe_blocks(model).values():
        block.path = path
    if not args.data:
        return _eval_tasks_alone(args, "dotmoe", tasks, model)
    tokens = _read_tokens(args, model)
    with all_experts(model):
        dense = perplexity(model, tokens, batch_size=args.batch_size)
    with collect_load(model) as counts:
        sparse = perplexity(model, tokens, batch_size=args.batch_size)
    loads, means, information = counts(), counts.mean_active(), counts.mutual_information()
    mean = sum(means.values()) / len(means)
    total, active = count_parameters(model, means)
    report = {
        "model": args.model,
        "kind": "dotmoe",
        "data": args.data,
        "tokens": tokens.numel(),
        "perplexity_dense": dense,
        "perplexity_sparse": sparse,
        "retention": retention(dense, sparse),
        "total_parameters": total,
        "active_parameters": active,
        "path": path,
        "router": model.config.router,
        "fine_tuned": bool(model.config.finetune_runs),
        "mean_active_experts": mean,
        "load": {name: {**load_summary(load), "share": load.tolist()} for name, load in loads.items()},
        "mutual_information": information,
        "active_experts": {name: {**active_summary(n), "tokens": n.tolist()} for name, n in counts.active.items()},
        **measure_tasks(args, tasks, model),
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{args.model} on {tokens.numel():,} tokens")
    if report["fine_tuned"]:  # the weights are no longer the dense model's
        print(f"perplexity: {sparse:.3f}; with every expert on {dense:.3f}, which after fine-tuning is not the dense model's")
    else:
        print(f"perplexity: dense {dense:.3f}, sparse {sparse:.3f} ({report['retention']:.1%} retained)")
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%}) at {mean:.2f} experts a token")
    if model.config.num_zero_experts:
        empty = 1 - mean / model.config.num_experts_per_tok
        print(f"zero experts: {empty:.1%} of the K {model.config.num_experts_per_tok} slots of a token are empty in the mean")
    print("load of the experts, in multiples of the even share, and I, the mutual information between token and expert in nats")
    print(f"(0 = pruning; at most log(E / K), {math.log(max(len(next(iter(loads.values()))) / max(mean, 1e-9), 1)):.3f} here):")
    print(f"  {'layer':<28}{'min':>8}{'median':>8}{'max':>8}{'unused':>8}{'I':>8}")
    for name, load in loads.items():
        s = load_summary(load)
        shown = f"{s['min']:>8.2f}{s['median']:>8.2f}{s['max']:>8.2f}{s['unused']:>8d}{information[name]:>8.3f}"
        print(f"  {name:<28}{shown}")
    print("active experts a token:")
    print(f"  {'layer':<28}{'mean':>8}{'min':>8}{'median':>8}{'max':>8}  tokens from min to max")
    for name, tokens_by_count in counts.active.items():
        s = active_summary(tokens_by_count)
        bars = _bars(tokens_by_count.tolist()[int(s["min"]) : int(s["max"]) + 1])
        print(f"  {name:<28}{s['mean']:>8.2f}{s['min']:>8d}{s['median']:>8d}{s['max']:>8d}  {bars}")
    for line in task_lines(report):
        print(line)
    return 0


def _generate(args: argparse.Namespace) -> int:
    require(args.max_new_tokens >= 1, "--max-new-tokens", args.max_new_tokens, "at least 1")
    require(0 <= args.temperature < math.inf, "--temperature", args.temperature, "at least 0")
    require_seed(args.seed)
    import torch

    model = _load(args)
    tokenizer = find_tokenizer(args)
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    require(inputs["input_ids"].numel() > 0, "--prompt", repr(args.prompt), "text of at least one token")
    require_vocabulary(inputs["input_ids"], model.config.get_text_config().vocab_size, args)
    torch.manual_seed(args.seed)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id or 0, **sampling)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    return 0


def _info(args: argparse.Namespace) -> int:
    import torch

    from ..models.inspect import describe, describe_paths

    require(args.paths or not args.dtype, "--dtype", args.dtype, "together with --paths")
    require_model_folder(args.model)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    with reading(args.model):
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


COMMANDS = {
    "demo": _demo,
    "convert": run_convert,
    "eval": _eval,
    "generate": _generate,
    "bench": run_bench,
    "info": _info,
    "export": run_export,
    "plan": run_plan,
    "report": run_report,
}
