"""The arguments of `dotmoe`."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__
from ..alignment.config import INITS, AlignmentConfig
from ..conversion.recipes import recipe_names

_DTYPES = ("float32", "bfloat16", "float16")
_ROUTERS = ("top_k", "soft")
_PATHS = ("auto", "grouped", "decode", "masked")
STAGES = ("reconstruct", "align", "finetune")
# exports.ARCHITECTURES, which would import torch here; a test compares them
_ARCHITECTURES = ("auto", "mixtral", "qwen2_moe", "qwen3_moe", "granite_moe", "glm4_moe", "dense")
EXPORT_LENGTH = 256  # and of export
SEQUENCE_LENGTH = 2048  # tokens a sequence of convert, where neither a flag nor a recipe says it
EVAL_LENGTH = REPORT_LENGTH = 1024


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _add_text_field(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--text-field",
        metavar="NAME",
        default="text",
        help="field of a JSON, parquet or dataset row that holds text or chat messages; a.b is b in the object a "
        "(default: %(default)s)",
    )


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="DIR", help="a folder with a tokenizer, or a name, instead of MODEL's own")


def _add_data(parser: argparse.ArgumentParser, *, required: bool, sequence_length: int) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        required=required,
        metavar="FILE",
        help="text: .txt .md .py .jsonl .json .parquet files, all but the last also as .gz or .zst, folders of them, or a "
        "Hugging Face dataset NAME[:CONFIG][:SPLIT]",
    )
    _add_text_field(parser)
    default = sequence_length if required else None  # a recipe may say it
    parser.add_argument(
        "--sequence-length", type=int, metavar="N", default=default, help=f"tokens a sequence (default: {sequence_length})"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read no more than this")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=_DTYPES, help="of the weights (default: as saved)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")


def _add_command(commands: Any, name: str, help: str, examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=help,
        description=help,
        epilog="examples:\n" + "\n".join("  " + line for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_demo(commands: Any) -> None:
    demo = _add_command(
        commands,
        "demo",
        "Train a small LLaMA on the spot, convert it with every method, measure, save, reload and generate. No download.",
        "dotmoe demo\ndotmoe demo --quick --output ./demo-quick\ndotmoe demo --data my-text.txt --overwrite",
    )
    demo.add_argument("--output", default="dotmoe-demo", metavar="DIR", help="(default: %(default)s)")
    demo.add_argument("--data", nargs="+", default=[], metavar="FILE", help="text instead of the Python standard library's sources")
    _add_text_field(demo)
    demo.add_argument("--quick", action="store_true", help="a minute: proves the path, not the ranking")
    demo.add_argument("--router", choices=_ROUTERS, default="top_k", help="of every method (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo in DIR, whose other files stay")


def _add_topology(convert: argparse.ArgumentParser) -> None:
    topology = convert.add_argument_group("topology")
    size = topology.add_mutually_exclusive_group()
    size.add_argument("--expert-size", type=int, metavar="N", help="s, neurons an expert (default: 128)")
    size.add_argument("--num-experts", type=int, metavar="N", help="E, experts a layer")
    share = topology.add_mutually_exclusive_group()
    share.add_argument("--active-fraction", type=float, metavar="X", help="share of the FFN a token uses (default: 0.25)")
    share.add_argument("--top-k", type=int, metavar="N", help="K, experts a token")
    topology.add_argument("--router", choices=_ROUTERS, help="soft: weights that sum to K in the mean (default: top_k)")


# what a default of None means
_OPEN = {
    "micro-batch-size": "the batch size",
    "shared": "half of K",
    "router-lr": "0.0005; 0.002 where the router starts from noise",
}


def _add_alignment(convert: argparse.ArgumentParser) -> None:
    train = convert.add_argument_group("alignment")
    train.add_argument(
        "--method",
        choices=("dot", "random", "kmeans", "activation", "shared"),
        help="what finds the expert of a neuron; all but dot keep their assignment and train the router (default: dot)",
    )
    train.add_argument("--init", choices=INITS, help=f'what "dot" starts from (default: {AlignmentConfig.init})')
    train.add_argument(
        "--centre",
        action=argparse.BooleanOptionalAction,
        help="the routers do not see the direction of their FFN's mean input, through which all tokens go the same way "
        f"(default: {'yes' if AlignmentConfig.centre else 'no'})",
    )
    for name, kind, meaning in (
        ("steps", int, "optimizer steps"),
        ("batch-size", int, "sequences a step"),
        ("micro-batch-size", int, "sequences a pass, whose gradients add up; the fewer, the less memory"),
        ("shared", int, "of the start shared: experts that every token visits at first"),
        ("affinity-lr", float, "peak learning rate of A, the affinity of neurons to experts"),
        ("router-lr", float, "peak learning rate of the routers"),
        ("hidden", float, "weight of the distillation of every block's output, beside that of the logits; 0 is without"),
        ("tau-start", float, "temperature of the transport in the first step"),
        ("tau-end", float, "and once a fifth of the steps is done"),
        ("refresh-every", int, "steps between roundings of the plan"),
        ("router-temperature-start", float, "of the soft router in the first step"),
        ("router-temperature-end", float, "and once a fifth of the steps is done"),
        ("threshold", float, "of the soft router: an expert of this weight or less is off"),
        ("cap", float, "of the soft router: most experts of a token, as a multiple of those expected"),
        ("budget-lr", float, "of the soft router: learning rate of the layers' shares of its budget"),
        ("seed", int, "of the start, and of the order of the data"),
        ("checkpoint-every", int, "steps between checkpoints; 0 writes only the last"),
    ):
        default = getattr(AlignmentConfig, name.replace("-", "_"))
        shown = _OPEN.get(name, default)
        train.add_argument(f"--{name}", type=kind, metavar="N" if kind is int else "X", help=f"{meaning} (default: {shown})")


def _add_stages(convert: argparse.ArgumentParser) -> None:
    stages = convert.add_argument_group("stages")
    stages.add_argument(
        "--stage",
        action="append",
        metavar="NAME",
        help="reconstruct (each FFN alone against its dense output, a cheap start), align (all together), finetune (weights, by "
        "distillation or next-token loss); several times or a comma list; a converted MODEL takes finetune alone (default: align)",
    )
    stages.add_argument("--reconstruct-steps", type=int, metavar="N", help="of each layer (default: 100)")
    stages.add_argument("--finetune-steps", type=int, metavar="N", help="(default: 300)")
    stages.add_argument("--finetune-lr", type=float, metavar="X", help="peak learning rate (default: 0.0003, with adapters 0.001)")
    stages.add_argument(
        "--finetune-router-lr",
        type=float,
        metavar="X",
        help="of the routers (default: they rest, but for zero experts and --router soft)",
    )
    stages.add_argument(
        "--zero-experts",
        metavar="N",
        type=int,
        help="add N router rows to every layer whose choice is nothing, so that a token takes K experts at the most; the model as "
        "it was before teaches",
    )
    teacher = stages.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher",
        metavar="DIR",
        help="fine-tune towards the distribution of this model, a folder or a name (default: the dense model inside MODEL, unless "
        "that was fine-tuned before)",
    )
    teacher.add_argument("--no-teacher", action="store_const", const=True, help="fine-tune by the next-token loss alone")
    stages.add_argument(
        "--lora-rank",
        type=int,
        metavar="N",
        help="train adapters on the attention's projections, merged at the end, not every weight; needs peft",
    )


def _add_convert(commands: Any) -> None:
    convert = _add_command(
        commands,
        "convert",
        "Convert a dense causal LM: align, materialise, check, measure, save.",
        "dotmoe convert ./llama --data corpus.jsonl --output ./llama-moe\n"
        "dotmoe convert ./llama --recipe llama3-8b --data corpus.jsonl --output ./llama-moe\n"
        "dotmoe convert --recipe llama3-8b-e128 --dry-run      # what it would take; needs no model, no data and no GPU\n"
        "dotmoe convert --recipe llama3-8b --dry-run --gpus 64\n"
        "torchrun --nproc-per-node 8 -m dotmoe_kernels convert ./llama --data corpus.jsonl --output ./llama-moe\n"
        "dotmoe convert ./llama --data a.txt b.txt --expert-size 128 --active-fraction 0.25 --steps 500 --output ./llama-moe\n"
        "dotmoe convert ./llama --data corpus.parquet --output ./llama-moe --resume      # after an interruption\n"
        "dotmoe convert ./llama --data corpus.jsonl --router soft --cap 1.5 --output ./llama-soft\n"
        "dotmoe convert ./llama --data corpus.jsonl --stage reconstruct,align,finetune --output ./llama-moe\n"
        "dotmoe convert ./llama-moe --data corpus.jsonl --stage finetune --lora-rank 16 --output ./llama-moe-tuned\n"
        "dotmoe convert ./llama --data corpus.jsonl --method kmeans --output ./baseline",
    )
    convert.add_argument(
        "model", nargs="?", metavar="MODEL", help="a Hugging Face model folder, a name, or a .gguf file (default: the recipe's)"
    )
    convert.add_argument("--output", metavar="DIR", help="where the converted model goes")
    convert.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"topology and options: {', '.join(recipe_names())}, or a .toml file of your own; flags go before what it says",
    )
    convert.add_argument(
        "--dry-run",
        action="store_true",
        help="only print topology, parameters, and the tokens, memory and time predicted of every stage, from the config alone",
    )
    convert.add_argument("--json", action="store_true", help="print JSON, with --dry-run")
    convert.add_argument(
        "--gpus", type=int, metavar="N", help="with --dry-run: memory and time on 1, 2, 4, ... N GPUs, and what bounds them"
    )
    _add_data(convert, required=False, sequence_length=SEQUENCE_LENGTH)
    _add_tokenizer(convert)
    _add_topology(convert)
    _add_alignment(convert)
    _add_stages(convert)
    convert.add_argument(
        "--token-cache",
        metavar="DIR",
        help="where the token ids of the text are kept for further runs too, 4 bytes each (default: in the run's folder, until the "
        "model is saved)",
    )
    convert.add_argument(
        "--shard",
        action="store_const",
        const=True,
        help="under torchrun, for a MODEL that fits no GPU: each holds a part of its weights (FSDP2)",
    )
    convert.add_argument(
        "--activation-checkpointing",
        action="store_const",
        const=True,
        help="in align and finetune, keep the inputs of the blocks alone and compute each block once more in the backward pass: "
        "less memory, more time",
    )
    convert.add_argument("--run-folder", metavar="DIR", help="where log and checkpoints go (default: that of --output, with .run)")
    convert.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the run")
    convert.add_argument(
        "--overwrite", action="store_true", help="replace the model in DIR, whose other files stay, and start its run anew"
    )
    convert.add_argument("--no-progress", action="store_true", help="no bar")
    _add_device(convert)


def _add_eval(commands: Any) -> None:
    evaluate = _add_command(
        commands,
        "eval",
        "Measure a converted model: perplexity dense and sparse, active parameters, load of the experts, active experts a token; "
        "of a dense one the perplexity; of both the accuracy on tasks.",
        "dotmoe eval ./llama-moe --data held-out.txt\ndotmoe eval ./llama --data held-out.txt\n"
        "dotmoe eval ./llama-moe --tasks paper\n"
        "dotmoe eval ./llama --data held-out.txt --tasks arc_easy,my_task --include-path ./my-tasks --limit 200\n"
        "dotmoe eval ./llama-moe --data held-out.txt --path masked\n"
        "dotmoe eval ./llama-moe --data held-out.jsonl --sequence-length 1024 --json",
    )
    evaluate.add_argument("model", metavar="MODEL", help="a converted or a dense model folder")
    _add_data(evaluate, required=False, sequence_length=EVAL_LENGTH)
    _add_tokenizer(evaluate)
    evaluate.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help="paper (BoolQ, SciQ, PIQA, WinoGrande, ARC-Challenge, HellaSwag, zero-shot, and their mean), or tasks of "
        "lm-evaluation-harness, also as a comma list; needs lm-eval, and network for their data",
    )
    evaluate.add_argument("--include-path", metavar="DIR", help="a folder with further tasks as YAML files")
    evaluate.add_argument("--limit", type=int, metavar="N", help="no more than so many documents of each task")
    evaluate.add_argument("--batch-size", type=int, default=4, help="sequences a pass (default: %(default)s)")
    evaluate.add_argument("--path", choices=_PATHS, help="how the experts run (default: auto)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    _add_device(evaluate)


def _add_generate(commands: Any) -> None:
    generate = _add_command(
        commands,
        "generate",
        "Continue a prompt with a converted model.",
        'dotmoe generate ./llama-moe --prompt "def main("\n'
        'dotmoe generate ./llama-moe --prompt "Once" --temperature 0.8 --max-new-tokens 100',
    )
    generate.add_argument("model", metavar="MODEL", help="a converted model")
    _add_tokenizer(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: %(default)s)")
    generate.add_argument("--seed", type=int, default=0)
    _add_device(generate)


def _add_bench(commands: Any) -> None:
    bench = _add_command(
        commands,
        "bench",
        "Measure tokens a second of a converted model beside its dense model on this machine.",
        "dotmoe bench ./llama-moe\ndotmoe bench ./llama-moe --dtype bfloat16 --batch 1,4,16 --json\n"
        "dotmoe bench ./llama-moe --rounds 9 --card",
    )
    bench.add_argument("model", metavar="MODEL", help="a converted model; its dense model is restored in memory")
    bench.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="of each prompt (default: %(default)s)")
    bench.add_argument("--new-tokens", type=int, default=64, metavar="N", help="decode steps after it (default: %(default)s)")
    bench.add_argument("--batch", default="1,8", metavar="N,...", help="prompts at a time (default: %(default)s)")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="in which both models take turns (default: %(default)s)")
    bench.add_argument("--seed", type=int, default=0, help="of the prompts' random ids")
    bench.add_argument("--card", action="store_true", help="put the table into README.md of MODEL as well")
    bench.add_argument("--json", action="store_true", help="print JSON")
    _add_device(bench)


def _add_info(commands: Any) -> None:
    info = _add_command(
        commands,
        "info",
        "Show the structure of a converted model, or what a dense one could become.",
        "dotmoe info ./llama-moe\ndotmoe info ./llama --json\ndotmoe info --paths ./llama-moe --dtype bfloat16",
    )
    info.add_argument("model", metavar="MODEL", help="a converted or a dense model folder")
    info.add_argument("--paths", action="store_true", help="which path the experts take at every number of tokens, and why")
    info.add_argument("--dtype", choices=_DTYPES, help="of the weights, for --paths (default: as saved)")
    info.add_argument("--json", action="store_true", help="print JSON")


def _add_export(commands: Any) -> None:
    export = _add_command(
        commands,
        "export",
        "Write a converted model as another architecture, which transformers loads without this package.",
        "dotmoe export ./llama-moe --architecture auto --data held-out.txt --output ./llama-mixtral\n"
        "dotmoe export ./llama-moe --architecture glm4_moe --top-k 4 --dtype float16 --output ./llama-glm --json\n"
        "dotmoe export ./llama-moe --architecture dense --output ./llama-again",
    )
    export.add_argument("model", metavar="DIR", help="a converted model")
    export.add_argument(
        "--architecture",
        choices=_ARCHITECTURES,
        default="auto",
        help="auto: what fits the backbone best; dense: the model before its conversion (default: %(default)s)",
    )
    export.add_argument("--output", required=True, metavar="OUT", help="where the exported model goes")
    export.add_argument("--top-k", type=int, metavar="N", help="K, experts a token (default: as saved)")
    _add_data(export, required=False, sequence_length=EXPORT_LENGTH)
    _add_tokenizer(export)
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: %(default)s)")
    export.add_argument("--overwrite", action="store_true", help="replace a model in OUT")
    export.add_argument("--json", action="store_true", help="print JSON")
    _add_device(export)


def _add_plan(commands: Any) -> None:
    plan = _add_command(
        commands,
        "plan",
        "List the topologies that fit a dense model: active parameters, lossless exports, fast paths, predicted speed.",
        "dotmoe plan ./llama\ndotmoe plan ./llama --budget 0.5\ndotmoe plan ./llama --budget 0.4 --json",
    )
    plan.add_argument("model", metavar="MODEL", help="a dense model folder, of which config.json is read, or a name")
    plan.add_argument(
        "--budget",
        type=float,
        metavar="X",
        help="most active parameters a token over all, embeddings and routers counted (default: 25 %% of the FFN)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON")


def _add_report(commands: Any) -> None:
    report = _add_command(
        commands,
        "report",
        "Draw a converted model as one self-contained HTML page: assignment, weights, load, co-routing, perplexity, training.",
        "dotmoe report ./llama-moe\ndotmoe report ./llama-moe --data held-out.txt --max-tokens 65536\n"
        "dotmoe report ./llama-moe --data held-out.txt --run-folder ./llama-moe.run --output ./llama-moe.html --overwrite",
    )
    report.add_argument("model", metavar="DIR", help="a converted model")
    report.add_argument("--output", metavar="FILE", help="(default: DIR.html)")
    report.add_argument("--run-folder", metavar="DIR", help="of the training, for its curves (default: DIR.run where there is one)")
    _add_data(report, required=False, sequence_length=REPORT_LENGTH)
    _add_tokenizer(report)
    report.add_argument("--batch-size", type=int, default=4, help="sequences a pass, which reads DIR once (default: %(default)s)")
    report.add_argument("--overwrite", action="store_true", help="replace FILE")
    _add_device(report)
    report.set_defaults(sequence_length=REPORT_LENGTH)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `dotmoe`."""
    parser = _Parser(
        prog="dotmoe",
        description="Turn a pretrained dense LLM into a sparse Mixture-of-Experts by differentiable optimal transport.",
        epilog="dotmoe COMMAND --help shows examples.",
    )
    parser.add_argument("--version", action="version", version=f"dotmoe_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    adders = (_add_demo, _add_convert, _add_eval, _add_generate, _add_bench, _add_info, _add_export, _add_plan, _add_report)
    for add in adders:
        add(commands)
    return parser
