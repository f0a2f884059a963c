"""MEASURED tokens a second of a converted model beside the dense one that is restored from it, on the machine at hand.

    prefill   one pass over the prompts, with the logits of their last tokens
    decode    the passes after it, each with the likeliest next token of every sequence

Both go through the model's own ``forward`` with the cache that transformers gives it. They take turns in one process, the first of
a round being the last of the round before, and what is compared is the ratio within a round: a machine that slows down for a second
slows both. The FFNs' share, router included, is of a pass of its own, in which hooks around the FFN modules read the clock.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import is_integer, require
from ..models.block import moe_blocks
from ..models.card import markdown_table
from ..models.modeling import DotMoeForCausalLM, restore_dense
from .machine import describe_machine, peak_memory

PHASES = ("prefill", "decode")
SECTION = "Speed"  # of the model card
_MODELS = ("dense", "sparse")
_WARMING = 2  # decode steps, at most, of the first pass at a size
_WATCHED = 16  # decode steps, at most, of the pass that tells the FFNs' share

Seconds = dict[str, float]  # by phase


def _clock(device: torch.device) -> Callable[[], float]:
    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now if device.type == "cuda" else time.perf_counter


@torch.no_grad()
def generation_seconds(model: nn.Module, prompts: Tensor, new_tokens: int, done: Callable[[str], None] | None = None) -> Seconds:
    """Of one generation after prompts [B, N]; ``done`` is told the end of each phase."""
    now = _clock(prompts.device)
    taken = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in taken else {})}
    cache = "cache" if "cache" in taken else "past_key_values"  # its newer and its older name
    marks = [now()]

    def end(phase: str) -> None:
        marks.append(now())
        if done is not None:
            done(phase)

    out = model(input_ids=prompts, **options)
    tokens = out.logits[:, -1:].argmax(-1)  # [B, 1]
    end("prefill")
    for _ in range(new_tokens):
        out = model(input_ids=tokens, **{cache: getattr(out, cache)}, **options)
        tokens = out.logits[:, -1:].argmax(-1)
    end("decode")
    return {phase: b - a for phase, a, b in zip(PHASES, marks, marks[1:], strict=False)}


@contextmanager
def _watched(modules: Sequence[nn.Module], now: Callable[[], float]) -> Iterator[Callable[[], float]]:
    """Inside, adds up the seconds of these modules' forward passes; what it yields gives the sum, and begins anew."""
    total, began, handles = [0.0], [0.0], []

    def begin(*_: Any) -> None:
        began[0] = now()

    def end(*_: Any) -> None:
        total[0] += now() - began[0]

    def taken() -> float:
        found, total[0] = total[0], 0.0
        return found

    try:
        for module in modules:
            handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def ffn_shares(model: nn.Module, names: Sequence[str], prompts: Tensor, new_tokens: int) -> Seconds:
    """By phase, the share of a generation that the modules of these names take."""
    ffn: Seconds = {}
    with _watched([model.get_submodule(name) for name in names], _clock(prompts.device)) as taken:
        whole = generation_seconds(model, prompts, new_tokens, lambda phase: ffn.update({phase: taken()}))
    return {phase: ffn[phase] / whole[phase] for phase in PHASES}


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def bounds(model: DotMoeForCausalLM, batch: int) -> Seconds:
    """By phase, how many times as fast as the dense model the sparse one can be at most.

    Decode: bytes of the weights that a pass reads, of the experts those that ``batch`` tokens of random routing choose. Prefill:
    flops of the weights' products. Attention to the cache, which both have, is left out of both: it makes the ratio smaller. A
    token visits as many experts as ``DotMoeRouter.mean_active`` says.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    last = 0 if head is None else _bytes([head.weight])
    blocks = moe_blocks(model).values()
    sizes = [(_bytes(block.experts.parameters()), block.gate.mean_active / block.gate.num_experts) for block in blocks]
    ffn, routers = sum(size for size, _ in sizes), sum(_bytes(block.gate.parameters()) for block in blocks)
    others = _bytes(model.parameters()) - ffn - routers
    if head is None or embedding is not head.weight:  # a row a token
        others -= _bytes([embedding])

    def ratio(others: int, tokens: int) -> float:
        chosen = sum(size * (1 - (1 - share) ** tokens) for size, share in sizes)
        return (others + ffn) / (others + routers + chosen)

    return {"prefill": ratio(others - last, 1), "decode": ratio(others, batch)}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "quartiles": [low, high]}


def _measure_batch(
    models: dict[str, nn.Module], several: Tensor, new_tokens: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """``several`` [rounds + 1, B, N]: the prompts before the rounds and behind them, then of each round."""
    prompts, rounds = several[0], len(several) - 1
    names = list(moe_blocks(models["sparse"]))
    batch, length = prompts.shape
    peaks: dict[str, int | None] = {}
    shares: dict[str, Seconds] = {}
    taken: dict[str, list[Seconds]] = {name: [] for name in models}
    for model in models.values():  # the first pass at a size sets libraries up, which is neither timed nor weighed
        progress(f"batch {batch}, warming up")
        generation_seconds(model, prompts, min(_WARMING, new_tokens))
    for r in range(rounds):
        progress(f"batch {batch}, round {r + 1} of {rounds}")
        for name in list(models)[:: -1 if r % 2 else 1]:
            gc.collect()
            taken[name].append(generation_seconds(models[name], several[r + 1], new_tokens))
    for name, model in models.items():
        progress(f"batch {batch}, the FFNs' share")
        gc.collect()
        with peak_memory(prompts.device) as peak:
            shares[name] = ffn_shares(model, names, prompts, min(_WATCHED, new_tokens))
            peaks[name] = peak()
    limit = bounds(models["sparse"], batch)  # type: ignore[arg-type]
    report: dict[str, Any] = {"batch": batch, "peak_bytes": peaks}
    for phase, tokens in zip(PHASES, (batch * length, batch * new_tokens), strict=True):
        seconds = {name: [one[phase] for one in passes] for name, passes in taken.items()}
        report[phase] = {
            "tokens_per_second": {name: _spread([tokens / s for s in seconds[name]]) for name in models},
            "sparse_over_dense": _spread([d / s for d, s in zip(seconds["dense"], seconds["sparse"], strict=True)]),
            "at_most": limit[phase],
            "ffn_share": {name: shares[name][phase] for name in models},
        }
    return report


def check_lengths(config: Any, prompt_tokens: int, new_tokens: int, batches: Sequence[int], rounds: int) -> None:
    """The arguments of ``measure_speed`` for a model of this config; raises as it does."""
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        require(is_integer(value) and value >= 1, name, value, "an integer of at least 1")
    whole = all(is_integer(batch) and batch >= 1 for batch in batches) and len(batches) > 0
    require(whole, "batches", list(batches), "integers of at least 1")
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None:
        require(prompt_tokens <= most, "prompt_tokens", prompt_tokens, f"at most max_position_embeddings, {most}")
        given = f"{new_tokens} after a prompt of {prompt_tokens}"
        require(prompt_tokens + new_tokens <= most, "new_tokens", given, f"max_position_embeddings, {most}, in all")


def measure_speed(
    model: DotMoeForCausalLM,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batches: Sequence[int] = (1, 8),
    rounds: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Tokens a second of a converted model and of the dense one restored from it, in the model's dtype and on its device.

    Args:
        model: the sparse model; it is put into eval mode.
        prompt_tokens: of each prompt, random ids.
        new_tokens: decode steps after it.
        batches: prompts at a time.
        rounds: in each of which both models generate once, after prompts of its own: what a library has set up for the sizes that
            one prompt's routing makes is not there for the next.
        seed: of the ids.
        progress: told what comes next.

    Returns:
        dtype, device, machine, topology, prompt_tokens, new_tokens, rounds, weight_bytes by model, and ``batches``, for each its
        batch, peak_bytes (beyond the weights, the cache included), and by phase tokens_per_second and sparse_over_dense as median
        and quartiles, at_most (see ``bounds``) and ffn_share.

    Raises:
        ValueError: a count below 1, no batch, more tokens than the model has positions.
    """
    check_lengths(model.config, prompt_tokens, new_tokens, batches, rounds)
    models: dict[str, nn.Module] = {"dense": restore_dense(model).eval(), "sparse": model.eval()}
    device = next(model.parameters()).device
    size, vocabulary = (rounds + 1, max(batches), prompt_tokens), model.config.get_text_config().vocab_size
    prompts = torch.randint(vocabulary, size, generator=torch.Generator().manual_seed(seed)).to(device)
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device.type,
        "machine": describe_machine(device),
        "topology": {
            "num_experts": model.config.num_experts,
            "top_k": model.config.num_experts_per_tok,
            "expert_size": model.config.moe_intermediate_size,
        },
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "weight_bytes": {name: _bytes(one.parameters()) for name, one in models.items()},
        "batches": [_measure_batch(models, prompts[:, :batch], new_tokens, progress) for batch in batches],
    }


