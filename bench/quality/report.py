"""Table and figure of the results there are: `python -m bench.quality report`.

    <out>/report.md, report.json, report.png

Figures are means over the seeds; intervals are of a paired bootstrap over documents (intervals.py). How far the seeds lie apart
stands beside them, since the interval does not hold it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dotmoe_kernels._checks import require
from dotmoe_kernels._files import write_file

from .figure import write_figure
from .intervals import Estimate, draw_documents, estimate, mean_ratio, perplexities, reduction
from .presets import PRESETS
from .run import read_result

_SHARED = ("weights", "train", "held", "topology")  # what makes results comparable
_RIVALS = {"moe": "routed, same tokens", "pruned": "structured pruning"}


@dataclass
class Row:
    """An arm over its seeds."""

    name: str
    kind: str
    results: list[dict[str, Any]]
    draws: list[np.ndarray] = field(default_factory=list)  # [B] perplexity by seed
    excess: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [B] mean over seeds

    def mean(self, key: str) -> float | None:
        found = [r[key] for r in self.results if r.get(key) is not None]
        return sum(found) / len(found) if found else None


def read_results(out: Path, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """By setting; what cannot be read is named and left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    known = {arm.name for parts in PRESETS.values() for part in parts for arm in part.arms()}
    for path in sorted(out.glob("*/*.json")):
        try:
            result = read_result(path)
        except ValueError as error:
            say(f"left out: {error}")
            continue
        if result["arm"] not in known:
            say(f"left out: {path}, of {result['arm']}, which is in no registry")
            continue
        found.setdefault(result["setting"], []).append(result)
    return found


def rows_of(results: Sequence[dict[str, Any]], say: Callable[[str], None]) -> list[Row]:
    """The rows of a setting, whose results are of the same documents as the dense model's."""
    dense = next((r for r in results if r["kind"] == "dense"), None)
    require(dense is not None, "results", "without the dense model's", 'a run of the method "dense" too')
    assert dense is not None
    tokens = np.asarray(dense["tokens"], dtype=float)
    rows: dict[str, Row] = {}
    for result in sorted(results, key=lambda r: (r["arm"], r["seed"])):
        other = [name for name in _SHARED if result["depends"].get(name) != dense["depends"].get(name)]
        if other or result["tokens"] != dense["tokens"]:
            say(f"left out: {result['arm']}, seed {result['seed']}: not of the dense result's {', '.join(other) or 'documents'}")
            continue
        rows.setdefault(result["arm"], Row(result["arm"], result["kind"], [])).results.append(result)
    weights = draw_documents(len(tokens))
    base = perplexities(np.asarray(dense["nll"]), tokens, weights)
    for row in rows.values():
        row.draws = [perplexities(np.asarray(r["nll"]), tokens, weights) for r in row.results]
        row.excess = mean_ratio(row.draws, base) - 1
    return list(rows.values())


def best_other(rows: Sequence[Row], kind: str) -> Row | None:
    others = [row for row in rows if row.kind == kind]
    return min(others, key=lambda row: float(row.excess[0]), default=None)


def figures(setting: str, rows: Sequence[Row]) -> dict[str, Any]:
    """All figures of a setting, for report.json."""
    dot = next((row for row in rows if row.name == "dot"), None)
    found: dict[str, Any] = {"setting": setting, "documents": len(rows[0].results[0]["tokens"]), "rows": []}
    for row in sorted(rows, key=lambda row: float(row.excess[0])):
        values = [r["perplexity"] for r in row.results]
        entry: dict[str, Any] = {
            "arm": row.name,
            "kind": row.kind,
            "about": row.results[0]["about"],
            "source": row.results[0]["source"],
            "seeds": [r["seed"] for r in row.results],
            "perplexity": sum(values) / len(values),
            "perplexity_by_seed": values,
            "excess": estimate(row.excess),
            "seconds": sum(r["seconds"]["in all"] for r in row.results) / len(row.results),
            "trained_tokens": row.results[0]["trained_tokens"],
            "total_parameters": row.results[0]["total_parameters"],
            **{
                key: row.mean(key)
                for key in ("active_parameters", "unused", "experts_in_use", "mutual_information", "most_information")
            },
            "tasks": [r["tasks"]["mean"] for r in row.results if "tasks" in r],
            "curve": row.results[0]["curve"],
        }
        if dot is not None and row is not dot and row.kind != "dense":
            entry["ratio_to_dot"] = estimate(mean_ratio(row.draws, np.mean(dot.draws, axis=0)))
        found["rows"].append(entry)
    found["reductions"] = [
        {"arm": row.name, "against": kind, "best": best.name, "reduction": estimate(reduction(row.excess, of_kind))}
        for row in rows
        if row.kind == "dot"
        for kind in _RIVALS
        if (best := best_other(rows, kind)) is not None
        for of_kind in [[other.excess for other in rows if other.kind == kind]]
    ]
    return found


