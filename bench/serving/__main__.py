"""A converted model in a real engine, beside the exact model and beside the dense one.

    python -m bench.serving ENGINE DIR

ENGINE is transformers, vllm or llama.cpp, in an environment of its own: where there is none, the command prints how to make it.
DIR is a saved model (the exact form: the engine loads the folder's own modelling file) or a stock form exported from one, then with
``--exact MODEL``. Greedy continuations of 16 prompts by 64 tokens are compared with the exact model's; tokens a second are measured
for DIR and for the dense model (``--dense``; restored from the exact model where it is not given), taking turns. The result goes to
``bench/results/serving/``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

import dotmoe_kernels as dk
from bench import machine
from bench.serving.compare import TOP, Exact, continuations, greedy, positions
from bench.serving.process import MODULES, Worker, environment, recipe
from dotmoe_kernels._files import write_file

NEW = 64
PROMPT = 8  # tokens of each prompt: of one length, so that a batch needs no padding
STARTS = (
    "The history of the city begins in the early",
    "Water boils at a lower temperature when the air",
    "In 1969 the first people to walk on the",
    "She opened the letter and read the first line",
    "The capital of France is a city that has",
    "To make bread you need flour, water, salt and",
    "A computer program is a list of instructions that",
    "The most important thing about learning a language is",
    "During the winter the animals of the forest often",
    "The king asked his three sons to bring him",
    "Photosynthesis is the process by which green plants make",
    "The train was late again, and the passengers on",
    "An economy grows when people and firms can produce",
    "Once upon a time there was a small village",
    "The heart pumps blood through the body so that",
    "If you want to write well, you should read",
)
# name, prompts in a batch, tokens of each
PREFILL = ("prefill_512", 1, 512)
DECODE = (("decode_1", 1, 16), ("decode_8", 8, 16))


def config_of(folder: str) -> dict[str, Any]:
    values, _ = PreTrainedConfig.get_config_dict(folder)
    return values


def prompts_of(tokenizer: Any) -> list[list[int]]:
    found = [tokenizer(text, add_special_tokens=False)["input_ids"][:PROMPT] for text in STARTS]
    short = [text for text, ids in zip(STARTS, found, strict=True) if len(ids) < PROMPT]
    if short:
        raise ValueError(f"the tokenizer makes less than {PROMPT} tokens of {short[0]!r}")
    return found


def random_prompts(batch: int, length: int, vocabulary: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(min(1000, vocabulary // 2), vocabulary, (batch, length), generator=draw).tolist()


def seconds(worker: Worker, vocabulary: int, new: int, seed: int) -> dict[str, dict[str, float]]:
    """Of one round: a prompt of 512 tokens; then, by batch, a token a sequence, as the difference of two lengths."""
    name, batch, length = PREFILL
    found = {name: worker.time(random_prompts(batch, length, vocabulary, seed), 1)}
    for name, batch, length in DECODE:
        prompts = random_prompts(batch, length, vocabulary, seed)
        first, whole = worker.time(prompts, 1), worker.time(prompts, 1 + new)
        found[name] = {clock: (whole[clock] - first[clock]) / new for clock in whole}
    return found


def speeds(workers: dict[str, Worker], vocabulary: int, new: int, rounds: int) -> dict[str, Any]:
    """Tokens a second, medians of rounds in which the models take turns, and the median of the ratios within a round; by the clock
    and by the processors' time, which says more where others use the machine."""
    for worker in workers.values():
        seconds(worker, vocabulary, 1, 0)
    taken: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in workers}
    for r in range(rounds):
        for name in list(workers)[:: 1 if r % 2 else -1]:
            taken[name].append(seconds(workers[name], vocabulary, new, r + 1))
    tokens = {PREFILL[0]: PREFILL[2], **{name: batch for name, batch, _ in DECODE}}
    result: dict[str, Any] = {"rounds": rounds, "new_tokens": new}
    for what, count in tokens.items():
        result[what] = {}
        for clock in ("wall", "cpu"):
            pairs = [(d[what][clock], s[what][clock]) for d, s in zip(taken["dense"], taken["sparse"], strict=True)]
            pairs = [(d, s) for d, s in pairs if d > 0 and s > 0]  # a disturbed round can make a difference of lengths negative
            if not pairs:
                continue
            ratios = [d / s for d, s in pairs]
            result[what][clock] = {
                "dense": round(count / median(d for d, _ in pairs), 2),
                "sparse": round(count / median(s for _, s in pairs), 2),
                "sparse_over_dense": round(median(ratios), 3),
                "ratios": [round(ratio, 3) for ratio in ratios],
            }
    return result