# --- in words -----------------------------------------------------------------------------------------------------------

_HEADS = (
    "prompts",
    "phase",
    "dense tokens/s",
    "sparse tokens/s",
    "sparse / dense",
    "at most",
    "FFN of dense",
    "FFN of sparse",
    "memory dense",
    "memory sparse",
)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:,.0f} MB"


def _between(spread: dict[str, Any], show: Callable[[float], str]) -> str:
    low, high = spread["quartiles"]
    return f"{show(spread['median'])} [{show(low)}, {show(high)}]"


def _cells(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for one in report["batches"]:
        for phase in PHASES:
            found = one[phase]
            rates = [_between(found["tokens_per_second"][name], _figure) for name in _MODELS]
            ratio = _between(found["sparse_over_dense"], lambda value: f"{value:.2f}")
            shares = [f"{found['ffn_share'][name]:.0%}" for name in _MODELS]
            peaks = [_megabytes(one["peak_bytes"][name]) if phase == PHASES[0] else "" for name in _MODELS]
            rows.append([str(one["batch"]), phase, *rates, ratio, f"{found['at_most']:.2f}", *shares, *peaks])
    return rows


def _sentences(report: dict[str, Any]) -> list[str]:
    machine, topology = report["machine"], report["topology"]
    threads = machine["threads"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {threads} thread{'s' if threads != 1 else ''}"
    if report["device"] == "cpu" and report["dtype"] != "float32":
        cpu += f", {' '.join(machine['matrix_instructions']) or 'no instructions for 16-bit products'}"
    where = f"{machine['gpu']} ({cpu})" if "gpu" in machine else cpu
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    weights = report["weight_bytes"]
    shape = f"E {topology['num_experts']}, s {topology['expert_size']}, K {topology['top_k']}"
    return [
        f"{shape}, {report['dtype']}, on {where}; {versions}.",
        f"Prompts of {report['prompt_tokens']} random tokens, others each round, then {report['new_tokens']} decode steps each; "
        f"both models take turns in {report['rounds']} rounds, medians [quartiles].",
        "at most: what the bytes of the weights allow in decode, and their products in prefill. FFN: its share, router included, "
        "by hooks on the modules in a pass of its own. memory: the most that this pass holds beside the weights, which are "
        f"{_megabytes(weights['dense'])} dense and {_megabytes(weights['sparse'])} sparse.",
    ]


def speed_lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    rows = [list(_HEADS), *_cells(report)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*_sentences(report), *table]


def speed_section(report: dict[str, Any]) -> str:
    """The report as a section of a model card, without its heading."""
    return "\n\n".join([" ".join(_sentences(report)), markdown_table(_HEADS, _cells(report))])
