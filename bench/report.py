"""Renders a result as a markdown table and a figure.

    python -m bench.report RESULT.json [--out DIR]      writes RESULT.md and RESULT.png beside it, or into DIR

A bar is the time of an implementation over that of ours, taken within each round and then the median: above 1, ours is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import curves, splits
from bench.paired import OURS

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))


def seconds(value: float) -> str:
    """Three digits and a unit."""
    for scale, unit in _UNITS:
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s"


def size(value: float) -> str:
    """Bytes in MB."""
    return f"{value / 1e6:,.0f} MB" if value >= 1e7 else f"{value / 1e6:.1f} MB"


def factor(value: float) -> str:
    """A ratio with three digits."""
    return f"{value:,.0f}x" if value >= 100 else f"{value:.3g}x" if value >= 10 else f"{value:.2f}x"


def groups_of(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The benchmarks by group, in the order of the run; in a group ours first, then by ratio."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in result["benchmarks"]:
        groups.setdefault(one["group"], []).append(one)
    for entries in groups.values():
        entries.sort(key=lambda one: (one["extra_info"]["impl"] != OURS, one["extra_info"]["ratio"]))
    return groups


_MEMORY = {"peak_bytes": "peak extra memory", "kept_bytes": "kept for backward"}


def _memory_of_ours(entries: list[dict[str, Any]]) -> dict[str, float]:
    info: dict[str, Any] = next((one["extra_info"] for one in entries if one["extra_info"]["impl"] == OURS), {})
    return {key: info[key] for key in _MEMORY if key in info}


def _memory_cell(value: float | None, ours: float) -> str:
    """Bytes, and the ratio to those of ours."""
    if value is None:
        return ""
    return size(value) + (f" ({factor(value / ours)})" if ours else "")


def _remarks(info: dict[str, Any], median: float) -> str:
    """What a reader must know about a row."""
    parts = [f"{info['tokens'] / median:,.4g} tokens/s"] if "tokens" in info else []
    if info["status"] == "differs":
        parts.append(f"differs from the reference by {info['error']:.1g}")
    if "steps" in info:
        parts.append(f"{info['steps']} steps")
    if "note" in info:
        parts.append(info["note"])
    return "; ".join(parts)


def _rate(info: dict[str, Any], median: float) -> str:
    flops = info.get("flops", 0)
    return f"{flops / median / 1e9:,.0f}" if flops else ""


def table(result: dict[str, Any]) -> str:
    """The whole result as markdown."""
    machine, commit = result["machine_info"], result["commit_info"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v != "not installed")
    load, found = machine.get("load_average_before"), machine.get("matrix_instructions")
    instructions = f", {' '.join(found) or 'no instructions for 16-bit products'}" if found is not None else ""
    dirty = " with uncommitted changes" if commit.get("dirty") else ""
    lines = [
        f"# {machine['name']}, {result['datetime'][:10]}, commit {commit['id'][:7]}{dirty}",
        "",
        f"{machine.get('gpu', machine['cpu'])}, {machine['cores']} cores, {machine['threads']} threads{instructions}; {versions}."
        + (f" Load average before the run {load[0]:g}." if load else "")
        + (f" Times are {machine['clock']}, not wall time: others used the machine." if "clock" in machine else ""),
        "",
        "Implementations take turns round by round; `ratio` is the median over the rounds of their time over ours of the same",
        "round (quartiles in brackets): above 1, ours is faster. `GFLOP/s` counts the useful work of ours for everybody.",
    ]
    split = splits.splits(result)
    for name, entries in groups_of(result).items():
        info = entries[0]["extra_info"]
        weighed = _memory_of_ours(entries)
        gradients = f"; gradients, part of every peak: {size(info['gradient_bytes'])}" if "gradient_bytes" in info else ""
        lines += ["", f"## {name}", "", f"{info.get('shape', '')}, {info.get('dtype', '')}{gradients}", ""]
        columns = "".join(f"{_MEMORY[key]} | " for key in weighed)
        lines.append(f"| impl | median | min | ratio | GFLOP/s | {columns}rounds | remarks |")
        lines.append(f"|---|--:|--:|--:|--:|{'--:|' * len(weighed)}--:|---|")
        for one in entries:
            info, stats = one["extra_info"], one["stats"]
            low, high = info["ratio_quartiles"]
            memory = "".join(f"{_memory_cell(info.get(key), ours)} | " for key, ours in weighed.items())
            ratio = "1" if info["impl"] == OURS else f"**{factor(info['ratio'])}** [{low:.3g}, {high:.3g}]"
            lines.append(
                f"| {info['impl']} | {seconds(stats['median'])} | {seconds(stats['min'])} | {ratio} | "
                f"{_rate(info, stats['median'])} | {memory}{stats['rounds']} | {_remarks(info, stats['median'])} |"
            )
        if name in split:
            lines += ["", "Of a step, by part:", "", *splits.table(split[name])]
    return "\n".join(lines) + "\n"


_COLUMN, _LABELS, _BAR = 6.6, 2.45, 0.23  # inches: a column of panels, its room for names, a bar
_ABOVE, _BELOW = 0.62, 0.42  # inches: a panel's title, its ticks and the gap to the next


def _panel(axis: Any, name: str, entries: list[dict[str, Any]]) -> None:
    """Horizontal bars of the ratio to ours, logarithmic where they span more than a factor of four."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    infos = [one["extra_info"] for one in entries]
    ratios = [info["ratio"] for info in infos]
    low, high = min(ratios), max(ratios)
    labels = [info["impl"] + (" *" if info["status"] == "differs" else "") for info in infos]
    colors = ["#1b6ca8" if i["impl"] == OURS else "#8fb8d8" if i["impl"].startswith(OURS) else "#b9b9b9" for i in infos]
    logarithmic = high / low > 4
    left = low / 2 if logarithmic else 0.0
    right = high * (high / left) ** 0.6 if logarithmic else high * 1.55
    axis.barh(labels, [ratio - left for ratio in ratios], left=left, color=colors, height=0.74)
    if logarithmic:
        axis.set_xscale("log")
        steps = (1, 2, 5) if high / low < 30 else (1,)
        ticks = [m * 10.0**d for d in range(-4, 7) for m in steps if left <= m * 10.0**d <= high * 1.5]
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axis.set_xlim(left, right)
    axis.set_ylim(len(entries) - 0.45, -0.55)
    axis.axvline(1, color="#1b6ca8", linewidth=0.8, linestyle=":", zorder=0)
    for y, (one, ratio) in enumerate(zip(entries, ratios, strict=True)):
        text = f"{factor(ratio)}   {seconds(one['stats']['median'])}"
        peak = one["extra_info"].get("peak_bytes")
        text += f"   {size(peak)}" if peak is not None else ""
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(text, (ratio, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, bbox=box)
    axis.set_title(f"{name}\n{infos[0].get('shape', '')}, {infos[0].get('dtype', '')}", fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def figure(result: dict[str, Any], path: Path) -> None:
    """One panel a group, each as high as its bars need, in up to three columns."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = groups_of(result)
    columns = min(3, len(groups))
    filled = [0.45] * columns  # inches from the top; the title comes first
    places = []
    for name, entries in groups.items():
        column = filled.index(min(filled))
        height = _BAR * len(entries)
        places.append((name, entries, column, filled[column] + _ABOVE, height))
        filled[column] += _ABOVE + height + _BELOW
    width, total = _COLUMN * columns, max(filled)
    fig = Figure(figsize=(width, total))
    FigureCanvasAgg(fig)
    for name, entries, column, top, height in places:
        box = (_COLUMN * column + _LABELS, total - top - height, _COLUMN - _LABELS - 0.15, height)
        _panel(fig.add_axes((box[0] / width, box[1] / total, box[2] / width, box[3] / total)), name, entries)
    machine = result["machine_info"]
    title = f"{machine.get('clock', 'Time')} over ours, median of paired rounds.  {machine.get('gpu', machine['cpu'])}, "
    title += f"{machine['threads']} threads, commit {result['commit_info']['id'][:7]}, {result['datetime'][:10]}."
    if any(one["extra_info"]["status"] == "differs" for one in result["benchmarks"]):
        title += "  * another answer than the reference."
    if any("peak_bytes" in one["extra_info"] for one in result["benchmarks"]):
        title += "  MB: peak extra memory."
    fig.text(0.15 / width, 1 - 0.12 / total, title, fontsize=10, va="top", wrap=True)
    fig.savefig(path, dpi=110)


def write(result_path: Path, out: Path | None = None) -> list[Path]:
    """RESULT.md, RESULT.png and, where there are curves or splits, RESULT-by-T.png and RESULT-split.png, each written under a
    temporary name first."""
    result = json.loads(result_path.read_text())
    if not result["benchmarks"]:
        raise ValueError(f"{result_path} holds no benchmarks")
    folder = out or result_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[Path], Any]] = {
        f"{result_path.stem}.md": lambda path: path.write_text(table(result)),
        f"{result_path.stem}.png": lambda path: figure(bars, path),
    }
    bars = {**result, "benchmarks": [one for one in result["benchmarks"] if not one["group"].startswith(curves.CURVE)]}
    if not bars["benchmarks"]:
        del drawn[f"{result_path.stem}.png"]
    if len(bars["benchmarks"]) < len(result["benchmarks"]):
        drawn[f"{result_path.stem}-by-T.png"] = lambda path: curves.figure(result, path)
    if splits.splits(result):
        drawn[f"{result_path.stem}-split.png"] = lambda path: splits.figure(result, path)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, draw in drawn.items():
            draw(Path(scratch) / name)
            os.replace(Path(scratch) / name, folder / name)
    return [folder / name for name in drawn]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Render a result as a markdown table and a figure.")
    parser.add_argument("result", type=Path, help="a JSON file written by python -m bench or pytest bench --benchmark-json")
    parser.add_argument("--out", type=Path, help="folder to write into (default: beside the result)")
    options = parser.parse_args(arguments)
    markdown, *pictures = write(options.result, options.out)
    print(markdown.read_text())
    for picture in pictures:
        print(picture)


if __name__ == "__main__":
    main()