def exact_answers(folder: str, kind: str, kept: Path | None) -> tuple[Exact, dict[str, Any]]:
    """Of the exact model: its answers, and its topology; ``kept`` is a file to read them from, or to write."""
    if kept is not None and kept.is_file():
        found = torch.load(kept, weights_only=True)
    else:
        model = dk.load(folder, dtype=kind)
        names = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "vocab_size")
        prompts = prompts_of(AutoTokenizer.from_pretrained(folder))
        topology = {name: getattr(model.config, name) for name in names}
        found = {"prompts": prompts, "logits": greedy(model, prompts, NEW), "topology": topology}
        if kept is not None:
            write_file(kept, lambda file: torch.save(found, file))
    return Exact(found["prompts"], found["logits"]), found["topology"]


def measure(options: argparse.Namespace, python: Path, exact_folder: str, scratch: Path) -> dict[str, Any]:
    config = config_of(options.model)
    exact, topology = exact_answers(exact_folder, options.exact_type, options.kept)
    dense = options.dense
    if dense is None and options.rounds:
        dense = str(scratch / "dense")
        dk.export(exact_folder, dense, "dense")
    settings = {"type": options.type, "threads": options.threads, "top": TOP, "scratch": str(options.gguf or scratch)}
    with Worker(options.engine, python, str(Path(options.model).resolve()), settings, scratch / "sparse.log") as sparse:
        result: dict[str, Any] = {
            "engine": options.engine,
            **sparse.ask("about"),
            "model": Path(exact_folder).resolve().name,
            "form": "exact" if config["model_type"] == "dotmoe" else "stock",
            "architecture": config["architectures"][0],
            "type": options.type,
            "topology": topology,
            "continuations": continuations(exact, sparse.ask("generate", prompts=exact.prompts, new=NEW), options.tie),
        }
        followed = [one[: exact.start + options.scored] for one in exact.sequences]
        result["positions"] = positions(exact, sparse.scores(followed, exact.start, TOP))
        if options.rounds:
            with Worker(options.engine, python, str(Path(dense).resolve()), settings, scratch / "dense.log") as other:
                result["speed"] = speeds({"dense": other, "sparse": sparse}, topology["vocab_size"], options.new, options.rounds)
    return result


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.serving", description=str(__doc__).split("\n", 1)[0])
    made.add_argument("engine", choices=list(MODULES))
    made.add_argument("model", metavar="DIR", help="a saved model, or a stock form of one")
    made.add_argument("--exact", metavar="MODEL", help="the saved model that DIR was exported from; default: DIR")
    made.add_argument("--dense", metavar="DIR", help="the dense model, in the form of DIR; default: restored from the exact model")
    made.add_argument("--type", default="float32", help="of the weights: float32, bfloat16; of llama.cpp f32, f16, q8_0")
    made.add_argument("--exact-type", default="float32", choices=["float32", "bfloat16"], help="of the exact model compared with")
    made.add_argument("--tie", type=float, default=1e-3, help="logits as close as this are a tie (default 0.001)")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--rounds", type=int, default=5, help="of the timing; 0: none")
    made.add_argument("--new", type=int, default=24, help="tokens of a timed decode")
    made.add_argument("--scored", type=int, default=NEW, help="tokens of each continuation along which probabilities are compared")
    made.add_argument("--environment", type=Path, help="the engine's; default: .venv/serving/ENGINE")
    made.add_argument("--gguf", type=Path, help="a folder where llama.cpp's files are kept for another run")
    made.add_argument("--kept", type=Path, help="a file where the exact model's answers are kept for another run")
    made.add_argument("--shared", action="store_true", help="say in the result that others used the machine")
    made.add_argument("--out", type=Path, default=machine.RESULTS / "serving")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    folder = options.environment or environment(options.engine)
    python = folder / "bin" / "python"
    if not python.exists():
        print(f"{options.engine} has no environment at {folder}; make it:\n\n{recipe(options.engine, folder)}", file=sys.stderr)
        return 2
    kind = config_of(options.model).get("model_type")
    exact = options.exact or options.model
    if kind != "dotmoe" and options.exact is None:
        print(f"DIR is of type {kind}: --exact MODEL says what it was exported from", file=sys.stderr)
        return 2
    if options.engine == "llama.cpp" and kind == "dotmoe":
        print("llama.cpp knows no DotMoE: give a stock form, as `dotmoe export --architecture mixtral` makes it", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        try:
            result = measure(options, python, exact, Path(scratch))
        except RuntimeError as error:
            logs = [path.read_text()[-3000:] for path in sorted(Path(scratch).glob("*.log"))]
            print(*logs, error, sep="\n", file=sys.stderr)
            return 1
    result["machine"] = {**machine.describe(), "engine_threads": options.threads, "shared": options.shared}
    result["date"], result["commit"] = datetime.date.today().isoformat(), machine.commit()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{result['model']}-{result['engine']}-{result['form']}-{result['type']}.json"
    write_file(path, lambda file: file.write((json.dumps(result, indent=2) + "\n").encode()))
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=2))
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
