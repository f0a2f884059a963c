"""The demonstration: the whole job on a machine with nothing but Python, in a few minutes on two CPU cores.

A small LLaMA and its BPE tokenizer are trained on the spot, on the sources of the Python standard library or on given text; it is
converted at 25 % of the FFN with every method, measured on held-out text, saved, loaded again, and writes a few lines.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sysconfig
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .._files import write_file, write_folder
from ..alignment.checkpoints import read_log
from ..alignment.config import AlignmentConfig
from ..evaluation import collect_load, perplexity, retention, unused_experts
from ..models.checkpoint import load, save
from ..models.config import DotMoeConfig
from ..models.counts import count_parameters
from ..models.modeling import DotMoeForCausalLM
from ..models.target import check_target, replaced_files
from .checks import check_lines, self_check
from .data import pack_documents, read_documents
from .pipeline import METHODS, convert

_END = "<|endoftext|>"


@dataclass(frozen=True)
class DemoSize:
    """How long the parts take; the model itself is the same."""

    dense_steps: int
    align_steps: int
    held_out: int  # sequences


FULL = DemoSize(dense_steps=700, align_steps=200, held_out=192)
QUICK = DemoSize(dense_steps=60, align_steps=15, held_out=32)
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
_SEQUENCE, _DENSE_BATCH, _ALIGN_BATCH = 128, 16, 8
_EXPERTS, _TOP_K = 32, 8  # s = 512 / 32 = 16; 25 % of the FFN


def standard_library() -> list[str]:
    """The sources of the Python standard library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    files = sorted(p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts))
    return [text for p in files if (text := p.read_text(encoding="utf-8", errors="replace")).strip()]


