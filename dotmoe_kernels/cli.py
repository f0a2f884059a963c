"""`dotmoe`: convert, evaluate, generate, inspect, demonstrate. Wrong arguments end with one line and exit status 2."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from . import __version__
from ._checks import require, require_range
from .alignment.config import INITS, AlignmentConfig

_DTYPES = ("float32", "bfloat16", "float16")
_HELD_OUT = 64  # most sequences that convert keeps back to measure on


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_data(parser: argparse.ArgumentParser, *, required: bool, sequence_length: int) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="FILE",
        help="text: .txt .md .py .jsonl .parquet files, folders of them, or a Hugging Face dataset NAME[:CONFIG][:SPLIT]",
    )
    parser.add_argument("--text-field", default="text", help="field of a JSONL, parquet or dataset row (default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=sequence_length, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="read no more than this")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as saved)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `dotmoe`."""
    parser = _Parser(
        prog="dotmoe",
        description="Turn a pretrained dense LLM into a sparse Mixture-of-Experts by differentiable optimal transport.",
        epilog="dotmoe COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"dotmoe_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str, examples: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help,
            description=help,
            epilog="examples:\n" + "\n".join("  " + line for line in examples.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = add(
        "demo",
        "Train a small LLaMA on the spot, convert it with every method, measure, save, reload and generate. No download.",
        "dotmoe demo\ndotmoe demo --quick --output ./demo-quick\ndotmoe demo --data my-text.txt --overwrite",
    )
    demo.add_argument("--output", default="dotmoe-demo", metavar="DIR", help="(default: %(default)s)")
    demo.add_argument("--data", nargs="+", default=[], metavar="FILE", help="text instead of the Python standard library's sources")
    demo.add_argument("--quick", action="store_true", help="a minute: proves the path, not the ranking")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in DIR")

    convert = add(
        "convert",
        "Convert a dense causal LM: align, materialise, check, measure, save.",
        "dotmoe convert ./llama --data corpus.jsonl --output ./llama-moe\n"
        "dotmoe convert ./llama --data a.txt b.txt --expert-size 128 --active-fraction 0.25 --steps 500 --output ./llama-moe\n"
        "dotmoe convert ./llama --data corpus.parquet --output ./llama-moe --resume      # after an interruption\n"
        "dotmoe convert ./llama --data corpus.jsonl --method kmeans --output ./baseline",
    )
    convert.add_argument("model", metavar="MODEL", help="a Hugging Face model folder, or a name")
    convert.add_argument("--output", required=True, metavar="DIR", help="where the converted model goes")
    _add_data(convert, required=True, sequence_length=2048)
    topology = convert.add_argument_group("topology")
    size = topology.add_mutually_exclusive_group()
    size.add_argument("--expert-size", type=int, help="s, neurons an expert (default: 128)")
    size.add_argument("--num-experts", type=int, help="E, experts a layer")
    share = topology.add_mutually_exclusive_group()
    share.add_argument("--active-fraction", type=float, help="share of the FFN a token uses (default: 0.25)")
    share.add_argument("--top-k", type=int, help="K, experts a token")
    train = convert.add_argument_group("alignment")
    train.add_argument("--method", choices=("dot", "random", "kmeans", "activation"), default="dot", help="(default: %(default)s)")
    train.add_argument("--init", choices=INITS, default="noise", help='what "dot" starts from (default: %(default)s)')
    for name, kind in (
        ("steps", int),
        ("batch-size", int),
        ("micro-batch-size", int),
        ("affinity-lr", float),
        ("router-lr", float),
        ("tau-start", float),
        ("tau-end", float),
        ("seed", int),
        ("checkpoint-every", int),
    ):
        default = getattr(AlignmentConfig, name.replace("-", "_"))
        train.add_argument(f"--{name}", type=kind, default=default, help=f"(default: {default})")
    convert.add_argument("--resume", action="store_true", help="continue from the last checkpoint in DIR.run")
    convert.add_argument("--overwrite", action="store_true", help="replace DIR and DIR.run")
    convert.add_argument("--no-progress", action="store_true", help="no bar")
    _add_device(convert)

    evaluate = add(
        "eval",
        "Measure a converted model: perplexity dense and sparse, active parameters, load of the experts.",
        "dotmoe eval ./llama-moe --data held-out.txt\ndotmoe eval ./llama-moe --data held-out.jsonl --sequence-length 1024 --json",
    )
    evaluate.add_argument("model", metavar="DIR", help="a converted model")
    _add_data(evaluate, required=True, sequence_length=1024)
    evaluate.add_argument("--batch-size", type=int, default=4, help="sequences a pass (default: %(default)s)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_device(evaluate)

    generate = add(
        "generate",
        "Continue a prompt with a converted model.",
        'dotmoe generate ./llama-moe --prompt "def main("\n'
        'dotmoe generate ./llama-moe --prompt "Once" --temperature 0.8 --max-new-tokens 100',
    )
    generate.add_argument("model", metavar="DIR", help="a converted model, saved with its tokenizer")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0)
    _add_device(generate)

    info = add(
        "info",
        "Show the structure of a converted model, or what a dense one could become.",
        "dotmoe info ./llama-moe\ndotmoe info ./llama --json",
    )
    info.add_argument("model", metavar="DIR", help="a converted or a dense model folder")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


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


def _require_model_folder(name: str) -> None:
    """A local folder must hold a config and weights; another name is left to transformers."""
    path = Path(name).expanduser()
    if path.is_dir():
        require((path / "config.json").is_file(), "MODEL", f"{name}, without config.json", "a Hugging Face model folder")
        weights = [f for pattern in ("*.safetensors", "*.bin", "*.index.json") for f in path.glob(pattern)]
        require(bool(weights), "MODEL", f"{name}, without weights", "a folder with safetensors files")
    else:
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
        require(not local, "MODEL", f"{name}, which is no folder", "a Hugging Face model folder, or a name")


def _demo(args: argparse.Namespace) -> int:
    folder = Path(args.output)
    require(args.overwrite or not folder.exists(), "--output", f"{folder}, which exists", "a new folder, or --overwrite")
    ours = (folder / "demo.json").is_file() or (folder / "dense").is_dir()
    known = not folder.exists() or ours or (folder.is_dir() and not any(folder.iterdir()))
    require(known, "--output", f"{folder}, which holds something else than a demo", "a new folder")
    from .conversion.demo import run_demo

    run_demo(folder, data=args.data, quick=args.quick, seed=args.seed, overwrite=args.overwrite, progress=sys.stderr.isatty())
    return 0


def _convert(args: argparse.Namespace) -> int:
    output = Path(args.output).expanduser()
    run = output.with_name(output.name + ".run")
    require(args.overwrite or not output.exists(), "--output", f"{output}, which exists", "a new folder, or --overwrite")
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
    options = AlignmentConfig(
        **{f.name: getattr(args, f.name) for f in dataclasses.fields(AlignmentConfig) if hasattr(args, f.name)}
    )
    _require_model_folder(args.model)
    device = _device(args.device)
    import torch
    from transformers import AutoModelForCausalLM

    from .conversion import DotMoeConfig, check_lines, convert, find_ffns, load_tokens, save, self_check
    from .evaluation import perplexity, retention

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
    config = DotMoeConfig.for_dense(
        dense.config.get_text_config(),
        expert_size=args.expert_size,
        num_experts=args.num_experts,
        active_fraction=args.active_fraction,
        top_k=args.top_k,
    )
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
    value = perplexity(model, held, batch_size=1)
    figures = {
        "base_model": args.model,
        "data": " ".join(args.data),
        "held-out tokens": held.numel(),
        "dense perplexity": dense_perplexity,
        "sparse perplexity": value,
    }
    save(model, output, tokenizer=tokenizer, overwrite=args.overwrite, card=figures)
    checks = self_check(model, dense_logits, held[:1], folder=output)
    total, active = checks["total_parameters"], checks["active_parameters"]
    for line in check_lines(checks):
        print(line)
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%})")
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

    from .conversion import load

    device = _device(args.device)
    return load(args.model, dtype=getattr(torch, args.dtype) if args.dtype else None, device=device).eval()


