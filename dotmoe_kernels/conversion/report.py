"""One self-contained HTML page of a converted model: its card, pictures of assignment, weights, load, co-routing and perplexity,
and its training curves. Pictures are data URIs; nothing is fetched, and there is no script.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import require
from ..alignment.checkpoints import newest_checkpoint, read_log
from ..evaluation import load_summary
from ..models.block import moe_blocks
from ..models.card import model_card
from ..models.counts import count_parameters
from ..models.layerwise import Layerwise
from ..transport import sinkhorn
from . import figures
from .measure import Measured, Point, expert_norms, experts_of_neurons, measure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem; margin-bottom: .2rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1.05rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #e4e4e4; padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top }
td { overflow-wrap: anywhere }
th { font-weight: 600 } th.n, td.n { text-align: right; padding-left: .9rem }
figure { margin: .8rem 0 } img { max-width: 100%; height: auto }
figcaption, .note { color: #555; font-size: .92rem; max-width: 56rem } pre { background: #f6f6f6; padding: .6rem; overflow-x: auto }
details { margin: .6rem 0 } summary { cursor: pointer; color: #555 }
"""
_NUMBER = re.compile(r"[-+]?[\d,.]+(e[-+]?\d+)?( ?%)?")


def _text(value: Any) -> str:
    return html.escape(f"{value:.6g}" if isinstance(value, float) else str(value))


def _table(heads: list[Any], rows: list[list[Any]]) -> str:
    """Columns of numbers to the right; in a table of two columns, which are a name and a value of any kind, none is."""
    shown = [[_text(cell) for cell in row] for row in (heads, *rows)]
    right = [len(heads) > 2 and all(_NUMBER.fullmatch(row[n]) for row in shown[1:]) for n in range(len(heads))]

    def line(cells: list[str], tag: str) -> str:
        marked = zip(cells, right, strict=False)
        return "<tr>" + "".join(f"<{tag}{' class=n' if number else ''}>{cell}</{tag}>" for cell, number in marked) + "</tr>"

    return "<table>" + line(shown[0], "th") + "".join(line(row, "td") for row in shown[1:]) + "</table>"


def _picture(png: bytes, title: str, caption: str) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode()
    return f'<figure><img alt="{_text(title)}" src="{source}"><figcaption>{_text(caption)}</figcaption></figure>'