def _percent(value: Estimate) -> str:
    return f"{value.value:.1%} [{value.low:.1%}, {value.high:.1%}]"


def _cells(row: dict[str, Any]) -> list[str]:
    spread = f"{min(row['perplexity_by_seed']):.2f} to {max(row['perplexity_by_seed']):.2f}" if len(row["seeds"]) > 1 else "-"
    ratio, used, told = row.get("ratio_to_dot"), row["experts_in_use"], row["mutual_information"]
    return [
        row["arm"],
        str(len(row["seeds"])),
        f"{row['active_parameters'] / row['total_parameters']:.1%}",
        f"{row['perplexity']:.2f}",
        spread,
        "-" if row["kind"] == "dense" else str(row["excess"]),
        "-" if ratio is None else f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]",
        "-" if used is None else f"{used:.0%}",
        "-" if told is None else f"{told:.2f} of {row['most_information']:.2f}",
        f"{row['trained_tokens']:,}",
        f"{row['seconds']:.0f}",
    ]


_HEADS = (
    *("arm", "seeds", "active parameters", "perplexity", "of the seeds", "excess [95 %]", "perplexity / dot's [95 %]"),
    *("experts in use", "information, nats", "tokens", "seconds"),
)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [f"| {' | '.join(_HEADS)} |", f"|{'---|' * len(_HEADS)}"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(row))} |" for row in rows)])


def _tasks_table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over the tasks, and over the seeds; the intervals are over documents."""
    lines = ["| arm | accuracy [95 %] | log-likelihood a character, nats [95 %] |", "|---|---|---|"]
    for row in rows:
        cells = [row["arm"]]
        for key, shown in (("accuracy", ".1%"), ("log_likelihood", ".3f")):
            ends = [[one[key], *one[f"{key}_interval"]] for one in row["tasks"]]
            value, low, high = (sum(part) / len(ends) for part in zip(*ends, strict=True))
            cells.append(f"{value:{shown}} [{low:{shown}}, {high:{shown}}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _section(found: dict[str, Any]) -> str:
    methods = [row for row in found["rows"] if row["kind"] != "ablation"]
    changed = [row for row in found["rows"] if row["kind"] == "ablation"]
    parts = [f"## {found['setting']}: {found['documents']} held-out documents", _table(methods)]
    said = [
        f"- {one['arm']}: excess lower than that of the best of {_RIVALS[one['against']]} ({one['best']}) by "
        f"{_percent(one['reduction'])}"
        for one in found["reductions"]
    ]
    parts += ["\n".join(said)] if said else []
    scored = [row for row in found["rows"] if row["tasks"]]
    parts += ["### The six tasks, zero-shot", _tasks_table(scored)] if scored else []
    if changed:
        own = [row for row in methods if row["kind"] == "dot" or row["arm"] == "dot-frozen"]
        parts += ["### dot with one thing changed", _table(sorted([*own, *changed], key=lambda row: row["excess"].value))]
        parts.append("\n".join(f"- {row['arm']}: {row['about']}" for row in changed))
    return "\n\n".join(parts)


_INTRODUCTION = """# What the method is worth

excess = perplexity / dense perplexity - 1, the mean over the seeds. Intervals: 95 %, 2,000 paired draws of the held-out documents;
they say how far other documents would move a figure, the column beside the perplexity how far another seed does. Information:
between token and expert, and the most there could be; 0 is pruning. Static methods (prune, 2to4) train nothing. The best of the
others is found anew in every draw. Seconds are of a clock on the wall, whatever else the machine did."""


def report(out: Path, say: Callable[[str], None] = print) -> str:
    """Writes report.md, report.json and, with matplotlib, report.png; returns the text.

    Raises:
        ValueError: no result in ``out``, or none of the dense model.
    """
    results = read_results(out, say)
    require(bool(results), "--out", f"{out}, without results", "a folder that `python -m bench.quality run` filled")
    found = [figures(setting, rows_of(of_setting, say)) for setting, of_setting in results.items()]
    told = {row["arm"]: (row["arm"], row["source"], row["about"].replace("|", "\\|")) for one in found for row in one["rows"]}
    registry = "## Methods\n\n| arm | source | what it does here |\n|---|---|---|\n" + "\n".join(
        f"| {' | '.join(cells)} |" for cells in told.values()
    )
    text = "\n\n".join([_INTRODUCTION, *map(_section, found), registry]) + "\n"
    written = json.dumps(found, indent=1, default=asdict)
    write_file(out / "report.json", lambda file: file.write(written.encode()))
    write_file(out / "report.md", lambda file: file.write(text.encode()))
    if not write_figure(out / "report.png", found):
        say("report.png: not written, matplotlib is missing: pip install 'dotmoe_kernels[demo]'")
    return text