def _eval(args: argparse.Namespace) -> int:
    from .conversion import all_experts, count_parameters, load_tokens
    from .evaluation import collect_load, load_summary, perplexity, retention

    model = _load(args)
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
    with collect_load(model) as loads:
        sparse = perplexity(model, tokens, batch_size=args.batch_size)
    total, active = count_parameters(model)
    report = {
        "model": args.model,
        "data": args.data,
        "tokens": tokens.numel(),
        "perplexity_dense": dense,
        "perplexity_sparse": sparse,
        "retention": retention(dense, sparse),
        "total_parameters": total,
        "active_parameters": active,
        "load": {name: {**load_summary(load), "share": load.tolist()} for name, load in loads().items()},
    }
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{args.model} on {tokens.numel():,} tokens")
    print(f"perplexity: dense {dense:.3f}, sparse {sparse:.3f} ({report['retention']:.1%} retained)")
    print(f"parameters: {total:,}, active a token {active:,} ({active / total:.1%})")
    print("load of the experts, in multiples of the even share:")
    print(f"  {'layer':<28}{'min':>8}{'median':>8}{'max':>8}{'unused':>8}")
    for name, load in loads().items():
        s = load_summary(load)
        print(f"  {name:<28}{s['min']:>8.2f}{s['median']:>8.2f}{s['max']:>8.2f}{s['unused']:>8d}")
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
    from .conversion.inspect import describe

    _require_model_folder(args.model)
    report = describe(args.model)
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


_COMMANDS = {"demo": _demo, "convert": _convert, "eval": _eval, "generate": _generate, "info": _info}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `dotmoe`; returns the exit status: 0, 1 for a run that failed, 2 for wrong arguments, 130 for an interruption."""
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        return _COMMANDS[args.command](args)
    except FloatingPointError as error:
        print(f"dotmoe {args.command}: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        # the bare class is what tokenizers raises when a file cannot be written
        if type(error) is not Exception and not isinstance(error, ValueError | ImportError | OSError | SafetensorError):
            raise
        line = " ".join(str(error).split())
        print(f"dotmoe {args.command}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = "; the same command with --resume continues it" if args.command == "convert" else ""
        print(f"dotmoe {args.command}: interrupted{hint}", file=sys.stderr)
        return 130
