"""Speed against dense by the number of tokens: a line for every expert width, a panel for every dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.paired import OURS

CURVE = "curve-"  # how the names of its groups begin
_DENSE = ("dense", "dense-merged")


def speedups(result: dict[str, Any]) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """dtype -> width s -> [(T, time of the faster dense form over ours)], T ascending."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for one in result["benchmarks"]:
        info = one["extra_info"]
        if one["group"].startswith(CURVE) and info["impl"] in _DENSE:
            line = found.setdefault(info["dtype"], {}).setdefault(info["s"], {})
            line[info["T"]] = min(info["ratio"], line.get(info["T"], info["ratio"]))
    return {dtype: {s: sorted(line.items()) for s, line in sorted(lines.items())} for dtype, lines in found.items()}


def figure(result: dict[str, Any], path: Path) -> None:
    """Both axes logarithmic; above 1 ours is the faster one."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels = speedups(result)
    fig = Figure(figsize=(6.6 * len(panels), 4.4), layout="constrained")
    FigureCanvasAgg(fig)
    for axis, (dtype, lines) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        tokens = sorted({T for line in lines.values() for T, _ in line})
        for n, (s, line) in enumerate(lines.items()):
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"s = {s}", color=colormaps["viridis"](n / 6))
        axis.axhline(1, color="0.4", linewidth=0.9, linestyle=":")
        axis.annotate("dense", (tokens[-1], 1), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8, color="0.4")
        axis.set(xscale="log", yscale="log", xlabel="tokens T", ylabel="times the speed of dense", title=dtype)
        axis.xaxis.set_major_locator(FixedLocator(tokens))
        values = [r for line in lines.values() for _, r in line] + [1.0]
        ticks = [t for t in (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8) if min(values) * 0.8 <= t <= max(values) * 1.2]
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        for side in (axis.xaxis, axis.yaxis):
            side.set_minor_locator(NullLocator())
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(labelsize=8)
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    machine = result["machine_info"]
    fig.suptitle(
        f"{OURS} against the faster dense FFN, 25 % of F = 14336 active.  {machine.get('gpu', machine['cpu'])}, "
        f"{machine['threads']} threads, commit {result['commit_info']['id'][:7]}",
        fontsize=10,
    )
    fig.savefig(path, format="png", dpi=110)