def _cells(line: str) -> list[str]:
    """Of a row of a markdown table; a bar within a cell is written with a backslash before it."""
    return [cell.replace("\\|", "|").strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def card_html(card: str) -> str:
    """The card's markdown (headings, tables, code, paragraphs), without its front matter and its title."""
    lines = card.splitlines()
    if lines[:1] == ["---"] and "---" in lines[1:]:
        lines = lines[lines.index("---", 1) + 1 :]
    parts: list[str] = []
    n = 0
    while n < len(lines):
        line, start = lines[n], n
        n += 1
        if line.startswith("```"):
            while n < len(lines) and not lines[n].startswith("```"):
                n += 1
            parts.append(f"<pre>{html.escape(chr(10).join(lines[start + 1 : n]))}</pre>")
            n += 1
        elif line.startswith("|"):
            while n < len(lines) and lines[n].startswith("|"):
                n += 1
            parts.append(_table(_cells(line), [_cells(row) for row in lines[start + 2 : n]]))
        elif line.startswith("#"):
            if not line.startswith("# "):
                parts.append(f"<h3>{html.escape(line.lstrip('# '))}</h3>")
        elif line.strip():
            parts.append(f"<p>{html.escape(line)}</p>")
    return "\n".join(parts)


def _card_points(card: str, model: Any) -> list[Point]:
    """The perplexities that the card has, for want of measured ones."""
    total, active = count_parameters(model)
    K, found = model.config.num_experts_per_tok, {}
    for line in card.splitlines():
        cells = _cells(line) if line.startswith("|") else []
        if len(cells) == 2 and cells[0].endswith("perplexity"):
            try:
                found[cells[0]] = float(cells[1])
            except ValueError:  # in words
                continue
    places = {"dense perplexity": ("dense", total), "sparse perplexity": (f"K {K}", active), "dot perplexity": (f"K {K}", active)}
    points = [Point(*places[name], value) for name, value in found.items() if name in places and 0 < value < float("inf")]
    return sorted(points, key=lambda point: point.active)


class Run(NamedTuple):
    """What the folder of a run still holds."""

    logs: dict[str, list[dict[str, float]]]  # by stage
    affinity: dict[str, Tensor]  # [F, E] by layer, of the newest checkpoint
    plan: dict[str, Tensor]
    assignment: dict[str, Tensor]  # [F]


def read_run(folder: Path | None) -> Run:
    """
    Raises:
        ValueError: a log or a checkpoint that cannot be read.
    """
    run = Run({}, {}, {}, {})
    if folder is None:
        return run
    for stage, path in (("align", folder / "log.jsonl"), ("finetune", folder / "finetune" / "log.jsonl")):
        if path.is_file():
            try:
                entries = read_log(path)
                whole = bool(entries) and all(isinstance(e, dict) and isinstance(e.get("step"), int | float) for e in entries)
            except ValueError:
                whole = False
            require(whole, str(path), "no log of a training", "a JSON object with its step a line")
            run.logs[stage] = entries
    found = newest_checkpoint(folder / "checkpoints")
    if found is not None:
        newest, state = found
        try:
            names, tau = list(state["assignment"]), state["tau"]
            wide = [
                p for p in state["parameters"] if names and p.dim() == 2 and p.shape[0] == state["assignment"][names[0]].numel()
            ]
        except Exception as error:
            raise ValueError(f"{newest} is no checkpoint of an alignment ({error}); allowed: one that convert wrote") from None
        for name, affinity in zip(names, wide, strict=True):
            run.affinity[name], run.assignment[name] = affinity, state["assignment"][name]
        for name in figures.some(list(run.affinity)):
            run.plan[name] = sinkhorn(run.affinity[name], tau=float(tau))
    return run


def _structure(layers: Layerwise, run: Run) -> Iterator[str]:
    """What there is to see without text."""
    config, blocks = layers.model.config, moe_blocks(layers.model)
    E, s = config.num_experts, config.moe_intermediate_size
    experts, pairs, shown = {}, [], figures.some(list(blocks))
    for (name, block), layer in zip(blocks.items(), layers.layers, strict=True):
        with layers.loaded(layer):
            pairs.append(expert_norms(block))
            if name in shown:
                experts[name] = experts_of_neurons(block)
    yield "<h2>Assignment</h2>"
    yield _picture(
        figures.draw_assignment(experts, E),
        "assignment",
        f"Where the {s} neurons of each of the {E} experts lie in the dense FFN: 1 is what an assignment by chance gives. "
        "Stripes would say that the dense model keeps neurons that work together side by side.",
    )
    if run.affinity:
        yield "<h2>Affinity and plan</h2>"
        yield _picture(
            figures.draw_plan({n: run.affinity[n] for n in run.plan}, run.plan, run.assignment),
            "affinity and plan",
            "Of the newest checkpoint of the run: neurons sorted by the expert they are rounded to, neighbours averaged. A plan "
            "that is nearly an assignment is a sharp diagonal of blocks.",
        )
    yield "<h2>Weights</h2>"
    yield _picture(
        figures.draw_norms(torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])),
        "weights",
        "Left: how large an expert's neurons are in the mean; right: the rows of the routers. Both against "
        "their layer's mean, as a power of two.",
    )


