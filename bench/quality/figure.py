"""The figure of a report: a line of three panels a setting."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from dotmoe_kernels._files import write_file

_COLOURS = {"dot": "C3", "moe": "C0", "pruned": "C2", "2:4": "C4", "tuned": "C1", "ablation": "0.4"}
_LABELS = {
    "dot": "learned by transport",
    "moe": "routed, fixed or masked",
    "pruned": "structured pruning",
    "2:4": "2:4",
    "tuned": "every weight trained",
}
_LINES = (
    "dot",
    "random",
    "kmeans",
    "activation",
    "shared-rate",
    "gate",
    "masks",
    "dot-long",
    "dot-distilled",
    "dot-distilled-long",
)  # as are drawn of the curves


def _forest(axes: Any, rows: Sequence[dict[str, Any]], pick: Any, dot: float | None) -> None:
    """A point with its interval a row, the best on top."""
    shown = sorted(rows, key=lambda row: pick(row).value, reverse=True)
    for y, row in enumerate(shown):
        value = pick(row)
        axes.errorbar(
            value.value,
            y,
            xerr=[[max(value.value - value.low, 0)], [max(value.high - value.value, 0)]],
            fmt="o",
            color=_COLOURS[row["kind"]],
            markersize=4,
            capsize=2,
        )
    axes.set_yticks(range(len(shown)), [row["arm"] for row in shown], fontsize=8)
    if dot is not None:
        axes.axvline(dot, color="C3", linewidth=0.8, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)


def _draw(axes: Any, found: dict[str, Any]) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    left, middle, right = axes
    methods = [row for row in found["rows"] if row["kind"] not in ("ablation", "dense")]
    ablated = [row for row in found["rows"] if row["kind"] in ("ablation", "dot") or row["arm"] == "dot-frozen"]
    changed = [row for row in ablated if "ratio_to_dot" in row]
    dot = next((row for row in found["rows"] if row["arm"] == "dot"), None)
    _forest(left, methods, lambda row: row["excess"], None if dot is None else dot["excess"].value)
    values = sorted(row["excess"].value for row in methods)
    if values and values[0] > 0 and values[-1] > 8 * values[0]:
        left.set_xscale("log")
    left.set(xlabel="perplexity / dense - 1 (lower is better)", title=f"{found['setting']}: methods")
    for kind, label in _LABELS.items():
        if any(row["kind"] == kind for row in methods):
            left.plot([], [], "o", color=_COLOURS[kind], label=label)
    left.legend(frameon=False, fontsize=7, loc="best")
    if changed:
        _forest(middle, changed, lambda row: row["ratio_to_dot"], 1.0)
        if max(row["ratio_to_dot"].value for row in changed) > 2:
            middle.set_xscale("log")
        middle.set(xlabel="perplexity / dot's", title="dot with one thing changed")
    else:
        middle.set_axis_off()
    colours = cycle(f"C{n}" for n in (0, 1, 2, 4, 5, 6, 7, 8))  # all but dot's
    for row in found["rows"]:
        if row["arm"] in _LINES and row["curve"]:
            tokens, kl = zip(*row["curve"], strict=True)
            own = row["arm"] == "dot"
            right.plot(tokens, kl, label=row["arm"], color="C3" if own else next(colours), linewidth=2 if own else 1)
    right.set(xlabel="training tokens", ylabel="KL(dense || sparse), nats", title="training, first seed")
    right.xaxis.set_major_formatter(EngFormatter(sep=" "))
    right.xaxis.set_major_locator(MaxNLocator(6))
    if right.lines:
        right.set_yscale("log" if min(min(line.get_ydata()) for line in right.lines) > 0 else "linear")
        right.legend(frameon=False, fontsize=7)
    right.spines[["top", "right"]].set_visible(False)


def write_figure(path: Path, settings: Sequence[dict[str, Any]]) -> bool:
    """False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    most = [max(sum((row["kind"] == "ablation") == kind for row in one["rows"]) for kind in (True, False)) for one in settings]
    heights = [1.2 + 0.2 * max(count, 12) for count in most]
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(settings), 3, squeeze=False, height_ratios=heights)
    for axes, found in zip(grid, settings, strict=True):
        _draw(axes, found)
    figure.suptitle("intervals: 95 %, paired bootstrap over held-out documents", fontsize=10)
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=110))
    return True