def train_tokenizer(texts: Sequence[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; id 0 ends a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=_END, bos_token=_END, pad_token=_END)


def train_dense(
    tokens: Tensor, steps: int, *, vocab_size: int, seed: int, progress: bool, shape: Mapping[str, Any] = SHAPE
) -> LlamaForCausalLM:
    """A LLaMA of that shape (1.3 M parameters) trained on the tokens [N, S]."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        **shape,
        max_position_embeddings=4 * _SEQUENCE,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    peak, generator = 3e-3, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    bar = tqdm(range(steps), desc="dense model", disable=not progress, dynamic_ncols=True)
    for step in bar:
        rate = peak * min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = tokens[torch.randint(len(tokens), (_DENSE_BATCH,), generator=generator)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{float(loss.detach()):.3f}", refresh=False)
    return model.eval()


def split_documents(texts: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Training and held-out text: of different documents, or the ends of the few there are."""
    texts = list(texts)
    random.Random(seed).shuffle(texts)
    if len(texts) >= 20:
        share = len(texts) // 20
        return texts[share:], texts[:share]
    cuts = [len(t) * 19 // 20 for t in texts]
    return [t[:cut] for t, cut in zip(texts, cuts, strict=True)], [t[cut:] for t, cut in zip(texts, cuts, strict=True)]


def _write_figure(
    path: Path, rows: list[dict[str, Any]], logs: dict[str, list[dict[str, float]]], note: str, *, hard: bool = True
) -> bool:
    """Perplexity by method and the alignment's KL by step; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    bars, curves = figure.subplots(1, 2)
    colours = {"dense": "0.55", "dot": "C3", "random": "C0", "kmeans": "C1", "activation": "C2", "shared": "C4"}
    shown = sorted(rows, key=lambda row: row["perplexity"])
    names = [row["method"] for row in shown]
    values = [row["perplexity"] for row in shown]
    drawn = bars.bar(names, values, color=[colours[n] for n in names])
    bars.bar_label(drawn, fmt="%.1f", padding=2)
    bars.set(
        ylabel="held-out perplexity (lower is better)", title="25 % of the FFN active, except dense" if hard else "soft router"
    )
    bars.margins(y=0.12)
    for name, log in logs.items():
        curves.plot([e["step"] for e in log], [e["kl"] for e in log], label=name, color=colours[name], linewidth=1.2)
    curves.set(xlabel="step", ylabel="KL(dense || sparse), nats a token", title="alignment", yscale="log")
    curves.legend(frameon=False)
    for axes in (bars, curves):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(note, fontsize=10)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=130))
    return True


def _table(rows: list[dict[str, Any]]) -> str:
    """A line a method; on the held-out text "experts" is the mean number of active ones a token and a layer, "unused" those of all
    layers that no token visits."""
    heads = f"{'active parameters':>20}{'experts':>10}{'unused':>8}{'seconds':>10}"
    lines = [f"{'method':<12}{'perplexity':>12}{'retention':>12}{heads}"]
    for row in rows:
        active = f"{row['active_parameters']:,} ({row['active_parameters'] / row['total_parameters']:.0%})"
        experts = f"{row['mean_active']:.2f}" if "mean_active" in row else "-"
        rest = f"{active:>20}{experts:>10}{row.get('unused', '-'):>8}{row['seconds']:>10.1f}"
        lines.append(f"{row['method']:<12}{row['perplexity']:>12.2f}{row['retention']:>12.1%}{rest}")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Setting:
    """What every method starts from."""

    folder: Path
    dense: LlamaForCausalLM
    train: Tensor
    held: Tensor
    perplexity: float  # the dense model's
    router: str
    options: AlignmentConfig
    progress: bool

    def run(self, method: str) -> tuple[DotMoeForCausalLM, dict[str, Any], list[dict[str, float]]]:
        """The dense model converted with ``method``; its row of the table, and its log."""
        start, run = time.monotonic(), self.folder / "logs" / method
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* leave experts without a token")  # the table has a column for it
            model = convert(
                copy.deepcopy(self.dense),
                DotMoeConfig(num_experts=_EXPERTS, num_experts_per_tok=_TOP_K, router=self.router),
                method=method,
                data=self.train,
                alignment=self.options,
                folder=run,
                progress=self.progress,
            )
        seconds = time.monotonic() - start
        with collect_load(model) as counts:
            value = perplexity(model, self.held)
        means = counts.mean_active()
        total, active = count_parameters(model, means)
        row = {
            "method": method,
            "perplexity": value,
            "retention": retention(self.perplexity, value),
            "active_parameters": active,
            "total_parameters": total,
            "mean_active": sum(means.values()) / len(means),
            "unused": sum(unused_experts(counts.slots).values()),
            "seconds": seconds,
        }
        return model, row, read_log(run / "log.jsonl")


def _generate(model: DotMoeForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    torch.manual_seed(seed)
    output: Any = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=50, pad_token_id=0)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def run_demo(
    folder: str | Path,
    *,
    data: Sequence[str] = (),
    text_field: str = "text",
    router: str = "top_k",
    quick: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train, convert with every method, measure, save, reload, generate; returns the figures that go into demo.json.

    Args:
        folder: gets dense/, dotmoe/ (the checkpoint), logs/, demo.json and demo.png.
        data: text files instead of the standard library's sources.
        text_field: of their rows, where they have some.
        router: "top_k" or "soft", of every method.
        quick: a minute; proves the path, not the ranking.
        seed: of everything.
        overwrite: replace an earlier demo in ``folder``, once the text is read; other files of it stay.
        progress: show bars.
        say: where the lines go.

    Raises:
        ValueError: too little text; ``folder`` holds a demo and ``overwrite`` is False, or something else.
    """
    folder, size, begin = Path(folder), QUICK if quick else FULL, time.monotonic()
    for part in ("dense", "dotmoe"):
        check_target(folder / part, "folder", overwrite)
    source = ", ".join(data) if data else "the Python standard library's sources"
    texts = list(read_documents(data, text_field=text_field)) if data else standard_library()
    train_texts, held_texts = split_documents(texts, seed)
    tokenizer = train_tokenizer(train_texts)
    train = pack_documents(train_texts, tokenizer, sequence_length=_SEQUENCE, given=f"the training part of {source}")
    held = pack_documents(held_texts, tokenizer, sequence_length=_SEQUENCE, given=f"the held-out twentieth of {source}")
    held = held[: size.held_out]
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in ("demo.json", "demo.png"):
            (folder / name).unlink(missing_ok=True)
    say(f"text: {source}: {train.numel():,} training and {held.numel():,} held-out tokens")

    start = time.monotonic()
    dense = train_dense(train, size.dense_steps, vocab_size=len(tokenizer), seed=seed, progress=progress)
    value, total = perplexity(dense, held), dense.num_parameters()
    first = {"method": "dense", "perplexity": value, "retention": 1.0, "active_parameters": total, "total_parameters": total}
    rows: list[dict[str, Any]] = [{**first, "seconds": time.monotonic() - start}]
    with write_folder(folder / "dense", replaced_files(tokenizer=True)) as new:
        dense.save_pretrained(new)
        tokenizer.save_pretrained(new)
    with torch.no_grad():
        dense_logits = dense(input_ids=held[:4], use_cache=False).logits

    options = AlignmentConfig(steps=size.align_steps, batch_size=_ALIGN_BATCH, seed=seed, checkpoint_every=0)
    setting = _Setting(folder, dense, train, held, value, router, options, progress)
    converted, logs = {}, {}
    for method in METHODS:
        model, row, logs[method] = setting.run(method)
        rows.append(row)
        if method == "dot":
            converted[method] = model
    sparse = converted["dot"]
    figures = {f"{row['method']} perplexity": round(row["perplexity"], 3) for row in rows}
    figures["active experts a token, dot"] = round(next(row["mean_active"] for row in rows if row["method"] == "dot"), 3)
    save(sparse, folder / "dotmoe", tokenizer=tokenizer, overwrite=True, card={"measured on": "held-out " + source, **figures})
    checks = self_check(sparse, dense_logits, held[:4], folder=folder / "dotmoe")
    again = load(folder / "dotmoe")
    reloaded = perplexity(again, held)

    label = "quick: proves the path, not the ranking" if quick else "full"
    hard = router == "top_k"
    taken = f"K = {_TOP_K}, 25 % of the FFN active" if hard else f"soft router whose weights sum to {_TOP_K} in the mean"
    say(f"\ndemo ({label}): LLaMA of {total / 1e6:.1f} M parameters, E = {_EXPERTS}, s = 16, {taken}")
    say(_table(rows))
    say("\nself-checks:\n  " + "\n  ".join(check_lines(checks)) + f", perplexity {reloaded:.2f}")
    say(f"\nthe reloaded model writes:\n{_generate(again, tokenizer, texts[0][:16] if data else 'def ', seed)}\n")

    report = {"label": label, "router": router, "rows": rows, "reloaded_perplexity": reloaded, "self_check": checks}
    report["seconds"] = time.monotonic() - begin
    write_file(folder / "demo.json", lambda file: file.write(json.dumps(report, indent=2).encode()))
    drawn = _write_figure(folder / "demo.png", rows, logs, f"dotmoe demo ({label}), {source}", hard=hard)
    say(f"checkpoint: {folder / 'dotmoe'}")
    missing = "figure: not written, matplotlib is missing: pip install 'dotmoe_kernels[demo]'"
    say(f"figure: {folder / 'demo.png'}" if drawn else missing)
    say(f"total: {report['seconds']:.0f} s")
    if not checks["passed"]:
        raise ValueError(f"self-check failed: {checks}")
    return report