def _measurements(measured: Measured | None, card: str, model: Any) -> Iterator[str]:
    total, _ = count_parameters(model)
    if measured is not None:
        names = list(measured.load)
        rows = [load_summary(load) for load in measured.load.values()]
        yield f"<h2>Load of the experts</h2><p class=note>On {measured.tokens:,} tokens.</p>"
        yield _picture(
            figures.draw_load(torch.stack(list(measured.load.values()))),
            "load",
            "Share of the slots that an expert gets, by layer; 1 is the even share.",
        )
        table = _table(
            ["layer", "least", "median", "most", "experts never used"],
            [
                [n, *(f"{row[key]:.2f}" for key in ("min", "median", "max")), row["unused"]]
                for n, row in zip(names, rows, strict=True)
            ],
        )
        yield f"<details><summary>by layer</summary>{table}</details>"
        yield "<h2>Co-routing</h2>"
        yield _picture(
            figures.draw_pairs(measured.pairs),
            "co-routing",
            "How much more often (red) or more rarely (blue) than by chance two experts serve the same token, given how often each "
            "is chosen; grey where one of them never is, and on the diagonal.",
        )
    points = _card_points(card, model) if measured is None else measured.points
    yield "<h2>Perplexity against active parameters</h2>"
    if len(points) >= 2:
        source = (
            "Figures of the card."
            if measured is None
            else f"Measured on {measured.tokens:,} tokens; the model was trained for its own K."
        )
        yield _picture(figures.draw_perplexity(points, total), "perplexity against active parameters", source)
        rows2 = [[p.label, f"{p.active:,}", f"{p.active / total:.1%}", f"{p.perplexity:.6g}"] for p in points]
        yield _table(["experts a token", "active parameters", "of all", "perplexity"], rows2)
    else:
        yield "<p class=note>The card has no two perplexities, and no text was given to measure on.</p>"
    if measured is None:
        yield "<p class=note>Load and co-routing were not measured: no text was given (--data).</p>"


def _training(run: Run) -> Iterator[str]:
    if not run.logs:
        return
    yield "<h2>Training</h2>"
    for stage, log in run.logs.items():
        first, last = log[0], log[-1]
        ends = ", ".join(
            f"{key} {first[key]:.4g} -> {last[key]:.4g}" for key in ("loss", "kl", "ce") if key in first and key in last
        )
        yield _picture(figures.draw_curves(log), f"training curves of {stage}", f"Stage {stage}: {len(log)} steps, {ends}.")


def write_report(
    folder: str | os.PathLike[str],
    layers: Layerwise,
    *,
    tokens: Tensor | None = None,
    run_folder: Path | None = None,
    batch_size: int = 4,
) -> str:
    """The page of a converted model as text, with the memory of one layer.

    Args:
        folder: as written by ``save``: the card is read from there.
        layers: that model, as ``converted_layers`` gives it.
        tokens: [N, S] int64 to measure load, co-routing and perplexity on. None: perplexities are the card's.
        run_folder: of the training: its logs, and what its newest checkpoint says of affinity and plan.
        batch_size: sequences a pass, each of which reads the model once.

    Raises:
        ValueError: matplotlib is missing; a log or a checkpoint that cannot be read.
    """
    figures.require_matplotlib()
    path, model = Path(folder), layers.model
    readme = path / "README.md"
    card = readme.read_text(encoding="utf-8") if readme.is_file() else model_card(model, path.name, {})
    run = read_run(run_folder)
    measured = None if tokens is None else measure(model, tokens.to(layers.device), batch_size=batch_size)
    title = next((line[2:] for line in card.splitlines() if line.startswith("# ")), path.resolve().name)
    facts = {key: value for key, value in model.config.to_dict().items() if key != "dense_config"}
    shown = _text(json.dumps(facts, indent=2, default=str))
    parts = [
        f"<h1>{_text(title)}</h1>",
        card_html(card),
        *_structure(layers, run),
        *_measurements(measured, card, model),
        *_training(run),
        "<h2>Configuration</h2>",
        f"<details><summary>config.json without the dense model's</summary><pre>{shown}</pre></details>",
    ]
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )
