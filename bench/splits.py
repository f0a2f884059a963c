"""Where a step of alignment goes: a table and stacked bars of the parts that ``bench.alignment`` times."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def splits(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """group -> impl -> part -> seconds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for one in result["benchmarks"]:
        if split := one["extra_info"].get("split"):
            found.setdefault(one["group"], {})[one["extra_info"]["impl"]] = split
    return found


def table(by_impl: dict[str, dict[str, float]]) -> list[str]:
    """Markdown lines: milliseconds and share of every part."""
    lines = [f"| part | {' | '.join(by_impl)} |", f"|---|{'--:|' * len(by_impl)}"]
    totals = {impl: sum(split.values()) for impl, split in by_impl.items()}
    for part in next(iter(by_impl.values())):
        cells = [f"{1e3 * split[part]:,.1f} ms ({100 * split[part] / totals[impl]:.1f} %)" for impl, split in by_impl.items()]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    lines.append(f"| sum | {' | '.join(f'{1e3 * total:,.1f} ms' for total in totals.values())} |")
    return lines


def figure(result: dict[str, Any], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = splits(result)
    fig = Figure(figsize=(10, 1.2 + sum(0.7 + 0.45 * len(g) for g in groups.values())), layout="constrained")
    FigureCanvasAgg(fig)
    heights = [len(g) + 1 for g in groups.values()]
    axes = fig.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (name, by_impl) in zip(axes, groups.items(), strict=True):
        names = list(by_impl)
        left = dict.fromkeys(names, 0.0)
        for n, part in enumerate(by_impl[names[0]]):
            widths = [1e3 * by_impl[impl][part] for impl in names]
            axis.barh(names, widths, left=list(left.values()), label=part, color=colormaps["tab10"](n), height=0.7)
            left = {impl: left[impl] + width for impl, width in zip(names, widths, strict=True)}
        for y, total in enumerate(left.values()):
            axis.annotate(f"{total:,.0f} ms", (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.1)
        axis.set_xlabel("ms a step", fontsize=8)
        axis.set_title(name, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    machine = result["machine_info"]
    title = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, commit {result['commit_info']['id'][:7]}"
    title = f"A step of alignment by its parts, {machine.get('clock', 'wall time')}.  {title}, {result['datetime'][:10]}"
    fig.suptitle(title, fontsize=10)
    fig.savefig(path, format="png", dpi=110)
